// The tensor contracts of the operators, in one place. Each failed check is an error of the form
// `<who>: expected <condition>, got <value>[; <what to do>]`.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../core/parallel.h"
#include "../core/payload.h"
#include "../core/score.h"

namespace regtopk {

// The value type of a gradient; TypeError for integer, boolean, complex and other types.
ValueType value_type_of(const char* who, at::ScalarType dtype);
// The dtype of the residual, the score and the sum: fp64 for fp64 gradients, else fp32.
at::ScalarType accumulate_dtype(at::ScalarType gradient_dtype);
Distortion distortion_of(const char* who, c10::string_view name);
double checked_mu(const char* who, double mu);

// A contiguous, one-dimensional tensor of a dtype and a number of entries.
void check_vector(const char* who, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t numel);
// A contiguous gradient bucket of a supported dtype, not empty; returns the layout of its payload.
PayloadLayout check_bucket(const char* who, const at::Tensor& gradient, int64_t k);
// The payloads of all workers, one a row.
void check_payloads(const char* who, const at::Tensor& payloads, const PayloadLayout& layout);
// Rows of feedback for the entries of ranks rank … rank + rows - 1 of `workers`.
void check_feedback_rows(
    const char* who, const at::Tensor& feedback, at::ScalarType accumulate, const PayloadLayout& layout, int64_t rank, int64_t workers);
// A payload of the bucket that `layout` describes, of any k: the layout that its own header gives. Reads all of it.
PayloadLayout check_own_payload(const char* who, const char* name, const at::Tensor& payload, int64_t numel, ValueType type);

// at::parallel_for, one tile a grain: torch.set_num_threads threads, the calling one among them.
ParallelFor torch_parallel_for();

}  // namespace regtopk
