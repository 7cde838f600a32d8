// When a step begins, and which steps are void.
//
// The buckets of one backward pass are a step. A round is what one GradScaler judges: the steps of all states that share it,
// each state's at most once. A round is void once the result of any of its buckets is not finite; the clock's verdict, a
// tensor that operators write and read, says which are.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "../memory/ends.h"
#include "../memory/layout.h"

namespace regtopk {

class Clock {
 public:
  Clock();
  // The round of a step that `worker`, a number of its own, begins now.
  int64_t begin(int64_t worker);
  // What operators on that device write and read.
  at::Tensor verdict(at::Device device = at::kCPU);
  // Whether the round is void as far as the host has heard: the verdict of CPU buckets is its own memory, another device's
  // comes late.
  bool is_void(int64_t round) const;
  // Says that the results of that round were not applied.
  void make_void(int64_t round);
  // How often somebody has said so here: other ranks may not know.
  int64_t times_made_void() const { return times_made_void_; }
  // A device's verdict has come: the round is void.
  void hear_void(int64_t round);

  // For who must know whether a round is void before the next step: from now on the ends of buckets are noted, of all states.
  void watch_ends() { ends_.watch(); }
  // A bucket of the round has ended on the device's current stream, whatever its scheme.
  void note_end(at::Device device, int64_t round);
  // Takes in what the ends have said by now; returns whether all that were noted have come to pass.
  bool hear_ends();

 private:
  std::mutex mutex_;
  int64_t round_ = -1;
  std::atomic<int64_t> times_made_void_ = 0;
  std::unordered_set<int64_t> begun_;  // workers that have begun a step in this round
  const at::Tensor verdict_;                    // of the host
  std::unordered_map<at::Device, at::Tensor> on_devices_;
  std::mutex hearing_;  // until what was heard is in the verdict
  Ends ends_;
};

// One worker's steps.
class Steps {
 public:
  explicit Steps(std::shared_ptr<Clock> clock);

  // Whether a bucket begins a step. DDP launches buckets in the order of their indices, but may skip any that no rank used:
  // neither the first nor the last is sure to come, nor is a parameter sure to come back in the next step. In the first step
  // of a static graph all say index 0. `seen`: a parameter of the bucket was in another bucket of this step.
  bool begins(int64_t index, double scale, bool seen) const { return !begun_ || index < last_index_ || scale != scale_ || seen; }
  void begin(double scale);
  void note(int64_t index) { last_index_ = index; }
  // Says that the next bucket begins a step.
  void end() { begun_ = false; }

  int64_t step() const { return step_.load(std::memory_order_relaxed); }  // of the last one begun; any thread may ask
  int64_t round() const { return round_.load(std::memory_order_relaxed); }
  double scale() const { return scale_; }  // of the residuals: that of the gradients of the step
  // After a load: `step` is done, and residuals are those of unscaled gradients.
  void restart(int64_t step);
  bool is_void() const { return clock_->is_void(round()); }
  Clock& clock() const { return *clock_; }

 private:
  const std::shared_ptr<Clock> clock_;
  const int64_t worker_;  // this one's number at the clock
  std::atomic<int64_t> step_ = -1, round_ = -1;
  int64_t last_index_ = -1;
  double scale_ = 1;
  bool begun_ = false;
};

}  // namespace regtopk
