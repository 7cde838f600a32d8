// Compress: from one worker's gradient and residual to its payload, the first half of the exchange of a bucket.
//
//   a = decay r + g;  S = the k entries with the largest (score, then smallest index);  payload = (S, v);  r = a, r[S] = a[S] - v
//
// v is a[S] rounded to the bucket's value type, so that with a decay of 1 what was sent plus what is kept is what was given.
// An entry whose a is not finite keeps the residual it had and flags the payload; a finite gradient is never lost to it.
#pragma once

#include <cstdint>
#include <optional>

#include "chunks.h"
#include "parallel.h"
#include "payload.h"
#include "score.h"

namespace regtopk {

// A guess at the score key of the k-th entry, used to select in one pass. A wrong one costs time, never a bit.
struct Bracket {
  uint32_t low = 0;             // entries with this key or a larger one are looked at
  uint32_t high = 0x7fffffffu;  // entries with a larger key are taken to be sent
  double expected = 0.0;        // fraction of the entries that are looked at; sizes buffers
};

struct CompressArguments {
  PayloadLayout layout;              // J, k and the value type of the bucket
  const void* gradient = nullptr;    // in: [J] of the value type
  void* residual = nullptr;          // in and out: [J] of the accumulate type
  uint8_t* payload = nullptr;        // out: layout.bytes
  uint64_t step = 0, plan = 0;       // written to the header
  // The last step's own payload; null where there is none. Counts the entries sent twice running.
  const PayloadView* sent = nullptr;
  // in: one accumulate value for each entry of `sent`, as aggregate wrote it; null selects by magnitude, which is Top-k.
  const void* feedback = nullptr;
  Distortion distortion = Distortion::kPrevious;
  double mu = 1.0;
  double decay = 1.0;                // rounded to the accumulate type
  Chunks chunks = {};
  // Replaces the sampled bracket, so that tests can force a wrong one; with chunks it lists all. The scalar path and fp64 use none.
  std::optional<Bracket> bracket = std::nullopt;
};

// Selects by the fastest path there is for the value type on this machine; see dispatch.cpp. Every path gives the same bytes.
void compress(const CompressArguments& arguments, const ParallelFor& parallel_for);

// Undoes a payload that was sent in vain: r[S] += v for the finite values. The others never left the residual. A value of 0
// changes no bit.
void put_back(const PayloadView& payload, void* residual, const ParallelFor& parallel_for);

}  // namespace regtopk
