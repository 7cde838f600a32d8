// Aggregate: from the payloads of all workers to the averaged gradient, the second half of the exchange of a bucket.
//
//   Z = ((0 + v_0) + v_1) + ... + v_{N-1}, scattered, in the accumulate type and in rank order;  gradient = Z / M
//
// M is the number of payloads that contribute, N unless some rank is absent, and 1 if none does.
// The order makes every replica compute the same bits.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "payload.h"
#include "score.h"

namespace regtopk {

struct AggregateArguments {
  PayloadLayout layout;
  const uint8_t* payloads = nullptr;  // in: `workers` payloads of layout.bytes each, in rank order, checked
  int64_t workers = 0;                // N
  void* gradient = nullptr;           // out: [J] of the value type
  // out: [feedback_workers, k] of the accumulate type for the entries of ranks first_feedback_worker and on; may be null
  void* feedback = nullptr;
  int64_t first_feedback_worker = 0, feedback_workers = 0;
  Distortion distortion = Distortion::kPrevious;
};

// M.
inline int64_t contributors(const AggregateArguments& arguments) {
  int64_t count = 0;
  for (int64_t worker = 0; worker < arguments.workers; ++worker) {
    const PayloadView payload(arguments.payloads + worker * arguments.layout.bytes, arguments.layout);
    count += (payload.header().flags & kFlagAbsent) == 0 ? 1 : 0;
  }
  return std::max<int64_t>(count, 1);
}

// Returns whether every entry of the gradient is finite. Picks a path as compress() does.
bool aggregate(const AggregateArguments& arguments, const ParallelFor& parallel_for);

// The squared 2-norm of what aggregate() has written, of the entries in some payload alone: all others are 0. In the order of
// regtopk::correct_, which is one that a device's threads keep too: entry i of a tile goes to lane i % 256, then the lanes are added up in
// order, and then the tiles.
double squared_norm(const AggregateArguments& arguments, const ParallelFor& parallel_for);

}  // namespace regtopk
