#include "checks.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../core/deed.h"
#include "../core/lead.h"
#include "../core/parts.h"

#ifndef _OPENMP
#error "expected this file compiled with OpenMP, got without: at::parallel_for would run its body on one thread"
#endif

namespace regtopk {

ValueType value_type_of(const char* who, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return ValueType::kFloat64;
    case at::kFloat:
      return ValueType::kFloat32;
    case at::kBFloat16:
      return ValueType::kBFloat16;
    case at::kHalf:
      return ValueType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, who, ": expected gradients of dtype float64, float32, bfloat16 or float16, got ", c10::toString(dtype));
  }
}

at::ScalarType accumulate_dtype(at::ScalarType gradient_dtype) { return gradient_dtype == at::kDouble ? at::kDouble : at::kFloat; }

Distortion distortion_of(const char* who, c10::string_view name) {
  if (name == "previous") return Distortion::kPrevious;
  TORCH_CHECK_VALUE(name == "current", who, ": expected distortion 'previous' or 'current', got '", name, "'");
  return Distortion::kCurrent;
}

double checked_mu(const char* who, double mu) {
  TORCH_CHECK_VALUE(std::isfinite(mu) && mu > 0, who, ": expected a finite mu > 0, got mu=", mu);
  return mu;
}

double checked_decay(const char* who, double decay) {
  TORCH_CHECK_VALUE(decay > 0 && decay <= 1, who, ": expected 0 < decay <= 1, got decay=", decay);
  return decay;
}

Chunks checked_chunks(const char* who, const PayloadLayout& layout, int64_t chunk, int64_t chunk_k) {
  if (chunk == 0) return {};
  TORCH_CHECK_VALUE(
      chunk >= kSmallestChunk && kTileEntries % chunk == 0, who, ": expected a chunk of a power of two entries from ", kSmallestChunk,
      " to ", kTileEntries, ", got ", chunk);
  const int64_t rest = layout.numel % chunk, k_of_rest = layout.k - layout.numel / chunk * chunk_k;
  TORCH_CHECK_VALUE(
      chunk_k >= 1 && chunk_k <= chunk && k_of_rest <= rest && k_of_rest >= std::min<int64_t>(rest, 1), who, ": expected k=", layout.k,
      " to be chunk_k for each of ", layout.numel / chunk, " chunks and 1 to ", rest, " for the rest, got chunk_k=", chunk_k);
  return {chunk, chunk_k};
}

void check_vector(const char* who, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t numel) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == dtype, who, ": expected ", name, " of dtype ", c10::toString(dtype), ", got ",
      c10::toString(tensor.scalar_type()));
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.size(0) == numel && tensor.is_contiguous(), who, ": expected ", name, " contiguous with shape [", numel,
      "], got shape ", tensor.sizes(), " and strides ", tensor.strides());
}

PayloadLayout check_bucket(const char* who, const at::Tensor& gradient, int64_t k, int64_t spans) {
  const ValueType type = value_type_of(who, gradient.scalar_type());
  check_vector(who, "gradient", gradient, gradient.scalar_type(), gradient.numel());
  TORCH_CHECK_VALUE(
      k >= 1 && k <= gradient.numel() && k <= int64_t{UINT32_MAX}, who, ": expected 1 <= k <= min(", gradient.numel(),
      " gradient entries, 2^32 - 1), got k=", k);
  return PayloadLayout(gradient.numel(), k, type, spans);
}

int64_t check_spans(const char* who, const std::optional<at::Tensor>& spans, int64_t numel) {
  if (!spans) return 0;
  check_vector(who, "spans", *spans, at::kLong, spans->numel());
  TORCH_CHECK_VALUE(spans->numel() >= 2, who, ": expected spans of at least one parameter, got ", spans->numel() - 1);
  if (spans->is_cpu()) {
    const int64_t* const offsets = spans->const_data_ptr<int64_t>();
    const int64_t count = spans->numel() - 1;
    TORCH_CHECK_VALUE(
        offsets[0] == 0 && offsets[count] == numel && std::is_sorted(offsets, offsets + count + 1), who,
        ": expected spans ascending from 0 to ", numel, ", got others");
  }
  return spans->numel() - 1;
}

