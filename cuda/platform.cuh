// What compiles the kernels: nvcc for a device, or a host compiler for the emulation in tests/simt.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define REGTOPK_SHARED(Type, name) __shared__ std::type_identity_t<Type> name
#define REGTOPK_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)

namespace regtopk {
// threadIdx.x, read anew: where the compiler would keep it, or what follows from it, in a register that is not there.
__device__ inline unsigned thread_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
inline cudaError_t launch_error() { return cudaGetLastError(); }
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}
}  // namespace regtopk

#else

#include "simt.h"

#define REGTOPK_SHARED(Type, name)     \
  static const char key_of_##name = 0; \
  std::type_identity_t<Type>& name = *static_cast<std::type_identity_t<Type>*>(simt::shared(&key_of_##name, sizeof(Type)))
#define REGTOPK_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), simt::launch(#kernel, blocks, threads, [&] { kernel(__VA_ARGS__); }))

namespace regtopk {
inline unsigned thread_again() { return threadIdx.x; }
inline cudaError_t launch_error() { return simt::error.empty() ? cudaSuccess : cudaErrorInvalidValue; }
inline int multiprocessors() { return simt::schedule.multiprocessors; }
}  // namespace regtopk

#endif
