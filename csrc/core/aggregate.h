// Aggregate: from the payloads of all workers to the averaged gradient, the second half of the exchange of a bucket.
//
//   Z = ((0 + v_0) + v_1) + ... + v_{N-1}, scattered, in the accumulate type and in rank order;  gradient = Z / N
//
// The order makes every replica compute the same bits.
#pragma once

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

// Returns whether every entry of the gradient is finite. Picks a path as compress() does.
bool aggregate(const AggregateArguments& arguments, const ParallelFor& parallel_for);

}  // namespace regtopk
