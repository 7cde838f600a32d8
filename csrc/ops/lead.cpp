// The operators of a support that a leader has chosen, on the CPU: regtopk::take_, average_slice_, spread_ and feedback_.
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <cstring>

#include "../core/lead.h"
#include "../core/spans.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

// Where each worker's row begins, and what lies behind its head.
struct Rows {
  std::vector<const uint8_t*> heads, slices;
};

Rows rows_of(const char* who, const at::Tensor& rows, int64_t head_bytes) {
  check_heads_and_slices(who, rows, head_bytes);
  Rows result;
  for (int64_t row = 0; row < rows.size(0); ++row) {
    result.heads.push_back(rows.const_data_ptr<uint8_t>() + row * rows.size(1));
    result.slices.push_back(result.heads.back() + head_bytes);
  }
  return result;
}

void take_cpu(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& lead, const at::Tensor& spans_tensor, const at::Tensor& idle,
    const std::optional<at::Tensor>&, at::ScalarType dtype, at::ScalarType wire_dtype, bool elias_fano, int64_t k, int64_t leader,
    int64_t step, int64_t plan) {
  constexpr const char* who = "take_";
  const int64_t numel = residual.numel(), span_count = check_spans(who, spans_tensor, numel);
  const auto [layout, wire] = check_wire(who, numel, k, span_count, dtype, {wire_dtype, elias_fano});
  check_vector(who, "residual", residual, accumulate_dtype(dtype), numel);
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_vector(who, "lead", lead, at::kByte, wire.bytes);
  check_flags(who, "idle", idle, span_count);
  uint8_t* const own = payload.mutable_data_ptr<uint8_t>();
  const Scratch decoded(layout.bytes);
  uint8_t* const led = decoded.array<uint8_t>();
  auto error = from_wire(layout, wire, lead.const_data_ptr<uint8_t>(), led);
  if (!error) error = check_payload(led, layout, torch_parallel_for());
  if (error) raise_payload_error(who, *error, leader);
  check_stamp(who, led, step, plan, leader);
  const PayloadView view(own, layout);
  const uint8_t* const was_idle = idle.const_data_ptr<uint8_t>();
  c10::SmallVector<uint8_t, 256> idle_now(span_count);
  for (int64_t span = 0; span < span_count; ++span) idle_now[span] = was_idle[span] != 0 && view.is_zero(span) ? 1 : 0;
  const ParkedSpans parked(
      residual.mutable_data_ptr(), static_cast<int64_t>(residual.element_size()), spans_of(spans_tensor), idle_now.data());
  take(PayloadView(led, layout), own, residual.mutable_data_ptr(), torch_parallel_for());
}

void average_slice_cpu(
    const at::Tensor& rows, const at::Tensor& averages, const std::optional<at::Tensor>&, at::ScalarType dtype, at::ScalarType wire_dtype,
    bool elias_fano, int64_t numel, int64_t k, int64_t spans, int64_t step, int64_t plan) {
  constexpr const char* who = "average_slice_";
  const auto [layout, wire] = check_wire(who, numel, k, spans, dtype, {wire_dtype, elias_fano});
  const auto [heads, slices] = rows_of(who, rows, wire.index_at);
  const int64_t entries = check_slice(who, rows, averages, layout, wire);
  for (size_t rank = 0; rank < heads.size(); ++rank) {
    if (const auto error = check_head(heads[rank], layout, wire)) raise_payload_error(who, *error, static_cast<int64_t>(rank));
  }
  check_heads(who, heads, spans > 0, step, plan);
  uint8_t* const out = averages.mutable_data_ptr<uint8_t>();
  const int64_t mark = step + 1;
  std::memset(out, 0, kMarkBytes);
  std::memcpy(out, &mark, sizeof mark);
  average_slice(heads, slices, layout.type, wire.type, entries, out + kMarkBytes);
}

