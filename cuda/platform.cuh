// What compiles the kernels: nvcc for a device, or a host compiler for the emulation in tests/simt.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define REGTOPK_SHARED(Type, name) __shared__ std::type_identity_t<Type> name
#define REGTOPK_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define REGTOPK_LAUNCH_EARLY(kernel, blocks, threads, stream, ...) launch_early(kernel, blocks, threads, stream, __VA_ARGS__)

namespace regtopk {
// threadIdx.x, read anew: where the compiler would keep it, or what follows from it, in a register that is not there.
__device__ inline unsigned thread_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
inline cudaError_t launch_error() { return cudaGetLastError(); }
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 1;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// For a kernel that calls wait_for_stream(): its blocks come onto the device as soon as all of the kernel before it have begun, and what
// they do until then takes no time of the stream's. Programmatic dependent launch, where the device has it.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // launch_error() has what it returns
}
// Lets the next kernel of the stream come early, and waits for the end of all that is before this one. Until then nothing may be read or
// written that is not the block's own.
__device__ inline void wait_for_stream() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
}  // namespace regtopk

#else

#include "simt.h"

#define REGTOPK_SHARED(Type, name)     \
  static const char key_of_##name = 0; \
  std::type_identity_t<Type>& name = *static_cast<std::type_identity_t<Type>*>(simt::shared(&key_of_##name, sizeof(Type)))
// Like a device, it takes the arguments' values with it: the kernel may run after the call.
#define REGTOPK_LAUNCH(kernel, blocks, threads, stream, ...) \
  simt::submit(stream, [=] { simt::launch(#kernel, blocks, threads, [&] { kernel(__VA_ARGS__); }); })
#define REGTOPK_LAUNCH_EARLY REGTOPK_LAUNCH

namespace regtopk {
inline unsigned thread_again() { return threadIdx.x; }
inline cudaError_t launch_error() { return simt::error.empty() ? cudaSuccess : cudaErrorInvalidValue; }
inline int multiprocessors() { return simt::schedule.multiprocessors; }
inline void wait_for_stream() {}
}  // namespace regtopk

#endif
