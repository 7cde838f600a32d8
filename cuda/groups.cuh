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
  // The sum of the values of the lanes before this one.
  __device__ uint32_t exclusive_sum(uint32_t value) const {
    uint32_t sum = value;
    for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, sum, distance);
      if (rank() >= distance) sum += before;
    }
    return sum - value;
  }
  __device__ uint32_t sum(uint32_t value) const {
    for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
};

template <unsigned kThreads>
struct BlockGroup {
  static_assert(kThreads % kWarpThreads == 0 && kThreads <= 1024);
  // Shared by the block; one scan or sum at a time.
  struct Scratch {
    uint32_t of_warp[kThreads / kWarpThreads];
  };
  Scratch& scratch;

  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ static constexpr unsigned size() { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint32_t exclusive_sum(uint32_t value) const {
    const WarpGroup warp;
    const uint32_t before_in_warp = warp.exclusive_sum(value);
    if (warp.rank() == kWarpThreads - 1) scratch.of_warp[threadIdx.x / kWarpThreads] = before_in_warp + value;
    __syncthreads();
    uint32_t before = before_in_warp;
    for (unsigned w = 0; w < threadIdx.x / kWarpThreads; ++w) before += scratch.of_warp[w];
    __syncthreads();
    return before;
  }
  __device__ uint32_t sum(uint32_t value) const {
    const WarpGroup warp;
    const uint32_t of_this_warp = warp.sum(value);
    if (warp.rank() == 0) scratch.of_warp[threadIdx.x / kWarpThreads] = of_this_warp;
    __syncthreads();
    uint32_t total = 0;
    for (unsigned w = 0; w < kThreads / kWarpThreads; ++w) total += scratch.of_warp[w];
    __syncthreads();
    return total;
  }
};

}  // namespace regtopk
