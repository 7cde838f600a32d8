// The density that follows the gradient: more entries where the average was large, on a budget of bytes.
//
//   k_t = k_mean * clip((|G_{t-1}| / its moving average)^power) * gain,  clipped again;  |G| the 2-norm of all sparse buckets of a step
//
// The gain pays back what was spent beyond the bytes of k_mean, or spends what was saved. Every rank has the same G, and computes the
// same bits on every machine: roots, products and quotients alone, no function of a library. k_mean where there is no usable norm: in
// the first step, after a dense one, after a void one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace regtopk {

struct AdaptiveDensity {
  double mean, power, minimum, maximum;  // a power is a multiple of 1/4
};

// What one worker has measured, equal on every rank.
class DensityControl {
 public:
  // A bucket of the step under way has come back; `mean_bytes` its message would have had at the mean density.
  void note(double squared_norm, double sent_bytes, double mean_bytes);
  // The density of the step that begins now, after one that was void or not.
  double next(const AdaptiveDensity& rule, bool was_void);

  // What does not change within a step.
  std::array<double, 4> settled() const { return {average_, norms_, overspent_, steps_}; }
  // As numbers, between steps, and back: none is the beginning.
  std::vector<double> state(bool was_void) const;
  void restore(const std::vector<double>& state);
  static constexpr std::size_t kNumbers = 7;

 private:
  double average_ = 0, norms_ = 0;    // moving average of the norm, and of how many, up to its window
  double overspent_ = 0, steps_ = 0;  // in steps at the mean density, and steps counted
  double squared_norm_ = 0, sent_bytes_ = 0, mean_bytes_ = 0;  // of the step under way
};

}  // namespace regtopk
