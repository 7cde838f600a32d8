#include "store.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_set>
#include <utility>

#include "../ops/checks.h"

namespace regtopk {
namespace {

std::unordered_set<ParameterKey> keys_of(const Layout& layout) {
  std::unordered_set<ParameterKey> keys;
  for (const Span& span : layout.spans) keys.insert(span.key);
  return keys;
}

// On the same device, or on the host, where what is to be saved takes no memory of a GPU's.
Piece copy_of(const Piece& piece, bool on_host = false) {
  const auto copy = [&](const at::Tensor& tensor) {
    return !tensor.defined() ? tensor : on_host && !tensor.is_cpu() ? tensor.cpu() : tensor.clone();
  };
  return {piece.owner,          copy(piece.residual), copy(piece.velocity), copy(piece.sent_index), copy(piece.sent_value),
          copy(piece.feedback), copy(piece.idle)};
}

}  // namespace

std::shared_ptr<Plan> Store::find(const Layout& layout, int64_t hint) const {
  const auto is_it = [&](const std::shared_ptr<Plan>& plan) { return plan->layout == layout; };
  if (hint >= 0 && hint < static_cast<int64_t>(plans_.size()) && is_it(plans_[hint])) return plans_[hint];
  const auto found = std::find_if(plans_.begin(), plans_.end(), is_it);
  return found == plans_.end() ? nullptr : *found;
}

bool Store::was_exchanged(const Layout& layout, int64_t round) const {
  const auto keys = keys_of(layout);
  return std::any_of(plans_.begin(), plans_.end(), [&](const std::shared_ptr<Plan>& plan) {
    return plan->round == round &&
           std::any_of(plan->layout.spans.begin(), plan->layout.spans.end(), [&](const Span& span) { return keys.contains(span.key); });
  });
}

void Store::check_sizes(const std::string& who, const Layout& layout) const {
  std::unordered_map<ParameterKey, int64_t> kept;
  for (const auto& plan : plans_) {
    for (size_t i = 0; i < plan->owners.size(); ++i) {
      if (!plan->owners[i].is_gone()) kept[plan->layout.spans[i].key] = plan->layout.spans[i].numel;
    }
  }
  for (const auto& [key, piece] : waiting_) {
    if (!piece.owner.is_gone()) kept[key] = piece.residual.numel();
  }
  for (const Span& span : layout.spans) {
    const auto found = kept.find(span.key);
    TORCH_CHECK_VALUE(
        found == kept.end() || found->second == span.numel, who, ": expected a parameter of ", found->second,
        " entries, as in the last step, got ", span.numel, "; call reset() to begin with another model");
  }
}

std::shared_ptr<Plan> Store::make(
    const Layout& layout, std::vector<Owner> owners, const at::Tensor& verdict, const at::Tensor& counters, bool with_velocity,
    Garbage& garbage) {
  const auto keys = keys_of(layout);
  std::erase_if(plans_, [&](const std::shared_ptr<Plan>& plan) {
    const auto& spans = plan->layout.spans;
    if (std::none_of(spans.begin(), spans.end(), [&](const Span& span) { return keys.contains(span.key); })) return false;
    take_apart(plan, layout, counters);
    garbage.plans.push_back(plan);
    return true;
  });
  drop_the_gone(garbage);

  auto plan = std::make_shared<Plan>();
  plan->layout = layout;
  plan->owners = std::move(owners);
  plan->numel = layout.numel();
  plan->hash = layout.hash();
  const auto options = at::TensorOptions().device(layout.device).dtype(accumulate_dtype(layout.dtype));
  plan->shared = {layout.offsets(), at::zeros({static_cast<int64_t>(layout.spans.size())}, options.dtype(at::kByte)), verdict};
  plan->residual = at::empty({plan->numel}, options);
  if (with_velocity) plan->velocity = at::zeros({plan->numel}, options);

  std::vector<at::Tensor> indices, values, feedback;
  bool any_feedback = false;
  int64_t offset = 0;
  for (size_t i = 0; i < layout.spans.size(); ++i) {
    const Span& span = layout.spans[i];
    const at::Tensor residual = plan->residual.narrow(0, offset, span.numel);
    const auto found = waiting_.find(span.key);
    if (found == waiting_.end()) {
      residual.zero_();
    } else {
      const Piece& piece = found->second;
      residual.copy_(piece.residual);
      if (with_velocity && piece.velocity.defined()) plan->velocity.narrow(0, offset, span.numel).copy_(piece.velocity);
      if (piece.idle.defined()) plan->shared.idle.narrow(0, static_cast<int64_t>(i), 1).copy_(piece.idle);
      // A history belongs to the values that travelled: in another dtype they would be others.
      if (piece.sent_index.defined() && piece.sent_value.scalar_type() != layout.dtype) {
        history_dropped += piece.sent_index.numel();
      } else if (piece.sent_index.defined()) {
        indices.push_back(piece.sent_index.to(layout.device).add(offset));
        values.push_back(piece.sent_value.to(layout.device));
        any_feedback |= piece.feedback.defined();
        // rho infinite, and a + infinity over a: no regularisation, as for an entry without history.
        feedback.push_back(
            piece.feedback.defined() ? piece.feedback.to(options)
                                     : at::full({piece.sent_index.numel()}, std::numeric_limits<double>::infinity(), options));
      }
      garbage.pieces.emplace_back()[span.key] = std::move(found->second);
      waiting_.erase(found);
    }
    offset += span.numel;
  }
  if (!indices.empty()) {
    const at::Tensor index = at::cat(indices);
    if (index.numel() > 0) {
      plan->sent = encode(index, at::cat(values), plan->numel, 0, plan->hash, static_cast<int64_t>(layout.spans.size()));
      plan->sent_k = index.numel();
      if (any_feedback) plan->feedback = at::cat(feedback);
    }
  }
  plans_.push_back(plan);
  return plan;
}

void Store::take_apart(const std::shared_ptr<Plan>& plan, const Layout& layout, const at::Tensor& counters) {
  ++rebuilds;
  plan->settle(counters);
  const auto keys = keys_of(layout);
  std::vector<Piece> pieces = plan->split();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const ParameterKey key = plan->layout.spans[i].key;
    // A piece that goes on waiting must not keep the whole bucket's memory.
    waiting_[key] = keys.contains(key) ? std::move(pieces[i]) : copy_of(pieces[i]);
  }
}

