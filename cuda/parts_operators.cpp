// Registers the kernels of parts between the ranks of a host; as operators.cpp.
#include <torch/library.h>

#include "../csrc/core/parts.h"
#include "operators.h"

namespace regtopk {
namespace {

const uint8_t* check_rows_on_device(const char* who, const at::Tensor& rows, const at::Device& device) {
  check_on_device(who, "rows", rows, device);
  TORCH_CHECK_VALUE(
      rows.size(1) % kAlignment == 0, who, ": expected rows of a multiple of ", kAlignment, " bytes on CUDA, got rows of ", rows.size(1),
      " bytes");
  check_aligned(who, "rows", rows.const_data_ptr());
  return rows.const_data_ptr<uint8_t>();
}

PartsLaunch check_parts_on_device(
    const char* who, const at::Tensor& parts, const at::Tensor& rows, const at::Tensor& gradient, int64_t step, int64_t plan) {
  const at::Device device = gradient.device();
  check_parts(who, parts, rows, gradient);
  check_countable(who, gradient.numel());
  check_span_count(who, parts.size(1) - 1);
  check_on_device(who, "parts", parts, device);
  check_rows_on_device(who, rows, device);
  check_aligned(who, "gradient", gradient.const_data_ptr());
  return {
      .type = value_type_of(who, gradient.scalar_type()),
      .numel = gradient.numel(),
      .ends = parts.const_data_ptr<int64_t>(),
      .parameters = parts.size(1) - 1,
      .ranks = rows.size(0),
      .row_bytes = rows.size(1),
      .step = static_cast<uint64_t>(step),
      .plan = static_cast<uint64_t>(plan)};
}

unsigned long long* statuses_of(const char* who, const char* name, const at::Tensor& statuses, const at::Device& device) {
  check_on_device(who, name, statuses, device);
  return reinterpret_cast<unsigned long long*>(statuses.mutable_data_ptr<int64_t>());
}

void split_cuda(
    const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor& parts, int64_t step, int64_t plan, double scale, int64_t deed) {
  constexpr const char* who = "split_";
  const SplitLaunch arguments{
      .parts = check_parts_on_device(who, parts, rows, gradient, step, plan),
      .gradient = gradient.const_data_ptr(),
      .rows = rows.mutable_data_ptr<uint8_t>(),
      .scale = scale,
      .deed = static_cast<uint64_t>(deed)};
  const c10::cuda::CUDAGuard guard(gradient.device());
  check_launched(who, launch_split(arguments, c10::cuda::getCurrentCUDAStream(gradient.device().index())));
}

void mean_cuda(
    const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype, int64_t step,
    int64_t plan, double scale, int64_t deed) {
  constexpr const char* who = "mean_";
  const at::Device device = rows.device();
  check_mean(who, rows, row, found, entries, dtype);
  check_on_device(who, "row", row, device);
  const MeanLaunch arguments{
      .type = value_type_of(who, dtype),
      .rows = check_rows_on_device(who, rows, device),
      .ranks = rows.size(0),
      .row_bytes = rows.size(1),
      .entries = entries,
      .step = static_cast<uint64_t>(step),
      .plan = static_cast<uint64_t>(plan),
      .scale = scale,
      .deed = static_cast<uint64_t>(deed),
      .row = row.mutable_data_ptr<uint8_t>(),
      .found = statuses_of(who, "found", found, device)};
  check_aligned(who, "row", arguments.row);
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_mean(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void join_cuda(
    const at::Tensor& rows, const at::Tensor& gradient, const at::Tensor& parts, const at::Tensor& verdict,
    const std::optional<at::Tensor>& status, int64_t step, int64_t plan, int64_t round) {
  constexpr const char* who = "join_";
  const at::Device device = gradient.device();
  const JoinLaunch arguments{
      .parts = check_parts_on_device(who, parts, rows, gradient, step, plan),
      .rows = rows.const_data_ptr<uint8_t>(),
      .gradient = gradient.mutable_data_ptr(),
      .verdict = entry_of(who, verdict, round, device),
      .round = round,
      .worst_status = worst_status_of(who, status, device)};
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_join(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void mark_unfilled_cuda(const at::Tensor& message, const at::Tensor& found, const std::optional<at::Tensor>& status) {
  constexpr const char* who = "mark_unfilled_";
  const at::Device device = message.device();
  check_mark(who, message, found, status);
  const MarkLaunch arguments{
      .message = message.mutable_data_ptr<uint8_t>(),
      .found = statuses_of(who, "found", found, device),
      .worst_status = status ? statuses_of(who, "status", *status, device) : nullptr};
  check_aligned(who, "message", arguments.message);
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_mark(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CUDA, library) {
  library.impl("split_", &split_cuda);
  library.impl("mean_", &mean_cuda);
  library.impl("join_", &join_cuda);
  library.impl("mark_unfilled_", &mark_unfilled_cuda);
}

}  // namespace regtopk