void check_flags(const char* who, const char* name, const at::Tensor& flags, int64_t spans) {
  check_vector(who, name, flags, at::kByte, spans);
}

void check_verdict(const char* who, const at::Tensor& verdict, int64_t round) {
  check_vector(who, "verdict", verdict, at::kLong, kVerdictRounds);
  TORCH_CHECK_VALUE(round >= -1, who, ": expected a round of at least -1, got ", round);
}

void check_counters(const char* who, const at::Tensor& counters) { check_vector(who, "counters", counters, at::kLong, 3); }

void check_rows(const char* who, const char* name, const at::Tensor& rows, int64_t bytes) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, who, ": expected ", name, " of dtype Byte, got ", c10::toString(rows.scalar_type()));
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && rows.size(0) >= 1 && rows.size(1) == bytes && rows.is_contiguous(), who, ": expected ", name,
      " contiguous with shape [workers, ", bytes, "], got shape ", rows.sizes());
}

ValueType wire_type_of(const char* who, at::ScalarType dtype) {
  if (dtype == at::ScalarType::Bits1x8) return ValueType::kSign;
  return dtype == at::ScalarType::Bits2x4 ? ValueType::kTwoBits : value_type_of(who, dtype);
}

std::pair<PayloadLayout, WireLayout> check_wire(
    const char* who, int64_t numel, int64_t k, int64_t spans, at::ScalarType dtype, const Wire& wire) {
  const ValueType type = value_type_of(who, dtype), wire_type = wire_type_of(who, wire.dtype);
  TORCH_CHECK_VALUE(
      k >= 1 && k <= numel && k <= int64_t{UINT32_MAX} && spans >= 0, who, ": expected 1 <= k <= min(", numel,
      " gradient entries, 2^32 - 1) and spans >= 0, got k=", k, " and spans=", spans);
  TORCH_CHECK_VALUE(
      wire_type == type || c10::elementSize(wire.dtype) < c10::elementSize(dtype), who, ": expected a wire_dtype that is ",
      c10::toString(dtype), " or has fewer bytes, got ", c10::toString(wire.dtype));
  const PayloadLayout layout(numel, k, type, spans);
  return {layout, WireLayout::of(layout, wire_type, wire.elias_fano)};
}

void check_wire_rows(
    const char* who, const at::Tensor& wire, const WireLayout& wire_layout, const at::Tensor& payloads, const PayloadLayout& layout) {
  check_rows(who, "wire", wire, wire_layout.bytes);
  check_rows(who, "payloads", payloads, layout.bytes);
  TORCH_CHECK_VALUE(
      wire.size(0) == payloads.size(0), who, ": expected wire of as many workers as payloads, ", payloads.size(0), ", got ", wire.size(0));
}

void check_feedback_rows(
    const char* who, const at::Tensor& feedback, at::ScalarType accumulate, const PayloadLayout& layout, int64_t rank, int64_t workers) {
  TORCH_CHECK_TYPE(
      feedback.scalar_type() == accumulate, who, ": expected feedback of dtype ", c10::toString(accumulate), ", got ",
      c10::toString(feedback.scalar_type()));
  TORCH_CHECK_VALUE(
      feedback.dim() == 2 && feedback.size(1) == layout.k && feedback.is_contiguous(), who,
      ": expected feedback contiguous with shape [workers fed back, ", layout.k, "], got shape ", feedback.sizes());
  TORCH_CHECK_VALUE(
      rank >= 0 && rank + feedback.size(0) <= workers, who, ": expected feedback for ranks below ", workers, ", got ranks ", rank, " to ",
      rank + feedback.size(0) - 1);
}

