// Registers the kernels of a support that a leader has chosen, and of buckets that send all their entries; as operators.cpp.
#include <torch/library.h>

#include "../csrc/core/lead.h"
#include "operators.h"

namespace regtopk {
namespace {

// What spread_ and feedback_ are given of all workers.
AveragesLaunch check_received(
    const char* who, const at::Tensor& rows, const at::Tensor& averages, const PayloadLayout& layout, int64_t step,
    const at::Device& device) {
  check_heads_and_slices(who, rows, layout.tile_starts_at);
  check_averages(who, averages, layout, rows.size(0));
  check_on_device(who, "rows", rows, device);
  check_on_device(who, "averages", averages, device);
  const int64_t entries = (averages.size(1) - kMarkBytes) / value_bytes(layout.type);
  TORCH_CHECK_VALUE(
      entries % 4 == 0 && kMarkBytes + entries * value_bytes(layout.type) == averages.size(1), who,
      ": expected averages of a multiple of 4 entries on CUDA, got rows of ", averages.size(1), " bytes");
  const AveragesLaunch received{
      .rows = rows.const_data_ptr<uint8_t>(),
      .averages = averages.const_data_ptr<uint8_t>(),
      .workers = rows.size(0),
      .row_bytes = rows.size(1),
      .averages_bytes = averages.size(1),
      .step = static_cast<uint64_t>(step)};
  TORCH_CHECK_VALUE(
      received.row_bytes % 8 == 0, who, ": expected rows of a multiple of 8 bytes on CUDA, got rows of ", received.row_bytes, " bytes");
  check_aligned(who, "rows", received.rows);
  check_aligned(who, "averages", received.averages);
  return received;
}

const uint8_t* check_payload_on_device(const char* who, const at::Tensor& payload, const PayloadLayout& layout, const at::Device& device) {
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_on_device(who, "payload", payload, device);
  check_aligned(who, "payload", payload.const_data_ptr());
  return payload.const_data_ptr<uint8_t>();
}

const int64_t* check_span_tensors(
    const char* who, const at::Tensor& spans, const at::Tensor& idle, const PayloadLayout& layout, const at::Device& device) {
  check_flags(who, "idle", idle, layout.spans);
  check_on_device(who, "spans", spans, device);
  check_on_device(who, "idle", idle, device);
  return spans.const_data_ptr<int64_t>();
}

void take_cuda(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& lead, const at::Tensor& spans, const at::Tensor& idle,
    const std::optional<at::Tensor>& status, at::ScalarType dtype, at::ScalarType wire_dtype, bool elias_fano, int64_t k, int64_t leader,
    int64_t step, int64_t plan) {
  constexpr const char* who = "take_";
  const int64_t numel = residual.numel();
  const at::Device device = residual.device();
  check_countable(who, numel);
  const auto [layout, wire] = check_wire(who, numel, k, count_spans(who, spans, numel), dtype, {wire_dtype, elias_fano});
  check_vector(who, "residual", residual, accumulate_dtype(dtype), numel);
  check_payload_on_device(who, payload, layout, device);
  check_vector(who, "lead", lead, at::kByte, wire.bytes);
  check_on_device(who, "lead", lead, device);
  check_aligned(who, "lead", lead.const_data_ptr());
  TakeLaunch arguments{
      .layout = layout,
      .wire = wire,
      .lead = lead.const_data_ptr<uint8_t>(),
      .leader = leader,
      .step = static_cast<uint64_t>(step),
      .plan = static_cast<uint64_t>(plan),
      .payload = payload.mutable_data_ptr<uint8_t>(),
      .residual = residual.mutable_data_ptr(),
      .span_ends = check_span_tensors(who, spans, idle, layout, device),
      .idle = idle.const_data_ptr<uint8_t>(),
      .worst_status = worst_status_of(who, status, device)};
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  const at::Tensor room = room_for(take_room_bytes(layout, wire), device);
  arguments.room = room.mutable_data_ptr();
  aggregate_workspaces().with(who, stream, aggregate_workspace_bytes(layout), kAggregateZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_take(arguments, stream);
  });
}

void average_slice_cuda(
    const at::Tensor& rows, const at::Tensor& averages, const std::optional<at::Tensor>& status, at::ScalarType dtype,
    at::ScalarType wire_dtype, bool elias_fano, int64_t numel, int64_t k, int64_t spans, int64_t step, int64_t plan) {
  constexpr const char* who = "average_slice_";
  const at::Device device = rows.device();
  check_countable(who, numel);
  check_span_count(who, spans);
  const auto [layout, wire] = check_wire(who, numel, k, spans, dtype, {wire_dtype, elias_fano});
  check_slice(who, rows, averages, layout, wire);
  check_on_device(who, "averages", averages, device);
  TORCH_CHECK_VALUE(
      !wire.has_levels() && rows.size(1) % 8 == 0, who,
      ": expected rows of a multiple of 8 bytes with values of 16 bits or more on CUDA, got rows of ", rows.size(1), " bytes");
  const AverageSliceLaunch arguments{
      .layout = layout,
      .wire = wire,
      .rows = rows.const_data_ptr<uint8_t>(),
      .workers = rows.size(0),
      .row_bytes = rows.size(1),
      .step = static_cast<uint64_t>(step),
      .plan = static_cast<uint64_t>(plan),
      .averages = averages.mutable_data_ptr<uint8_t>(),
      .worst_status = worst_status_of(who, status, device)};
  check_aligned(who, "rows", arguments.rows);
  check_aligned(who, "averages", arguments.averages);
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_average_slice(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void spread_cuda(
    const at::Tensor& gradient, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const at::Tensor& spans,
    const at::Tensor& idle, const at::Tensor& verdict, const std::optional<at::Tensor>& status, int64_t k, int64_t step, int64_t round) {
  constexpr const char* who = "spread_";
  const at::Device device = gradient.device();
  check_countable(who, gradient.numel());
  const PayloadLayout layout = check_bucket(who, gradient, k, count_spans(who, spans, gradient.numel()));
  SpreadLaunch arguments{
      .layout = layout,
      .received = check_received(who, rows, averages, layout, step, device),
      .payload = check_payload_on_device(who, payload, layout, device),
      .gradient = gradient.mutable_data_ptr(),
      .span_ends = check_span_tensors(who, spans, idle, layout, device),
      .idle = idle.mutable_data_ptr<uint8_t>(),
      .verdict = entry_of(who, verdict, round, device),
      .round = round,
      .worst_status = worst_status_of(who, status, device)};
  check_aligned(who, "gradient", arguments.gradient);
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  const at::Tensor room = room_for(spread_room_bytes(layout), device);
  arguments.room = room.mutable_data_ptr();
  aggregate_workspaces().with(who, stream, aggregate_workspace_bytes(layout), kAggregateZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_spread(arguments, stream);
  });
}

void feedback_cuda(
    const at::Tensor& feedback, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const at::Tensor& spans,
    const at::Tensor& idle, at::ScalarType dtype, int64_t numel, c10::string_view distortion, int64_t step) {
  constexpr const char* who = "feedback_";
  const at::Device device = feedback.device();
  check_countable(who, numel);
  const PayloadLayout layout(numel, feedback.numel(), value_type_of(who, dtype), count_spans(who, spans, numel));
  check_vector(who, "feedback", feedback, accumulate_dtype(dtype), layout.k);
  const FeedbackLaunch arguments{
      .layout = layout,
      .received = check_received(who, rows, averages, layout, step, device),
      .payload = check_payload_on_device(who, payload, layout, device),
      .span_ends = check_span_tensors(who, spans, idle, layout, device),
      .idle = idle.const_data_ptr<uint8_t>(),
      .distortion = distortion_of(who, distortion),
      .feedback = feedback.mutable_data_ptr()};
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_feedback(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CUDA, library) {
  library.impl("take_", &take_cuda);
  library.impl("average_slice_", &average_slice_cuda);
  library.impl("spread_", &spread_cuda);
  library.impl("feedback_", &feedback_cuda);
}

}  // namespace regtopk
