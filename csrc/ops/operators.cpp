#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "../core/payload.h"
#include "checks.h"

namespace regtopk {
namespace {

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void compress_(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const CompressOptions& options, int64_t step, int64_t plan) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      int64_t, double, c10::string_view, int64_t, int64_t)>("regtopk::compress_");
  operation.call(gradient, residual, payload, sent, feedback, options.k, options.mu, options.distortion, step, plan);
}

void aggregate_(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback, const CompressOptions& options,
    int64_t rank, int64_t step, int64_t plan) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, int64_t, c10::string_view, int64_t, int64_t)>(
      "regtopk::aggregate_");
  operation.call(gradient, payloads, feedback, options.k, rank, options.distortion, step, plan);
}

void put_back_(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  static const auto operation = find_operator<void(const at::Tensor&, const at::Tensor&, at::ScalarType)>("regtopk::put_back_");
  operation.call(residual, payload, dtype);
}

at::Tensor encode(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan) {
  static const auto operation =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t)>("regtopk::encode");
  return operation.call(indices, values, numel, step, plan);
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype) {
  static const auto operation =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t, at::ScalarType)>("regtopk::decode");
  return operation.call(payload, numel, k, dtype);
}

int64_t payload_bytes(int64_t numel, int64_t k, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      k >= 1 && k <= numel && k <= int64_t{UINT32_MAX}, "payload_bytes: expected 1 <= k <= min(numel, 2^32 - 1), got k=", k,
      " and numel=", numel);
  return PayloadLayout(numel, k, value_type_of("payload_bytes", dtype)).bytes;
}

}  // namespace regtopk