void check_heads_and_slices(const char* who, const at::Tensor& rows, int64_t head_bytes) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, who, ": expected rows of dtype Byte, got ", c10::toString(rows.scalar_type()));
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && rows.size(0) >= 1 && rows.size(1) >= head_bytes && rows.is_contiguous(), who,
      ": expected rows contiguous with shape [workers, at least ", head_bytes, "], got shape ", rows.sizes());
}

int64_t check_slice(
    const char* who, const at::Tensor& rows, const at::Tensor& averages, const PayloadLayout& layout, const WireLayout& wire) {
  check_heads_and_slices(who, rows, wire.index_at);
  check_vector(who, "averages", averages, at::kByte, averages.numel());
  const int64_t entries = (rows.size(1) - wire.index_at) / value_bytes(wire.type), bytes = kMarkBytes + entries * value_bytes(layout.type);
  TORCH_CHECK_VALUE(
      averages.numel() == bytes, who, ": expected averages of ", bytes, " bytes for ", entries, " entries, got ", averages.numel());
  return entries;
}

void check_averages(const char* who, const at::Tensor& averages, const PayloadLayout& layout, int64_t workers) {
  TORCH_CHECK_TYPE(averages.scalar_type() == at::kByte, who, ": expected averages of dtype Byte, got ", averages.scalar_type());
  TORCH_CHECK_VALUE(
      averages.dim() == 2 && averages.size(0) == workers && averages.is_contiguous() &&
          (averages.size(1) - kMarkBytes) / value_bytes(layout.type) * workers >= layout.k,
      who, ": expected averages contiguous with a row for each of ", workers, " workers that hold ", layout.k, " together, got shape ",
      averages.sizes());
}

void check_parts(const char* who, const at::Tensor& parts, const at::Tensor& rows, const at::Tensor& gradient) {
  value_type_of(who, gradient.scalar_type());
  check_vector(who, "gradient", gradient, gradient.scalar_type(), gradient.numel());
  check_heads_and_slices(who, rows, kPartHeadBytes);
  TORCH_CHECK_TYPE(parts.scalar_type() == at::kLong, who, ": expected parts of dtype Long, got ", c10::toString(parts.scalar_type()));
  TORCH_CHECK_VALUE(
      parts.dim() == 2 && parts.size(0) == 1 + rows.size(0) && parts.size(1) >= 2 && parts.is_contiguous(), who,
      ": expected parts contiguous with shape [", 1 + rows.size(0), ", parameters + 1], got shape ", parts.sizes());
}

void check_mean(
    const char* who, const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype) {
  check_heads_and_slices(who, rows, kPartHeadBytes);
  check_vector(who, "row", row, at::kByte, rows.size(1));
  check_vector(who, "found", found, at::kLong, 2);
  value_type_of(who, dtype);
  TORCH_CHECK_VALUE(
      entries >= 0 && entries <= (rows.size(1) - kPartHeadBytes) / static_cast<int64_t>(c10::elementSize(dtype)), who,
      ": expected rows of at least ", entries, " entries, got rows of ", rows.size(1), " bytes");
}

void check_mark(const char* who, const at::Tensor& message, const at::Tensor& found, const std::optional<at::Tensor>& status) {
  check_vector(who, "message", message, at::kByte, message.numel());
  TORCH_CHECK_VALUE(
      message.numel() >= static_cast<int64_t>(sizeof(PayloadHeader)), who, ": expected a message of at least ", sizeof(PayloadHeader),
      " bytes, got ", message.numel());
  check_vector(who, "found", found, at::kLong, 2);
  if (status) check_vector(who, "status", *status, at::kLong, 2);
}