void Store::drop_the_gone(Garbage& garbage) {
  Pieces& gone = garbage.pieces.emplace_back();
  for (auto at = waiting_.begin(); at != waiting_.end();) {
    if (!at->second.owner.is_gone()) {
      ++at;
      continue;
    }
    residual_dropped += at->second.residual.numel();
    gone.insert(waiting_.extract(at++));
  }
  // A plan whose parameters are all gone is a model that is gone.
  std::erase_if(plans_, [&](const std::shared_ptr<Plan>& plan) {
    if (!std::all_of(plan->owners.begin(), plan->owners.end(), [](const Owner& owner) { return owner.is_gone(); })) return false;
    residual_dropped += plan->numel;
    garbage.plans.push_back(plan);
    return true;
  });
}

Pieces Store::copy_pieces(const at::Tensor& counters, Garbage& garbage) {
  drop_the_gone(garbage);
  Pieces pieces;
  for (const auto& [key, piece] : waiting_) pieces.emplace(key, copy_of(piece, /*on_host=*/true));
  for (const auto& plan : plans_) {
    plan->settle(counters);
    std::vector<Piece> parts = plan->split();
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i].owner.is_gone()) continue;
      pieces[plan->layout.spans[i].key] = copy_of(parts[i], /*on_host=*/true);
    }
  }
  return pieces;
}

double Store::residual_norm(const at::Tensor& counters, Garbage& garbage) {
  drop_the_gone(garbage);
  double squares = 0;
  const auto add = [&](const at::Tensor& residual) {
    const double norm = at::linalg_vector_norm(residual, 2, std::nullopt, false, at::kDouble).item<double>();
    squares += norm * norm;
  };
  for (const auto& [key, piece] : waiting_) add(piece.residual);
  for (const auto& plan : plans_) {
    plan->settle(counters);
    if (std::none_of(plan->owners.begin(), plan->owners.end(), [](const Owner& owner) { return owner.is_gone(); })) {
      add(plan->residual);
      continue;
    }
    for (const Piece& piece : plan->split()) {
      if (!piece.owner.is_gone()) add(piece.residual);
    }
  }
  return std::sqrt(squares);
}

void Store::multiply(double factor, bool feedback_too) {
  const auto scale = [&](auto& kept) {
    if (kept.residual.defined()) kept.residual.mul_(factor);
    if (kept.velocity.defined()) kept.velocity.mul_(factor);
    if (feedback_too && kept.feedback.defined()) kept.feedback.mul_(factor);
  };
  for (const auto& plan : plans_) scale(*plan);
  for (auto& [key, piece] : waiting_) scale(piece);
}

void Store::replace(Pieces pieces, Garbage& garbage) {
  garbage.plans = std::exchange(plans_, {});
  garbage.pieces.push_back(std::exchange(waiting_, std::move(pieces)));
}

void Store::clear(const std::vector<ParameterKey>& keys, const at::Tensor& counters) {
  const std::unordered_set<ParameterKey> wanted(keys.begin(), keys.end());
  for (const auto& plan : plans_) {
    const auto& spans = plan->layout.spans;
    if (std::none_of(spans.begin(), spans.end(), [&](const Span& span) { return wanted.contains(span.key); })) continue;
    plan->settle(counters);
    history_dropped += plan->forget();
    int64_t offset = 0;
    for (const Span& span : spans) {
      if (wanted.contains(span.key)) {
        plan->residual.narrow(0, offset, span.numel).zero_();
        if (plan->velocity.defined()) plan->velocity.narrow(0, offset, span.numel).zero_();
      }
      offset += span.numel;
    }
  }
  for (const ParameterKey key : keys) waiting_.erase(key);
}

}  // namespace regtopk
