// What the items before one of a running kernel sum up to, without a wait for all of them: decoupled look-back, as in Merrill and Garland,
// Single-pass Parallel Prefix Scan with Decoupled Look-back (NVIDIA, 2016).
//
//   item        0      1      2      3      4
//   word      whole  whole   own    own     -     4 adds 3, 2 and the whole of 1, then says its own whole
//
// A word is all that is read of an item, so that nothing else has to be ordered with it. Tickets (phases.cuh) see to it that who is waited
// for runs.
#pragma once

#include <cstdint>

#include "global_memory.cuh"
#include "groups.cuh"

namespace regtopk {

template <unsigned kThreads, unsigned kSums>
struct LookBack {
  static constexpr uint64_t kOwn = uint64_t{1} << 62;    // the item's own sum is known
  static constexpr uint64_t kWhole = uint64_t{1} << 63;  // and that of all before it
  static constexpr unsigned kWarps = kThreads / kWarpThreads;
  struct Sums {
    uint64_t of[kSums] = {};
  };
  struct Shared {
    uint64_t parts[kSums][kWarps];
    bool ends[kSums][kWarps];
  };
  Global<uint64_t> words;  // kSums of each item; zero before
  Shared& shared;

  // All threads of the block call it together, with what the item sums up to, each below 2^62.
  __device__ Sums before(uint32_t item, const Sums& own) const {
    const WarpGroup warp;
    say(item, own, item == 0 ? kWhole : kOwn);
    Sums sums;
    bool ended[kSums]{}, all_ended = item == 0;
    for (uint32_t end = item; !all_ended; end -= kThreads) {
#pragma unroll
      for (unsigned n = 0; n < kSums; ++n) {
        uint64_t word = kWhole;  // before the first item there is nothing
        if (threadIdx.x < end) {
          while ((word = words.load_fresh((end - 1 - threadIdx.x) * kSums + n)) < kOwn) __nanosleep(32);
        }
        const uint32_t wholes = __ballot_sync(kAllLanes, word >= kWhole), nearest = wholes == 0 ? kWarpThreads : __ffs(wholes) - 1;
        uint64_t part = warp.rank() <= nearest ? word % kOwn : 0;
        for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) part += __shfl_xor_sync(kAllLanes, part, distance);
        if (warp.rank() == 0) {
          shared.parts[n][threadIdx.x / kWarpThreads] = part;
          shared.ends[n][threadIdx.x / kWarpThreads] = wholes != 0;
        }
      }
      __syncthreads();
      all_ended = true;
#pragma unroll
      for (unsigned n = 0; n < kSums; ++n) {
#pragma unroll
        for (unsigned each = 0; each < kWarps; ++each) {
          if (!ended[n]) sums.of[n] += shared.parts[n][each];
          ended[n] |= shared.ends[n][each];
        }
        all_ended &= ended[n];
      }
      __syncthreads();
    }
    if (item > 0) {
      Sums whole = sums;
#pragma unroll
      for (unsigned n = 0; n < kSums; ++n) whole.of[n] += own.of[n];
      say(item, whole, kWhole);
    }
    return sums;
  }

 private:
  __device__ void say(uint32_t item, const Sums& sums, uint64_t state) const {
#pragma unroll
    for (unsigned n = 0; n < kSums; ++n) {
      if (threadIdx.x == n) words.store_fresh(item * kSums + n, sums.of[n] | state);
    }
  }
};

}  // namespace regtopk
