// Buckets of a device that the host is done with and the device is not: on which streams they end, and what their kernels use until then.
// A bucket's future says when its result is there to whoever waits for it. An error says nothing, and what else a bucket has written,
// residuals and history, is read by the next step and given back with the state, on other streams than wrote it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

namespace regtopk {

class UnderWay {
 public:
  using Clock = std::chrono::steady_clock;
  using Keeps = std::vector<std::shared_ptr<void>>;

  // Counts a bucket that is not over before end().
  void begin();
  void end(const at::Tensor& result, Keeps keeps);
  // The bucket is over with what the current stream of its device has to do. Its result is the caller's, who may let go of it before
  // that; `keeps` lives until then. Nothing on the CPU, or of no tensor. Throws nothing: a device that fails says so to whoever asks next.
  void note(const at::Tensor& result, Keeps keeps) noexcept;

  // Waits until no bucket is counted; false if that has not happened by the deadline.
  bool wait(Clock::time_point deadline);
  // From now on the current stream of each device comes behind what was noted. The host does not wait.
  void follow();
  // Nobody will follow any more: waits, and what is not over by the deadline lives on until another one leaves and finds that it is.
  void leave(Clock::time_point deadline);

 private:
  struct End {
    at::Device device;
    c10::Event event;
    Keeps keeps;
    bool has_passed() const noexcept;
  };
  std::vector<End> take();

  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t count_ = 0;
  std::vector<End> ends_;
};

}  // namespace regtopk
