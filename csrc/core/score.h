// The RegTop-k score and the total order of the selection (Bereyhi et al., arXiv 2409.14893, eq. 16 and Algorithm 1).
//
// Every operation here is an IEEE addition, multiplication, division or bit operation, in a fixed order and never
// contracted to a fused multiply-add, so that every device and instruction set computes the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "value_types.h"

namespace regtopk {

enum class Distortion : uint8_t { kPrevious = 0, kCurrent = 1 };

// tanh(x) for x >= 0, within a few units in the last place of fp64; exactly 1 from x = 22 on, infinity included.
//
// With y = 2x = n ln 2 + r, |r| <= (ln 2) / 2: expm1(y) = 2^n expm1(r) + (2^n - 1) and tanh(x) = expm1(y) / (expm1(y) + 2).
// The Taylor polynomial of expm1 up to r^13 is exact to fp64 on that interval, and its relative error stays small
// near 0, where x / mu of a cancelled entry lies.
REGTOPK_HOST_DEVICE inline double tanh_of_nonnegative(double x) {
  const double y = 2.0 * (x < 22.0 ? x : 22.0);
  const double n = std::floor(y * 1.4426950408889634 + 0.5);
  const double r = (y - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double polynomial = 1.0 / 6227020800.0;
  polynomial = polynomial * r + 1.0 / 479001600.0;
  polynomial = polynomial * r + 1.0 / 39916800.0;
  polynomial = polynomial * r + 1.0 / 3628800.0;
  polynomial = polynomial * r + 1.0 / 362880.0;
  polynomial = polynomial * r + 1.0 / 40320.0;
  polynomial = polynomial * r + 1.0 / 5040.0;
  polynomial = polynomial * r + 1.0 / 720.0;
  polynomial = polynomial * r + 1.0 / 120.0;
  polynomial = polynomial * r + 1.0 / 24.0;
  polynomial = polynomial * r + 1.0 / 6.0;
  polynomial = polynomial * r + 0.5;
  const double expm1_of_r = r + r * r * polynomial;
  const double two_to_n = std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
  const double expm1_of_y = two_to_n * expm1_of_r + (two_to_n - 1.0);
  return expm1_of_y / (expm1_of_y + 2.0);
}

// Bit pattern of |value|, the key of the total order: larger magnitude, larger key. Every NaN has the same key, above
// infinity, because the payload of a NaN depends on the device that made it.
REGTOPK_HOST_DEVICE inline uint32_t magnitude_key(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value) & 0x7fffffffu;
  return bits > 0x7f800000u ? 0x7fc00000u : bits;
}
REGTOPK_HOST_DEVICE inline uint64_t magnitude_key(double value) {
  const uint64_t bits = std::bit_cast<uint64_t>(value) & 0x7fffffffffffffffull;
  return bits > 0x7ff0000000000000ull ? 0x7ff8000000000000ull : bits;
}

template <typename Accumulate>
REGTOPK_HOST_DEVICE inline bool is_finite(Accumulate value) {
  return std::abs(value) <= std::numeric_limits<Accumulate>::max();
}

// rho = |numerator| / |denominator|; infinite, so that tanh is 1, where the ratio says nothing (0 / 0, x / 0, NaN).
template <typename Accumulate>
REGTOPK_HOST_DEVICE inline Accumulate magnitude_ratio(Accumulate numerator, Accumulate denominator) {
  const Accumulate ratio = std::abs(numerator) / std::abs(denominator);
  const bool meaningful = denominator != 0 && ratio == ratio;
  return meaningful ? ratio : std::numeric_limits<Accumulate>::infinity();
}

// The feedback kept for an entry that was sent as `value` and whose sum over all workers came out as `sum`:
// rho itself for the previous-step form, Z - v for the form printed in Algorithm 1, line 5.
// Of NaN there is one: the sign and payload of a computed one depend on the device.
template <typename Accumulate>
REGTOPK_HOST_DEVICE inline Accumulate feedback_of(Accumulate sum, Accumulate value, Distortion distortion) {
  if (distortion == Distortion::kPrevious) return magnitude_ratio(sum, value);
  const Accumulate difference = sum - value;
  return difference == difference ? difference : std::numeric_limits<Accumulate>::quiet_NaN();
}

// Score of an entry that was sent in the last step: |a| tanh(rho / mu), eq. 16. An entry that was not sent scores |a|.
template <typename Accumulate>
REGTOPK_HOST_DEVICE inline Accumulate regularised_score(Accumulate accumulated, Accumulate feedback, Distortion distortion, double mu) {
  const Accumulate rho = distortion == Distortion::kPrevious ? feedback : magnitude_ratio(accumulated + feedback, accumulated);
  const double factor = tanh_of_nonnegative(static_cast<double>(rho) / mu);
  return std::abs(accumulated) * static_cast<Accumulate>(factor);
}

}  // namespace regtopk
