// Judge: whether all values are finite, for buckets that are exchanged densely.
#include <algorithm>

#include "../csrc/core/score.h"
#include "global_memory.cuh"
#include "launch.h"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;

// Reads every value once, in vectors if the values are aligned. Whoever finds one that is not finite writes the same number.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    judge_kernel(Global<const T> values, uint64_t numel, uint64_t in_vectors, Global<int64_t> verdict, int64_t round) {
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x, threads = uint64_t{gridDim.x} * kThreads;
  bool finite = true;
#pragma unroll 4
  for (uint64_t at = thread * kVectorEntries; at < in_vectors; at += threads * kVectorEntries) {
    const Vector<T> vector = values.load_vector(at);
#pragma unroll
    for (int i = 0; i < kVectorEntries; ++i) finite &= is_finite(Traits<T>::load(vector.entry[i]));
  }
  for (uint64_t at = in_vectors + thread; at < numel; at += threads) finite &= is_finite(Traits<T>::load(values.load(at)));
  if (__syncthreads_or(!finite) && threadIdx.x == 0) verdict.store(0, round);
}

}  // namespace

cudaError_t launch_judge(const JudgeLaunch& arguments, cudaStream_t stream) {
  if (arguments.numel == 0) return cudaSuccess;
  return with_value_type(arguments.type, [&]<typename T>(T) {
    const bool aligned = reinterpret_cast<uintptr_t>(arguments.values) % kAlignment == 0;
    const uint64_t numel = static_cast<uint64_t>(arguments.numel), in_vectors = aligned ? numel / kVectorEntries * kVectorEntries : 0;
    const uint64_t wanted = (numel + kThreads * kVectorEntries - 1) / (kThreads * kVectorEntries),
                   most = static_cast<uint64_t>(multiprocessors()) * 8;
    REGTOPK_LAUNCH(
        (judge_kernel<T>), static_cast<unsigned>(std::min(wanted, most)), kThreads, stream, Global(static_cast<const T*>(arguments.values)),
        numel, in_vectors, Global(arguments.verdict), arguments.round);
    return launch_error();
  });
}

}  // namespace regtopk
