#include "residual_store.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

#include "../ops/checks.h"
#include "../ops/operators.h"

namespace regtopk {
namespace {

at::Tensor parameter_offsets(const Layout& layout) {
  std::vector<int64_t> offsets{0};
  for (const Parameter& parameter : layout.parameters) offsets.push_back(offsets.back() + parameter.numel);
  return at::tensor(offsets, at::kLong);
}

// The pieces of a plan, as views of its tensors.
std::vector<Piece> split(const Plan& plan) {
  std::vector<Piece> pieces;
  const at::Tensor offsets = parameter_offsets(plan.layout);
  const int64_t* const offset = offsets.const_data_ptr<int64_t>();
  at::Tensor indices, values, bounds;
  if (plan.sent.defined()) {
    std::tie(indices, values) = decode(plan.sent, plan.numel, plan.sent_k, plan.layout.dtype);
    bounds = at::searchsorted(indices, offsets.to(indices.device())).cpu();
  }
  for (size_t i = 0; i < plan.layout.parameters.size(); ++i) {
    Piece piece;
    piece.residual = plan.residual.narrow(0, offset[i], plan.layout.parameters[i].numel);
    if (plan.sent.defined()) {
      const int64_t begin = bounds.const_data_ptr<int64_t>()[i], end = bounds.const_data_ptr<int64_t>()[i + 1];
      piece.sent_index = indices.slice(0, begin, end).sub(offset[i]);
      piece.sent_value = values.slice(0, begin, end);
      if (plan.feedback.defined()) piece.feedback = plan.feedback.slice(0, begin, end);
    }
    pieces.push_back(std::move(piece));
  }
  return pieces;
}

}  // namespace

int64_t Layout::numel() const {
  int64_t total = 0;
  for (const Parameter& parameter : parameters) total += parameter.numel;
  return total;
}

int64_t Layout::hash() const {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a, 64 bits
  const auto mix = [&hash](uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) hash = (hash ^ ((value >> (8 * byte)) & 0xff)) * 0x100000001b3ull;
  };
  mix(static_cast<uint64_t>(dtype));
  for (const Parameter& parameter : parameters) mix(static_cast<uint64_t>(parameter.numel));
  return static_cast<int64_t>(hash);
}

bool Layout::same_parameters(const Layout& other) const {
  if (dtype != other.dtype || parameters.size() != other.parameters.size()) return false;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].key != other.parameters[i].key || parameters[i].numel != other.parameters[i].numel) return false;
  }
  return true;
}

Piece Piece::clone() const {
  const auto copy = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.clone() : tensor; };
  return {copy(residual), copy(sent_index), copy(sent_value), copy(feedback)};
}

void Plan::remember(at::Tensor payload, at::Tensor feedback_of_payload, int64_t step) {
  sent = std::move(payload);
  sent_k = k;
  feedback = std::move(feedback_of_payload);
  sent_step = step;
}

int64_t Plan::take_back(const std::vector<int64_t>& parameters) {
  if (parameters.empty()) return 0;
  const auto [indices, values] = decode(sent, numel, sent_k, layout.dtype);
  const at::Tensor offsets = parameter_offsets(layout);
  const at::Tensor bounds = at::searchsorted(indices, offsets.to(indices.device())).cpu();
  const int64_t* const bound = bounds.const_data_ptr<int64_t>();
  const at::Tensor taken = at::zeros({sent_k}, indices.options().dtype(at::kBool));
  int64_t count = 0;
  for (const int64_t parameter : parameters) {
    taken.slice(0, bound[parameter], bound[parameter + 1]).fill_(true);
    count += bound[parameter + 1] - bound[parameter];
  }
  if (count == 0) return 0;
  const auto packed = [&](const at::Tensor& which) {
    return encode(indices.masked_select(which), values.masked_select(which), numel, sent_step, hash);
  };
  put_back_(residual, packed(taken), layout.dtype);
  if (count == sent_k) {
    sent.reset();
    feedback.reset();
  } else {
    const at::Tensor others = taken.logical_not();
    sent = packed(others);
    if (feedback.defined()) feedback = feedback.masked_select(others);
  }
  sent_k -= count;
  return count;
}

int64_t Plan::forget() {
  const bool put_back = std::exchange(in_vain, false);
  if (!sent.defined()) return 0;
  if (put_back) put_back_(residual, sent, layout.dtype);
  sent.reset();
  feedback.reset();
  return sent_k;
}

