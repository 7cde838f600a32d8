// The tensor contracts of the operators, in one place. Each failed check is an error of the form
// `<who>: expected <condition>, got <value>[; <what to do>]`.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/compress.h"
#include "../core/parallel.h"
#include "../core/payload.h"
#include "../core/score.h"
#include "../core/spans.h"
#include "../core/wire.h"
#include "operators.h"

namespace regtopk {

// The value type of a gradient; TypeError for integer, boolean, complex and other types.
ValueType value_type_of(const char* who, at::ScalarType dtype);
// The dtype of the residual, the score and the sum: fp64 for fp64 gradients, else fp32.
at::ScalarType accumulate_dtype(at::ScalarType gradient_dtype);
Distortion distortion_of(const char* who, c10::string_view name);
double checked_mu(const char* who, double mu);
double checked_decay(const char* who, double decay);
Chunks checked_chunks(const char* who, const PayloadLayout& layout, int64_t chunk, int64_t chunk_k);

// A contiguous, one-dimensional tensor of a dtype and a number of entries.
void check_vector(const char* who, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t numel);
// A contiguous gradient bucket of a supported dtype, not empty; returns the layout of its payload.
PayloadLayout check_bucket(const char* who, const at::Tensor& gradient, int64_t k, int64_t spans = 0);
// The ends of a bucket's parameters, or none. Only their number where the tensor is not on the CPU.
int64_t check_spans(const char* who, const std::optional<at::Tensor>& spans, int64_t numel);
// The small tensors of a bucket with spans; their dtypes and shapes are checked.
void check_flags(const char* who, const char* name, const at::Tensor& flags, int64_t spans);
void check_verdict(const char* who, const at::Tensor& verdict, int64_t round);
void check_counters(const char* who, const at::Tensor& counters);
// What all workers have sent, one a row.
void check_rows(const char* who, const char* name, const at::Tensor& rows, int64_t bytes);
// The same of what travels, which may have one bit, torch.bits1x8, or two, torch.bits2x4.
ValueType wire_type_of(const char* who, at::ScalarType dtype);
// Where a payload and its wire form have their parts. The wire's dtype is the gradients' or has fewer bytes.
std::pair<PayloadLayout, WireLayout> check_wire(
    const char* who, int64_t numel, int64_t k, int64_t spans, at::ScalarType dtype, const Wire& wire);
// As many rows of one as of the other.
void check_wire_rows(
    const char* who, const at::Tensor& wire, const WireLayout& wire_layout, const at::Tensor& payloads, const PayloadLayout& layout);
// A head and a slice of the values of each worker, one a row.
void check_heads_and_slices(const char* who, const at::Tensor& rows, int64_t head_bytes);
// And room for the averages of these slices; returns their entries.
int64_t check_slice(
    const char* who, const at::Tensor& rows, const at::Tensor& averages, const PayloadLayout& layout, const WireLayout& wire);
// The averages of the slices of all workers, one a row.
void check_averages(const char* who, const at::Tensor& averages, const PayloadLayout& layout, int64_t workers);
// Rows of parts and the table of where they lie: core/parts.h.
void check_parts(const char* who, const at::Tensor& parts, const at::Tensor& rows, const at::Tensor& gradient);
// As many entries in each of the rows as in the row of their mean, and what is found wrong with them.
void check_mean(
    const char* who, const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype);
void check_mark(const char* who, const at::Tensor& message, const at::Tensor& found, const std::optional<at::Tensor>& status);
// Rows of feedback for the entries of ranks rank … rank + rows - 1 of `workers`.
void check_feedback_rows(
    const char* who, const at::Tensor& feedback, at::ScalarType accumulate, const PayloadLayout& layout, int64_t rank, int64_t workers);
// A payload of a bucket, of any k and any spans: the layout that its own header gives. Reads all of it, unless it is trusted
// to be as compress_ or encode wrote it.
PayloadLayout check_own_payload(
    const char* who, const char* name, const at::Tensor& payload, int64_t numel, ValueType type, bool trusted = false);

// Raises what is wrong with what that rank has sent.
[[noreturn]] void raise_payload_error(const char* who, const PayloadError& error, int64_t rank);
// Raises unless the heads of all ranks' messages, valid each by itself, are of this step of this plan, and their exchange parts, if
// they have any, say the same.
void check_heads(const char* who, const std::vector<const uint8_t*>& heads, bool have_exchange_parts, int64_t step, int64_t plan);
// Raises unless the head of that rank's message is of this step of this plan.
void check_stamp(const char* who, const uint8_t* head, int64_t step, int64_t plan, int64_t rank);
// Says on the host that a round is void: by any thread, of this state or of one that shares the verdict.
void make_void(const at::Tensor& verdict, int64_t round);

// Where the parts of a bucket lie, as check_spans has found them right.
inline Spans spans_of(const at::Tensor& spans) { return {spans.const_data_ptr<int64_t>(), spans.numel() - 1}; }

// at::parallel_for, one tile a grain: torch.set_num_threads threads, the calling one among them.
ParallelFor torch_parallel_for();

}  // namespace regtopk
