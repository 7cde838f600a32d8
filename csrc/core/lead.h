// A support that one worker, the leader, has chosen for all: what the others do instead of compress, and all instead of aggregate.
//
//   the leader        compress                       ─► payload ┐ its support, to all
//   the others        accumulate ─► empty payload ─► take      ◄┘ ─► payload with values of their own
//   everybody         a head and a slice of the values to the owner of that slice, average_slice, the averages to all
//
// Averages are of the gradient's type: they are what travels, and what the bucket holds. So what came back of an entry is
// M times its average; M is the number of workers that contribute, as for aggregate.
#pragma once

#include <vector>

#include "compress.h"
#include "wire.h"

namespace regtopk {

// What is before the averages of a slice: the step + 1, of 8 bytes, and zeros.
inline constexpr int64_t kMarkBytes = 16;

// r = a, all of it, but for entries that are not finite. The payload gets its header and no entries.
void accumulate(const CompressArguments& arguments, const ParallelFor& parallel_for);

// Gives the payload that accumulate left the support of `lead`, a valid payload of the same layout, and values: v = a there, r = a - v.
void take(const PayloadView& lead, uint8_t* payload, void* residual, const ParallelFor& parallel_for);

// The head of a message, up to its index code.
std::optional<PayloadError> check_head(const uint8_t* head, const PayloadLayout& layout, const WireLayout& wire);

// M, of these heads.
int64_t contributors(const std::vector<const uint8_t*>& heads);

// averages [entries] of the payload's type, of values of the wire's type that `slices` holds for each worker, in rank order. All are NaN
// where a worker says that something it was given is not finite: whether that has been chosen depends on the leader.
void average_slice(
    const std::vector<const uint8_t*>& heads, const std::vector<const uint8_t*>& slices, ValueType type, ValueType wire_type,
    int64_t entries, void* averages);

// Feedback [k] for the entries of an own payload that came back as `averages` [k].
void feedback_of_averages(const PayloadView& payload, const void* averages, int64_t contributors, Distortion distortion, void* feedback);

}  // namespace regtopk
