// Sums in the one order that the CPU keeps too: what entry i of a payload tile gives goes to lane i % kLanes, then the lanes are added up
// in their order, and then the tiles.
#pragma once

#include <cstdint>

#include "global_memory.cuh"

namespace regtopk {

template <unsigned kLanes>
struct OrderedSum {
  double (&lanes)[kLanes];  // shared by a block of as many threads

  // The sum of a tile, of what each thread has of its lane; thread 0 has it.
  __device__ double of_tile(double of_lane) const {
    __syncthreads();
    lanes[threadIdx.x] = of_lane;
    __syncthreads();
    return threadIdx.x == 0 ? added_up(0, kLanes) : 0;
  }

  // The sum of all tiles; thread 0 has it.
  __device__ double of_tiles(Global<const double> sums, uint32_t tiles) const {
    double sum = 0;
    for (uint32_t first = 0; first < tiles; first += kLanes) {
      const uint32_t tile = first + threadIdx.x;
      __syncthreads();
      lanes[threadIdx.x] = tile < tiles ? sums.load(tile) : 0;
      __syncthreads();
      if (threadIdx.x == 0) sum = added_up(sum, tiles - first < kLanes ? tiles - first : kLanes);
    }
    return sum;
  }

 private:
  __device__ double added_up(double sum, uint32_t count) const {
    for (uint32_t lane = 0; lane < count; ++lane) sum += lanes[lane];
    return sum;
  }
};

}  // namespace regtopk
