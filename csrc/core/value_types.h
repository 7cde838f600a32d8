// The value types of gradients and payloads, and the arithmetic types that belong to them.
//
// The storage types below mirror IEEE binary16 and bfloat16 without depending on torch. Conversions to them round to
// nearest even and saturate at the largest finite value, so that a finite value never becomes infinite on the wire.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

// nvcc compiles these functions for both sides (--expt-relaxed-constexpr lets them use std::bit_cast and the like).
#if defined(__CUDACC__)
#define REGTOPK_HOST_DEVICE __host__ __device__
#else
#define REGTOPK_HOST_DEVICE
#endif

namespace regtopk {

// Stored in the payload header: the numbers are part of the format. One bit and two are forms on the wire alone: levels.h.
enum class ValueType : uint8_t { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kTwoBits = 4, kSign = 5 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

REGTOPK_HOST_DEVICE inline float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

REGTOPK_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  // One instruction, exact like the steps below; they differ in the payload of a NaN, which goes no further.
  float exact;
  asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(value.bits));
  return exact;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: an integer multiple of 2^-24, exact in fp32.
  const float unsigned_value = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(unsigned_value));
#endif
}

REGTOPK_HOST_DEVICE inline BFloat16 round_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fc0u};
  if (magnitude == 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7f80u)};
  const uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(sign | (rounded >= 0x7f80u ? 0x7f7fu : rounded))};
}

REGTOPK_HOST_DEVICE inline Half round_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7e00u};
  if (magnitude == 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  uint32_t rounded;
  if (magnitude < (113u << 23)) {
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded to nearest even by the addition, in the low bits.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    rounded = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t rebiased = magnitude - (112u << 23);
    rounded = (rebiased + 0x0fffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | (rounded >= 0x7c00u ? 0x7bffu : rounded))};
}

// Traits<T>: how a bucket of T is computed with. Accumulate is the type of the residual, the score and the sum Z;
// Bits holds the bit pattern of an Accumulate.
template <typename T>
struct Traits;

template <>
struct Traits<double> {
  using Accumulate = double;
  using Bits = uint64_t;
  static constexpr ValueType kType = ValueType::kFloat64;
  REGTOPK_HOST_DEVICE static double load(double value) { return value; }
  REGTOPK_HOST_DEVICE static double store(double value) { return value; }
};
template <>
struct Traits<float> {
  using Accumulate = float;
  using Bits = uint32_t;
  static constexpr ValueType kType = ValueType::kFloat32;
  REGTOPK_HOST_DEVICE static float load(float value) { return value; }
  REGTOPK_HOST_DEVICE static float store(float value) { return value; }
};
template <>
struct Traits<BFloat16> {
  using Accumulate = float;
  using Bits = uint32_t;
  static constexpr ValueType kType = ValueType::kBFloat16;
  REGTOPK_HOST_DEVICE static float load(BFloat16 value) { return to_float(value); }
  REGTOPK_HOST_DEVICE static BFloat16 store(float value) { return round_to_bfloat16(value); }
};
template <>
struct Traits<Half> {
  using Accumulate = float;
  using Bits = uint32_t;
  static constexpr ValueType kType = ValueType::kFloat16;
  REGTOPK_HOST_DEVICE static float load(Half value) { return to_float(value); }
  REGTOPK_HOST_DEVICE static Half store(float value) { return round_to_half(value); }
};

inline int64_t value_bytes(ValueType type) {
  switch (type) {
    case ValueType::kFloat64:
      return 8;
    case ValueType::kFloat32:
      return 4;
    case ValueType::kBFloat16:
    case ValueType::kFloat16:
      return 2;
    default:
      break;
  }
  throw std::invalid_argument("value_bytes: expected a known value type");
}

// Calls function(T{}) with the storage type that `type` names.
template <typename Function>
decltype(auto) with_value_type(ValueType type, Function&& function) {
  switch (type) {
    case ValueType::kFloat64:
      return function(double{});
    case ValueType::kFloat32:
      return function(float{});
    case ValueType::kBFloat16:
      return function(BFloat16{});
    case ValueType::kFloat16:
      return function(Half{});
    default:
      break;
  }
  throw std::invalid_argument("with_value_type: expected a known value type");
}

}  // namespace regtopk
