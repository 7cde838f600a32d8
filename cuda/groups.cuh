// Threads that work on one thing together: a warp or a block, with the same words for both. CUB has these scans, but its
// host build has no emulation of a warp; the few lines here are the ones that the tests run.
#pragma once

#include <cstdint>

#include "platform.cuh"

namespace regtopk {

inline constexpr unsigned kWarpThreads = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

struct WarpGroup {
  __device__ unsigned rank() const { return threadIdx.x % kWarpThreads; }
  __device__ static constexpr unsigned size() { return kWarpThreads; }
  __device__ void sync() const { __syncwarp(); }
  // The sum of the values of the lanes before this one, of 32 or 64 bits; and of all lanes.
  template <typename Sum>
  __device__ Sum exclusive_sum(Sum value) const {
    Sum sum = value;
    for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
      const Sum before = __shfl_up_sync(kAllLanes, sum, distance);
      if (rank() >= distance) sum += before;
    }
    return sum - value;
  }
  template <typename Sum>
  __device__ Sum exclusive_sum(Sum value, Sum& total) const {
    const Sum before = exclusive_sum(value);
    total = __shfl_sync(kAllLanes, before + value, kWarpThreads - 1);
    return before;
  }
  __device__ uint32_t sum(uint32_t value) const {
    for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
  // Calls function(lane), by the whole warp, for each lane whose condition holds.
  template <typename Function>
  __device__ void each_lane(bool condition, const Function& function) const {
    for (uint32_t rest = __ballot_sync(kAllLanes, condition); rest != 0; rest &= rest - 1) function(static_cast<unsigned>(__ffs(rest) - 1));
  }
};

template <unsigned kThreads>
struct BlockGroup {
  static_assert(kThreads % kWarpThreads == 0 && kThreads <= 1024);
  // Shared by the block; one scan or sum at a time.
  struct Scratch {
    uint64_t of_warp[kThreads / kWarpThreads];
  };
  Scratch& scratch;

  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ static constexpr unsigned size() { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  // As of a warp. Every thread looks at all warps, at once: a loop to its own would wait for one load after the other.
  template <typename Sum>
  __device__ Sum exclusive_sum(Sum value, Sum& total) const {
    const WarpGroup warp;
    Sum before = warp.exclusive_sum(value);
    if (warp.rank() == kWarpThreads - 1) scratch.of_warp[threadIdx.x / kWarpThreads] = before + value;
    __syncthreads();
    total = 0;
#pragma unroll 8
    for (unsigned w = 0; w < kThreads / kWarpThreads; ++w) {
      const Sum of_warp = static_cast<Sum>(scratch.of_warp[w]);
      total += of_warp;
      before += w < threadIdx.x / kWarpThreads ? of_warp : 0;
    }
    __syncthreads();
    return before;
  }
  __device__ uint32_t sum(uint32_t value) const {
    const WarpGroup warp;
    const uint32_t of_this_warp = warp.sum(value);
    if (warp.rank() == 0) scratch.of_warp[threadIdx.x / kWarpThreads] = of_this_warp;
    __syncthreads();
    uint32_t total = 0;
#pragma unroll 8
    for (unsigned w = 0; w < kThreads / kWarpThreads; ++w) total += static_cast<uint32_t>(scratch.of_warp[w]);
    __syncthreads();
    return total;
  }
};

}  // namespace regtopk