std::shared_ptr<Plan> ResidualStore::plan_for(const std::string& who, const Layout& layout, const EntriesToSend& entries_to_send) {
  for (const auto& plan : plans_) {
    if (plan->layout.same_parameters(layout)) return plan;
  }
  std::unordered_set<ParameterKey> wanted;
  for (const Parameter& parameter : layout.parameters) wanted.insert(parameter.key);
  std::erase_if(plans_, [&](const std::shared_ptr<Plan>& plan) {
    for (const Parameter& parameter : plan->layout.parameters) {
      if (wanted.contains(parameter.key)) {
        dissolve(*plan);
        return true;
      }
    }
    return false;
  });
  plans_.push_back(assemble(who, layout, entries_to_send));
  return plans_.back();
}

void ResidualStore::dissolve(Plan& plan) {
  ++rebuilds_;
  if (plan.in_vain) history_dropped_ += plan.forget();
  const std::vector<Piece> pieces = split(plan);
  for (size_t i = 0; i < pieces.size(); ++i) waiting_[plan.layout.parameters[i].key] = pieces[i];
}

std::shared_ptr<Plan> ResidualStore::assemble(const std::string& who, const Layout& layout, const EntriesToSend& entries_to_send) {
  for (const Parameter& parameter : layout.parameters) {
    const auto found = waiting_.find(parameter.key);
    if (found == waiting_.end()) continue;
    TORCH_CHECK_VALUE(
        found->second.residual.numel() == parameter.numel, who, ": expected a parameter of ", found->second.residual.numel(),
        " entries, as in the last step, got ", parameter.numel, "; reset the state to begin with another model");
  }
  auto plan = std::make_shared<Plan>();
  plan->layout = layout;
  plan->numel = layout.numel();
  plan->k = entries_to_send(plan->numel);
  plan->hash = layout.hash();
  const at::Tensor& owner = layout.parameters.front().owner;
  const at::Device device = owner.defined() ? owner.device() : at::Device(at::kCPU);
  const auto options = at::TensorOptions().device(device).dtype(accumulate_dtype(layout.dtype));
  plan->residual = at::empty({plan->numel}, options);

  std::vector<at::Tensor> indices, values, feedback;
  bool any_feedback = false;
  int64_t offset = 0;
  for (const Parameter& parameter : layout.parameters) {
    const at::Tensor residual = plan->residual.narrow(0, offset, parameter.numel);
    const auto found = waiting_.find(parameter.key);
    if (found == waiting_.end()) {
      residual.zero_();
    } else {
      const Piece& piece = found->second;
      residual.copy_(piece.residual);
      // A history belongs to the values that travelled: in another dtype they would be others.
      if (piece.sent_index.defined() && piece.sent_value.scalar_type() != layout.dtype) {
        history_dropped_ += piece.sent_index.numel();
      } else if (piece.sent_index.defined()) {
        indices.push_back(piece.sent_index.to(device).add(offset));
        values.push_back(piece.sent_value.to(device));
        any_feedback |= piece.feedback.defined();
        // rho infinite, and a + infinity over a: no regularisation, as for an entry without history.
        feedback.push_back(
            piece.feedback.defined() ? piece.feedback.to(options)
                                     : at::full({piece.sent_index.numel()}, std::numeric_limits<double>::infinity(), options));
      }
      waiting_.erase(found);
    }
    offset += parameter.numel;
  }
  if (!indices.empty()) {
    const at::Tensor index = at::cat(indices);
    if (index.numel() > 0) {
      plan->sent = encode(index, at::cat(values), plan->numel, 0, plan->hash);
      plan->sent_k = index.numel();
      if (any_feedback) plan->feedback = at::cat(feedback);
    }
  }
  return plan;
}

std::unordered_map<ParameterKey, Piece> ResidualStore::pieces() const {
  std::unordered_map<ParameterKey, Piece> pieces = waiting_;
  for (const auto& plan : plans_) {
    std::vector<Piece> split_pieces = split(*plan);
    for (size_t i = 0; i < split_pieces.size(); ++i) pieces[plan->layout.parameters[i].key] = std::move(split_pieces[i]);
  }
  return pieces;
}

void ResidualStore::multiply(double factor, bool feedback_too) {
  const auto scale = [&](at::Tensor& residual, at::Tensor& feedback) {
    if (residual.defined()) residual.mul_(factor);
    if (feedback_too && feedback.defined()) feedback.mul_(factor);
  };
  for (const auto& plan : plans_) scale(plan->residual, plan->feedback);
  for (auto& [key, piece] : waiting_) scale(piece.residual, piece.feedback);
}

void ResidualStore::import_pieces(std::unordered_map<ParameterKey, Piece> pieces) {
  plans_.clear();
  waiting_ = std::move(pieces);
}

}  // namespace regtopk