PayloadLayout check_own_payload(const char* who, const char* name, const at::Tensor& payload, int64_t numel, ValueType type, bool trusted) {
  check_vector(who, name, payload, at::kByte, payload.numel());
  PayloadHeader header{};
  TORCH_CHECK_VALUE(
      payload.numel() >= static_cast<int64_t>(sizeof header), who, ": expected ", name, " of at least ", sizeof header, " bytes, got ",
      payload.numel());
  std::memcpy(&header, payload.const_data_ptr<uint8_t>(), sizeof header);
  TORCH_CHECK_VALUE(
      header.k >= 1 && header.k <= static_cast<uint64_t>(numel) && header.k <= UINT32_MAX, who, ": expected a ", name, " that holds 1 to ",
      numel, " entries, got ", header.k);
  const PayloadLayout layout(numel, static_cast<int64_t>(header.k), type, header.spans);
  TORCH_CHECK_VALUE(
      payload.numel() == layout.bytes, who, ": expected ", name, " of ", layout.bytes, " bytes for ", layout.k, " of ", numel,
      " entries, got ", payload.numel());
  if (trusted) return layout;
  if (const auto error = check_payload(payload.const_data_ptr<uint8_t>(), layout, torch_parallel_for())) {
    TORCH_CHECK_VALUE(false, who, ": expected ", error->field, " ", error->expected, " in ", name, ", got ", error->got);
  }
  return layout;
}

void raise_payload_error(const char* who, const PayloadError& error, int64_t rank) {
  // Zeros are what a rank sends that can't go on with a step, so that nobody waits for it.
  const char* const why = error.field == "magic" && error.got == "0" ? ", as a rank sends that has an error of its own"
                          : error.field == "plan" ? ": it sent another bucket; make the same calls in the same order on every rank"
                                                  : "";
  C10_THROW_ERROR(
      ValueError,
      c10::str(who, ": expected ", error.field, " ", error.expected, " in the payload of rank ", rank, ", got ", error.got, why));
}

void check_heads(const char* who, const std::vector<const uint8_t*>& heads, bool have_exchange_parts, int64_t step, int64_t plan) {
  const auto part_of = [&](size_t rank) {
    ExchangePart part;
    std::memcpy(&part, heads[rank] + sizeof(PayloadHeader), sizeof part);
    return part;
  };
  for (size_t rank = 1; have_exchange_parts && rank < heads.size(); ++rank) {
    const ExchangePart first = part_of(0), other = part_of(rank);
    TORCH_CHECK_VALUE(
        first.deed == other.deed, who, ": expected every rank to have made the same calls of ", kDeeds, ", got ", describe_deed(first.deed),
        " on rank 0 and ", describe_deed(other.deed), " on rank ", rank, "; make the call on every rank");
    TORCH_CHECK_VALUE(
        first.scale == other.scale, who, ": expected the same gradient scale on every rank, got ", first.scale, " on rank 0 and ",
        other.scale, " on rank ", rank, "; give every rank's state a GradScaler with the same arguments, or none");
  }
  for (size_t rank = 0; rank < heads.size(); ++rank) check_stamp(who, heads[rank], step, plan, static_cast<int64_t>(rank));
}

void check_stamp(const char* who, const uint8_t* head, int64_t step, int64_t plan, int64_t rank) {
  PayloadHeader header;
  std::memcpy(&header, head, sizeof header);
  const auto expect = [&](const char* field, int64_t expected, uint64_t got) {
    if (got == static_cast<uint64_t>(expected)) return;
    raise_payload_error(who, {field, std::to_string(expected), std::to_string(static_cast<int64_t>(got))}, rank);
  };
  expect("step", step, header.step);
  expect("plan", plan, header.plan);
}

void make_void(const at::Tensor& verdict, int64_t round) {
  if (round < 0) return;
  // Rounds only grow.
  std::atomic_ref(verdict.mutable_data_ptr<int64_t>()[round % kVerdictRounds]).store(round, std::memory_order_relaxed);
}

ParallelFor torch_parallel_for() {
  return [](int64_t count, const std::function<void(int64_t, int64_t)>& body) { at::parallel_for(0, count, 1, body); };
}

}  // namespace regtopk
