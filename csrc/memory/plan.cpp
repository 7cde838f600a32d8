#include "plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <c10/util/strides.h>

#include <utility>

namespace regtopk {

std::optional<at::Tensor> optional(const at::Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

void reserve(at::Tensor& tensor, at::IntArrayRef shape, const at::TensorOptions& options) {
  if (tensor.defined() && tensor.sizes() == shape) return;
  const int64_t entries = c10::multiply_integers(shape);
  const bool fits =
      tensor.defined() && static_cast<int64_t>(tensor.storage().nbytes()) >= entries * static_cast<int64_t>(tensor.element_size());
  tensor = fits ? tensor.as_strided(shape, c10::contiguous_strides(shape)) : at::empty(shape, options);
}

void Plan::set_message(int64_t k, const Wire& wire) {
  if (k == k_ && wire == wire_) return;
  k_ = k;
  wire_ = wire;
  const int64_t spans = static_cast<int64_t>(layout.spans.size());
  payload_bytes_ = regtopk::payload_bytes(numel, k, layout.dtype, spans);
  message_bytes_ = message_bytes_of(k, wire);
  // Where a code of the places would not be shorter there is none, and values as they are make it the payload.
  const auto values_at = [&](const Wire& form) { return message_parts(numel, k, layout.dtype, spans, form).values_at; };
  has_wire_form_ = wire.dtype != layout.dtype || values_at(wire) != values_at({wire.dtype, false});
}

int64_t Plan::message_bytes_of(int64_t k, const Wire& wire) const {
  return regtopk::wire_bytes(numel, k, layout.dtype, static_cast<int64_t>(layout.spans.size()), wire);
}

at::Tensor Plan::next_payload() {
  at::Tensor& payload = payloads_[sent.defined() && sent.is_same(payloads_[0]) ? 1 : 0];
  reserve(payload, {payload_bytes_}, residual.options().dtype(at::kByte));
  return payload;
}

void Plan::set_applied(std::vector<uint8_t> flags) {
  if (!applied_.defined() || flags != applied_flags_) {
    applied_flags_ = std::move(flags);
    const at::Tensor on_host = at::tensor(applied_flags_, at::kByte);
    applied_ = layout.device.is_cpu() ? on_host : on_host.pin_memory().to(layout.device, /*non_blocking=*/true);
  }
  applied = applied_;
}

void Plan::remember(const at::Tensor& payload, const at::Tensor& feedback_of_payload, int64_t in_round) {
  retire(sent);
  retire(feedback);
  sent = payload;
  sent_k = k_;
  sent_all = is_dense();
  feedback = feedback_of_payload;
  sent_round = in_round;
  applied.reset();
  to_mask_ = masks && !sent_all;  // what is dense keeps its momentum, as Deep Gradient Compression does it
}

void Plan::mask() {
  if (std::exchange(to_mask_, false) && !in_vain) mask_(velocity, sent, shared, optional(applied), layout.dtype, sent_round);
}

int64_t Plan::forget() {
  mask();
  in_vain = false;
  sent_round = -1;
  applied.reset();
  retire(feedback);
  if (!sent.defined()) return 0;
  retire(sent);
  const int64_t entries = std::exchange(sent_k, 0);
  return std::exchange(sent_all, false) ? 0 : entries;
}

void Plan::settle(const at::Tensor& counters) {
  if (!sent.defined()) return;
  if (in_vain) {
    put_back_(residual, sent, layout.dtype);
    shared.idle.zero_();
    forget();
    return;
  }
  settle_(residual, sent, shared, optional(applied), counters, layout.dtype, sent_round);
  if (is_void(shared.verdict, sent_round)) forget();
}

std::vector<Piece> Plan::split() const {
  const at::Tensor ends = shared.spans.cpu();
  at::Tensor indices, values, bounds;
  if (sent.defined() && !sent_all) {
    std::tie(indices, values) = decode(sent, numel, sent_k, layout.dtype);
    bounds = at::searchsorted(indices, shared.spans).cpu();
  }
  // Of a copy: the step may yet be said to be skipped.
  at::Tensor masked = to_mask_ ? velocity.clone() : velocity;
  if (to_mask_) mask_(masked, sent, shared, optional(applied), layout.dtype, sent_round);
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < static_cast<int64_t>(layout.spans.size()); ++i) {
    const int64_t begin = ends[i].item<int64_t>();
    Piece piece;
    piece.owner = owners[i];
    piece.residual = residual.narrow(0, begin, layout.spans[i].numel);
    if (masked.defined()) piece.velocity = masked.narrow(0, begin, layout.spans[i].numel);
    piece.idle = shared.idle.narrow(0, i, 1);
    if (indices.defined()) {
      const int64_t first = bounds[i].item<int64_t>(), last = bounds[i + 1].item<int64_t>();
      piece.sent_index = indices.slice(0, first, last).sub(begin);
      piece.sent_value = values.slice(0, first, last);
      if (feedback.defined()) piece.feedback = feedback.slice(0, first, last);
    }
    pieces.push_back(std::move(piece));
  }
  return pieces;
}

}  // namespace regtopk
