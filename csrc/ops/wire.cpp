// regtopk::to_wire_ and regtopk::from_wire_ on the CPU.
#include "../core/wire.h"

#include <torch/library.h>

#include <mutex>

#include "checks.h"

namespace regtopk {
namespace {

void to_wire_cpu(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& wire, at::ScalarType dtype, at::ScalarType wire_dtype,
    bool elias_fano, int64_t k, int64_t spans) {
  constexpr const char* who = "to_wire_";
  const auto [layout, wire_layout] = check_wire(who, residual.numel(), k, spans, dtype, {wire_dtype, elias_fano});
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_vector(who, "wire", wire, at::kByte, wire_layout.bytes);
  to_wire(
      layout, wire_layout, payload.mutable_data_ptr<uint8_t>(), residual.mutable_data_ptr(), wire.mutable_data_ptr<uint8_t>(),
      torch_parallel_for());
}

void from_wire_cpu(
    const at::Tensor& wire, const at::Tensor& payloads, at::ScalarType dtype, at::ScalarType wire_dtype, bool elias_fano, int64_t numel,
    int64_t k, int64_t spans) {
  constexpr const char* who = "from_wire_";
  const auto [layout, wire_layout] = check_wire(who, numel, k, spans, dtype, {wire_dtype, elias_fano});
  check_wire_rows(who, wire, wire_layout, payloads, layout);
  const int64_t workers = payloads.size(0);
  std::mutex mutex;
  int64_t rank = workers;
  PayloadError error;  // of the lowest rank that has one
  torch_parallel_for()(workers, [&, &layout = layout, &wire_layout = wire_layout](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      auto found = from_wire(
          layout, wire_layout, wire.const_data_ptr<uint8_t>() + row * wire_layout.bytes,
          payloads.mutable_data_ptr<uint8_t>() + row * layout.bytes);
      const std::lock_guard lock(mutex);
      if (found && row < rank) rank = row, error = std::move(*found);
    }
  });
  TORCH_CHECK_VALUE(
      rank == workers, who, ": expected ", error.field, " ", error.expected, " in the payload of rank ", rank, ", got ", error.got);
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("to_wire_", &to_wire_cpu);
  library.impl("from_wire_", &from_wire_cpu);
}

}  // namespace regtopk
