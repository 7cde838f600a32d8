// The operators as C++ functions, called through the dispatcher so that each tensor's device picks the implementation.
// What they do to which tensor is said beside the schemas, in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../core/parts.h"

namespace regtopk {

// What of the selection does not change from step to step.
struct Selection {
  int64_t k;
  double mu, decay;
  const std::string& distortion;
  int64_t chunk, chunk_k;  // entries that select by themselves, and how many each; 0: all
};

// The small tensors that the stages of a bucket share.
struct Shared {
  at::Tensor spans, idle, verdict;
};

// The form in which payloads travel: core/wire.h.
struct Wire {
  at::ScalarType dtype;  // of the values
  bool elias_fano;
  bool operator==(const Wire&) const = default;
};

// What a gradient becomes before it is added to the residual.
struct Correction {
  double momentum;      // the velocity u = momentum u + g is given instead of g; 0: g is
  bool nesterov;        // g + momentum u is
  double largest_norm;  // of g, which is scaled down to it first; 0: any
};

// Which step of which plan a payload belongs to; see compress.h and core/deed.h.
struct Stamp {
  int64_t step, plan, round;
  double scale;
  uint64_t deed;
};

void compress_(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const Shared& shared, const std::optional<at::Tensor>& applied, const at::Tensor& counters,
    const Selection& selection, const Stamp& stamp, int64_t sent_round, bool choose = true);
void aggregate_(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback, const Shared& shared,
    const std::optional<at::Tensor>& status, const Selection& selection, const Stamp& stamp, int64_t rank);
// Writes to `squared_norm`, [1] of fp64, the squared 2-norm of a gradient that is 0 outside the entries of these payloads, which were
// checked: the same bits on every device and for any number of threads. The bytes that it reads follow k.
void measure_(const at::Tensor& gradient, const at::Tensor& payloads, const at::Tensor& squared_norm, int64_t k, int64_t spans);
// Before compress_: writes to `given`, which may be the gradient, what is given instead of it. `velocity`, [J] of the
// accumulate dtype, keeps what it had where that is not finite in the gradient's dtype, which then is infinite or NaN, and in parameters
// whose gradient is zero in all entries, of which nothing is given.
void correct_(
    const at::Tensor& gradient, const at::Tensor& given, const std::optional<at::Tensor>& velocity, const at::Tensor& spans,
    const Correction& correction);
// Sets the velocity to zero where what was sent has been applied: not in idle parameters, nor in those to which settle_ returns it.
void mask_(
    const at::Tensor& velocity, const at::Tensor& sent, const Shared& shared, const std::optional<at::Tensor>& applied,
    at::ScalarType dtype, int64_t sent_round);
void judge_(const at::Tensor& tensor, const at::Tensor& verdict, int64_t round);
void settle_(
    const at::Tensor& residual, const at::Tensor& sent, const Shared& shared, const std::optional<at::Tensor>& applied,
    const at::Tensor& counters, at::ScalarType dtype, int64_t sent_round);
void put_back_(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype);
// Says in an own payload, whose values are 0, that this rank contributes nothing. Does not wait for a device.
void mark_absent_(const at::Tensor& payload);
// The payload of k of the residual's entries to its wire form, and [N, bytes] of it to payloads.
void to_wire_(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& wire, const Wire& form, at::ScalarType dtype, int64_t k,
    int64_t spans);
void from_wire_(
    const at::Tensor& wire, const at::Tensor& payloads, const Wire& form, at::ScalarType dtype, int64_t numel, int64_t k, int64_t spans);
// Of a support that a leader has chosen; `lead` is its message, of which values are not read. `status` is a device's, as of aggregate_.
void take_(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& lead, const Shared& shared,
    const std::optional<at::Tensor>& status, const Wire& form, at::ScalarType dtype, int64_t k, int64_t leader, const Stamp& stamp);
void average_slice_(
    const at::Tensor& rows, const at::Tensor& averages, const std::optional<at::Tensor>& status, const Wire& form, at::ScalarType dtype,
    int64_t numel, int64_t k, int64_t spans, const Stamp& stamp);
void spread_(
    const at::Tensor& gradient, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const Shared& shared,
    const std::optional<at::Tensor>& status, int64_t k, const Stamp& stamp);
void feedback_(
    const at::Tensor& feedback, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const Shared& shared,
    at::ScalarType dtype, int64_t numel, const Selection& selection, const Stamp& stamp);
// Rows of parts, between the ranks of a host: core/parts.h. The bytes of one, for parameters of `numels` entries, and the table of where
// parts lie.
int64_t part_row_bytes(at::IntArrayRef numels, int64_t ranks, at::ScalarType dtype);
at::Tensor make_parts(at::IntArrayRef numels, int64_t ranks, at::Device device);
// The entries of a row.
at::Tensor entries_of(const at::Tensor& row, int64_t entries, at::ScalarType dtype);
// A gradient to a row for each rank.
void split_(const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor& parts, const Stamp& stamp);
// The mean of the rows, added up in their order, into the entries of `row`, and a head. On the CPU ValueError where a head is not that of
// this step; a device leaves it in `found`.
void mean_(
    const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype, const Stamp& stamp);
// The reverse of split_, and what it finds of the bucket to the verdict. ValueError likewise, before anything is written.
void join_(
    const at::Tensor& rows, const at::Tensor& gradient, const at::Tensor& parts, const at::Tensor& verdict,
    const std::optional<at::Tensor>& status, const Stamp& stamp);
// Makes a message one that every receiver rejects where something was found.
void mark_unfilled_(const at::Tensor& message, const at::Tensor& found, const std::optional<at::Tensor>& status);
at::Tensor encode(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan, int64_t spans);
std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype);

// Whether this build has kernels for CUDA devices.
bool has_cuda_kernels();
// Whether the operators take tensors of such a device: the CPU, CUDA where this build has kernels for it, and torch's PrivateUse1 where
// another library has registered implementations for it.
bool has_kernels(at::Device device);
// What a device's statuses (library.cpp) say, in words: `expected ..., got ...`, by the ranks of the job, where this one is at `place` on
// that host; empty if nothing.
std::string describe_statuses(int64_t of_workers, int64_t in_host, int64_t host = 0, int64_t place = 0, int64_t host_ranks = 1);
// Bytes of the payload that k entries of a bucket of numel gradients of that dtype take.
int64_t payload_bytes(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans = 0);
// And of its wire form.
int64_t wire_bytes(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans, const Wire& form);

// Where in a message its head ends and its values begin, and the bytes of each.
struct MessageParts {
  int64_t head_bytes, values_at, value_bytes;
};
MessageParts message_parts(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans, const Wire& form);

// Rounds that a verdict remembers.
inline constexpr int64_t kVerdictRounds = 4096;
// A verdict in which no round is void.
at::Tensor make_verdict(at::Device device);
// Reads it, which on CUDA waits for the device.
bool is_void(const at::Tensor& verdict, int64_t round);

}  // namespace regtopk
