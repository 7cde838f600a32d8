// What the files that register the kernels share: checks of tensors on a device, workspaces, and what is wrong with a launch.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "../csrc/ops/checks.h"
#include "../csrc/ops/operators.h"
#include "launch.h"

namespace regtopk {

inline void check_on_device(const char* who, const char* name, const at::Tensor& tensor, const at::Device& device) {
  TORCH_CHECK_VALUE(
      tensor.device() == device, who, ": expected ", name, " on ", device, ", where the other tensors are, got ", tensor.device());
}

inline void check_aligned(const char* who, const char* name, const void* pointer) {
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0, who, ": expected ", name, " at a multiple of ", kAlignment,
      " bytes, got an address ", reinterpret_cast<uintptr_t>(pointer) % kAlignment,
      " beyond one; pass a tensor with memory of its own, not a slice");
}

inline void check_span_count(const char* who, int64_t count) {
  TORCH_CHECK_VALUE(count <= kMaxSpans, who, ": expected at most ", kMaxSpans, " parameters in a bucket on CUDA, got ", count);
}

inline int64_t count_spans(const char* who, const std::optional<at::Tensor>& spans, int64_t numel) {
  const int64_t count = check_spans(who, spans, numel);
  check_span_count(who, count);
  return count;
}

// The entry of a round in the verdict, or null.
inline int64_t* entry_of(const char* who, const at::Tensor& verdict, int64_t round, const at::Device& device) {
  check_verdict(who, verdict, round);
  check_on_device(who, "verdict", verdict, device);
  return round < 0 ? nullptr : verdict.mutable_data_ptr<int64_t>() + round % kVerdictRounds;
}

inline void check_countable(const char* who, int64_t numel) {
  TORCH_CHECK_VALUE(numel <= kMaxEntries, who, ": expected at most 2^32 - 1 gradient entries on CUDA, got ", numel);
}

inline void check_launched(const char* who, cudaError_t error) {
  // The error may be that of a kernel that ran before: the CUDA runtime reports it to whoever asks next.
  TORCH_CHECK(
      error == cudaSuccess, who, ": expected the kernels to launch, got ", cudaGetErrorString(error),
      "; the kernels may have failed to launch, or an earlier kernel of this process failed");
}

inline bool is_capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// The workspaces of one operator. One is kept for each stream and grows to what its largest bucket needs: calls on a stream
// come one after the other, and each leaves the zeros that the next one expects (launch.h). A captured call takes one of its
// own from the graph's memory and zeroes it in the graph, because the graph may be replayed on any stream.
class Workspaces {
 public:
  // Of the streams of a process no more than `most` keep one: what a future goes on with runs on one of 32 after the other. Who has to
  // make its own anew gets it of the allocator, which can take it back.
  explicit Workspaces(size_t most = std::numeric_limits<size_t>::max()) : most_(most) {}

  // Calls launch(address) and checks what it returns. No other thread launches meanwhile: kernels of two calls that share a
  // workspace must not be mixed on the stream.
  template <typename Launch>
  void with(const char* who, const c10::cuda::CUDAStream& stream, int64_t bytes, int64_t zeroed_bytes, const Launch& launch) {
    if (is_capturing()) {
      const at::Tensor workspace = make(stream.device(), bytes, zeroed_bytes);
      check_launched(who, launch(workspace.mutable_data_ptr()));
      return;
    }
    const std::lock_guard lock(mutex_);
    const std::pair key(stream.device_index(), stream.id());
    if (kept_.size() >= most_ && !kept_.contains(key)) {
      kept_.erase(std::min_element(kept_.begin(), kept_.end(), [](const auto& a, const auto& b) { return a.second.used < b.second.used; }));
    }
    auto& [kept, used] = kept_[key];
    used = ++uses_;
    if (!kept.defined() || kept.numel() < bytes) kept = make(stream.device(), bytes, zeroed_bytes);
    const cudaError_t error = launch(kept.mutable_data_ptr());
    if (error != cudaSuccess) kept.reset();  // its zeros may be gone
    check_launched(who, error);
  }

 private:
  static at::Tensor make(const at::Device& device, int64_t bytes, int64_t zeroed_bytes) {
    at::Tensor workspace = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    workspace.narrow(0, 0, zeroed_bytes).zero_();
    return workspace;
  }

  struct Kept {
    at::Tensor workspace;
    int64_t used = 0;
  };
  const size_t most_;
  std::mutex mutex_;
  int64_t uses_ = 0;
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Kept> kept_;
};

// Never freed: the CUDA runtime may be gone at exit.
inline Workspaces& aggregate_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}

// Where a device leaves what it found wrong; null where nobody asks.
inline unsigned long long* worst_status_of(const char* who, const std::optional<at::Tensor>& status, const at::Device& device) {
  if (!status) return nullptr;
  check_vector(who, "status", *status, at::kLong, 1);
  check_on_device(who, "status", *status, device);
  return reinterpret_cast<unsigned long long*>(status->mutable_data_ptr<int64_t>());
}

// Memory for one call, of the size of a payload, of the stream's own: the allocator keeps it for the next call on the stream, and futures
// go on on one of 32 streams after the other.
inline at::Tensor room_for(int64_t bytes, const at::Device& device) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

}  // namespace regtopk
