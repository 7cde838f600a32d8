// What cuda/operators.cpp asks of torch's CUDA library, for operators.cpp here: one stream, no graphs, and kernels that run at
// once, those of one thread at a time, on all of the process' memory.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <mutex>

#include "../../simt.h"

inline const char* cudaGetErrorString(cudaError_t) { return simt::error.c_str(); }

namespace c10::cuda {

enum class CaptureStatus { None };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }

struct CUDAStream {
  c10::Device device() const { return c10::Device(c10::kCPU); }
  c10::DeviceIndex device_index() const { return 0; }
  c10::StreamId id() const { return 0; }
  operator cudaStream_t() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(c10::DeviceIndex) { return {}; }

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device) : lock_(mutex()) {
    simt::error.clear();
    simt::buffers = {{nullptr, reinterpret_cast<const uint8_t*>(~uintptr_t{0}), true}};
  }
  ~CUDAGuard() { simt::buffers.clear(); }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  std::lock_guard<std::mutex> lock_;
};

}  // namespace c10::cuda
