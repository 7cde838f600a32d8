// The operators as C++ functions, called through the dispatcher so that each tensor's device picks the implementation.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../core/cpu_variant.h"

namespace regtopk {

struct CompressOptions {
  int64_t k;
  double mu;
  std::string distortion;
};

void compress_(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const CompressOptions& options, int64_t step, int64_t plan);
void aggregate_(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback, const CompressOptions& options,
    int64_t rank, int64_t step, int64_t plan);
void put_back_(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype);
at::Tensor encode(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan);
std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype);

// Bytes of the payload that k entries of a bucket of numel gradients of that dtype take.
int64_t payload_bytes(int64_t numel, int64_t k, at::ScalarType dtype);

// For tests: until the next call, compress_ on the CPU takes these score keys as its bracket instead of sampling one.
void force_bracket(std::optional<std::pair<uint32_t, uint32_t>> keys);

}  // namespace regtopk
