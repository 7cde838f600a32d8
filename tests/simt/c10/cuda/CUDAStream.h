// What cuda/operators.cpp asks of torch's CUDA library, for operators.cpp here. Tensors of the CPU have one stream, no graphs, and kernels
// that run at once, those of one thread at a time, on all of the process' memory. Those of another device have its streams, which take the
// kernels (tests/late_device).
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <optional>

#include "../../simt.h"

inline const char* cudaGetErrorString(cudaError_t) { return simt::error.c_str(); }

namespace c10::cuda {

enum class CaptureStatus { None };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }

class CUDAStream {
 public:
  explicit CUDAStream(c10::Stream stream) : stream_(stream) {}
  c10::Device device() const { return stream_.device(); }
  c10::DeviceIndex device_index() const { return stream_.device_index(); }
  c10::StreamId id() const { return stream_.id(); }
  operator cudaStream_t() const { return device().is_cpu() ? nullptr : reinterpret_cast<cudaStream_t>(static_cast<intptr_t>(id() + 1)); }

 private:
  c10::Stream stream_;
};

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device device) {
    here() = device;
    if (!device.is_cpu()) return;
    lock_.emplace(mutex());
    simt::error.clear();
    simt::buffers = {{nullptr, reinterpret_cast<const uint8_t*>(~uintptr_t{0}), true}};
  }
  ~CUDAGuard() {
    if (lock_) simt::buffers.clear();
  }
  static c10::Device& here() {
    static thread_local c10::Device device(c10::kCPU);
    return device;
  }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  std::optional<std::lock_guard<std::mutex>> lock_;
};

// Of the device of the guard that is in force.
inline CUDAStream getCurrentCUDAStream(c10::DeviceIndex) {
  const c10::Device device = CUDAGuard::here();
  if (device.is_cpu()) return CUDAStream(c10::Stream(c10::Stream::DEFAULT, device));
  return CUDAStream(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

}  // namespace c10::cuda
