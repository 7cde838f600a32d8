// Runs CUDA kernels on the host: what nvcc and the driver provide, for g++.
//
// Every CUDA thread is a fiber that runs until a barrier. Barriers and warp collectives release when all the threads they
// name have arrived; a barrier that only part of a block reaches, or a wait that nothing ends, is an error and not a hang.
// Several blocks may be resident at a time and are interleaved at barriers and waits, in an order that the schedule gives:
// a kernel whose result depends on that order shows it here.
// Every access to global memory is checked against the buffers of the call and counted (cuda/global_memory.cuh).
//
// What this cannot show: memory ordering weaker than the order of execution, races between threads of a warp inside one
// statement, and time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index3 {
  unsigned x, y, z;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

namespace simt {

enum class Order : int { kAscending = 0, kDescending = 1, kShuffled = 2 };

struct Schedule {
  Order order = Order::kAscending;
  uint64_t seed = 0;
  int resident_blocks = 1;   // blocks that are interleaved
  int multiprocessors = 2;   // what the launchers size their grids by
};
inline Schedule schedule;

struct Traffic {
  int64_t loaded = 0, stored = 0;  // bytes of global memory, as the threads asked for them
};
inline std::map<std::string, Traffic> traffic;  // by kernel

// Global memory of the current call. An access outside, or to a read-only buffer, is an error.
struct Buffer {
  const uint8_t* begin;
  const uint8_t* end;
  bool writable;
};
inline std::vector<Buffer> buffers;
inline std::string error;  // of the first failure; empty if there was none

enum class Access { kLoad, kStore, kUpdate };
void touch(const void* address, size_t bytes, Access access);

void launch(const char* kernel, unsigned blocks, unsigned threads, const std::function<void()>& body);

// What takes a kernel of a stream; where there is none, it runs at once.
inline void (*put_on_stream)(cudaStream_t stream, std::function<void()> work) = nullptr;
inline void submit(cudaStream_t stream, std::function<void()> work) {
  if (put_on_stream != nullptr && stream != nullptr) put_on_stream(stream, std::move(work));
  else work();
}

// Shared memory of the current block. Filled with garbage at the start of a block, as on a device.
void* shared(const void* key, size_t bytes);

void block_barrier();
void warp_barrier();
void wait();            // gives way to other threads and blocks, inside a loop that waits for one of them
int block_or(int value);
uint64_t exchange(uint64_t value, int source_lane);  // every lane gives a value and gets that of source_lane
unsigned ballot(bool value);

}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_or(int value) { return simt::block_or(value); }
inline void __syncwarp(unsigned = ~0u) { simt::warp_barrier(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { simt::wait(); }
inline unsigned __ballot_sync(unsigned, bool value) { return simt::ballot(value); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::exchange(bits, lane & 31);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x & 31) ^ lane_mask);
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address |= value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  if (value < old) *address = value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