// The averages [k] of all slices.
Scratch joined(const char* who, const at::Tensor& averages, const PayloadLayout& layout, int64_t workers, int64_t step) {
  check_averages(who, averages, layout, workers);
  const int64_t slice_bytes = averages.size(1) - kMarkBytes, bytes = layout.k * value_bytes(layout.type);
  Scratch values(bytes);
  for (int64_t rank = 0; rank < workers; ++rank) {
    const uint8_t* const row = averages.const_data_ptr<uint8_t>() + rank * averages.size(1);
    int64_t mark;
    std::memcpy(&mark, row, sizeof mark);
    if (mark != step + 1) {
      C10_THROW_ERROR(
          ValueError,
          c10::str(
              who, ": expected averages of step ", step, " of rank ", rank, ", got ",
              mark == 0 ? std::string("none: what it received was damaged, as its own error says") : c10::str("those of step ", mark - 1)));
    }
    const int64_t begin = std::min(rank * slice_bytes, bytes), end = std::min(begin + slice_bytes, bytes);
    std::memcpy(values.array<uint8_t>(begin), row + kMarkBytes, static_cast<size_t>(end - begin));
  }
  return values;
}

void spread_cpu(
    const at::Tensor& gradient, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages,
    const at::Tensor& spans_tensor, const at::Tensor& idle, const at::Tensor& verdict, const std::optional<at::Tensor>&, int64_t k,
    int64_t step, int64_t round) {
  constexpr const char* who = "spread_";
  const int64_t span_count = check_spans(who, spans_tensor, gradient.numel());
  const PayloadLayout layout = check_bucket(who, gradient, k, span_count);
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_flags(who, "idle", idle, span_count);
  check_verdict(who, verdict, round);
  const std::vector<const uint8_t*> heads = rows_of(who, rows, layout.tile_starts_at).heads;
  const Scratch values = joined(who, averages, layout, rows.size(0), step);
  // One worker's payload with the support of all and the averages as its values.
  const Scratch averaged(layout.bytes);
  uint8_t* const bytes = averaged.array<uint8_t>();
  std::memcpy(bytes, payload.const_data_ptr<uint8_t>(), layout.values_at);
  const PayloadHeader header = make_header(layout, static_cast<uint64_t>(step), 0);
  std::memcpy(bytes, &header, sizeof header);
  std::memcpy(bytes + layout.values_at, values.array<uint8_t>(), layout.k * value_bytes(layout.type));
  const AggregateArguments arguments{.layout = layout, .payloads = bytes, .workers = 1, .gradient = gradient.mutable_data_ptr()};
  if (!aggregate(arguments, torch_parallel_for())) make_void(verdict, round);
  uint8_t* const is_idle = idle.mutable_data_ptr<uint8_t>();
  for (int64_t span = 0; span < span_count; ++span) {
    is_idle[span] =
        std::all_of(heads.begin(), heads.end(), [&](const uint8_t* head) { return PayloadView(head, layout).is_zero(span); }) ? 1 : 0;
  }
  clear_idle_spans(arguments, spans_of(spans_tensor), is_idle);
}

void feedback_cpu(
    const at::Tensor& feedback, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages,
    const at::Tensor& spans_tensor, const at::Tensor& idle, at::ScalarType dtype, int64_t numel, c10::string_view distortion,
    int64_t step) {
  constexpr const char* who = "feedback_";
  const int64_t span_count = check_spans(who, spans_tensor, numel);
  const PayloadLayout layout(numel, feedback.numel(), value_type_of(who, dtype), span_count);
  check_vector(who, "feedback", feedback, accumulate_dtype(dtype), layout.k);
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_flags(who, "idle", idle, span_count);
  const std::vector<const uint8_t*> heads = rows_of(who, rows, layout.tile_starts_at).heads;
  const Scratch values = joined(who, averages, layout, rows.size(0), step);
  const AggregateArguments arguments{
      .layout = layout,
      .payloads = payload.const_data_ptr<uint8_t>(),
      .workers = 1,
      .feedback = feedback.mutable_data_ptr(),
      .feedback_workers = 1};
  feedback_of_averages(
      PayloadView(arguments.payloads, layout), values.array<uint8_t>(), contributors(heads), distortion_of(who, distortion),
      arguments.feedback);
  clear_idle_feedback(arguments, spans_of(spans_tensor), idle.const_data_ptr<uint8_t>());
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("take_", &take_cpu);
  library.impl("average_slice_", &average_slice_cpu);
  library.impl("spread_", &spread_cpu);
  library.impl("feedback_", &feedback_cpu);
}

}  // namespace regtopk
