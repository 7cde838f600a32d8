// Values in one bit or two: a payload tile's values share two levels, of the sign what is positive and what is negative has one each, and in
// two bits, a sign and a side, what is low and what is high.
//
//   m = |v| in units of 2^(e - 40), rounded down, where 2^e <= the tile's largest |v| < 2^(e + 1)
//   high: m at least the mean of the tile's m > 0;  low: the others
//   level of a side: the mean of its m, at most 7/4 of its smallest one, rounded down to 8 bits that are not below what an fp32
//   of the side's largest value resolves
//   where the tile has an m of 0, a level is 0: in two bits the low one, of the sign an empty side's, or that of either by a bit of their sums
//
// So a level is at most twice any |a| that it stands for and a multiple of its last bit: a - level is exact in the accumulate type, and
// an entry of 0 is sent as 0. A side that waits grows, and the bit is another: neither waits for long, whatever the sizes. Sums are of integers:
// any order gives the same bytes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "score.h"
#include "value_types.h"

namespace regtopk {

// What the values of a tile have in common; gathered in three passes, in any order.
struct TileMeasure {
  static constexpr int kFractionBits = 40;

  bool finite = true;
  int exponent = 0;  // e
  uint64_t sum = 0;  // of all m
  uint32_t count = 0, zeros = 0;  // of m > 0, and of m = 0
  struct Side {
    uint64_t sum = 0, smallest = ~0ull, largest = 0;
    uint32_t count = 0;
  } sides[2];  // low and high, or positive and negative

  // The exponent that belongs to the tile's largest magnitude. Below it fp64 has magnitudes for which 2^(40 - e) is no double.
  REGTOPK_HOST_DEVICE static int exponent_of(double largest) {
    const int biased = static_cast<int>(std::bit_cast<uint64_t>(largest) >> 52 & 0x7ff);
    return biased < 100 ? 100 - 1023 : biased - 1023;
  }
  REGTOPK_HOST_DEVICE static double power_of_two(int exponent) {
    return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
  }
  REGTOPK_HOST_DEVICE uint64_t fixed(double magnitude) const {
    return static_cast<uint64_t>(
        static_cast<int64_t>(magnitude * power_of_two(kFractionBits - exponent)));  // an instruction, unlike to unsigned
  }
  // The side of an m above 0, in values of so many bits.
  REGTOPK_HOST_DEVICE int side_of(int bits, uint64_t m, bool negative) const { return bits == 1 ? negative : m * count >= sum; }
  REGTOPK_HOST_DEVICE uint32_t code_of(int bits, uint64_t m, bool negative) const {
    if (m == 0)
      return zeros > 0 ? static_cast<uint32_t>(side_of_zeros(bits)) : 0;  // of a tile that is not finite all m are 0, and none counted
    const uint32_t side = static_cast<uint32_t>(side_of(bits, m, negative));
    return bits == 1 ? side : side << 1 | (negative ? 1 : 0);
  }

  // A level in the tile's units.
  REGTOPK_HOST_DEVICE static uint64_t level_of(const Side& side) {
    if (side.count == 0) return 0;
    const uint64_t mean = side.sum / side.count, most = side.smallest + side.smallest / 2 + side.smallest / 4;
    const uint64_t level = mean < most ? mean : most;
    // Of the side's largest value an fp32 resolves 2^-23, a value's accumulate type one more where rounding carried.
    const int cut = std::max(bits_of(level) - 8, bits_of(side.largest) - 22);
    return cut <= 0 ? level : cut >= 64 ? 0 : level >> cut << cut;
  }
  REGTOPK_HOST_DEVICE int side_of_zeros(int bits) const {
    if (bits == 2 || sides[0].count == 0) return 0;
    if (sides[1].count == 0) return 1;
    return static_cast<int>((sides[0].sum * 0x9e3779b97f4a7c15ull + sides[1].sum * 0xc2b2ae3d27d4eb4full) >> 63);
  }
  REGTOPK_HOST_DEVICE uint64_t level(int bits, int side) const {
    return zeros > 0 && side == side_of_zeros(bits) ? 0 : level_of(sides[side]);
  }
  // The largest of L's values that is not above it; NaN where the tile holds what is not finite.
  template <typename L>
  REGTOPK_HOST_DEVICE L stored(uint64_t level) const {
    if (!finite) return Traits<L>::store(std::numeric_limits<float>::quiet_NaN());
    constexpr double kLargest = std::numeric_limits<float>::max();
    // Two factors: each is a normal number where their product is not.
    const double value = static_cast<double>(level) * power_of_two(-kFractionBits) * power_of_two(exponent);
    // What fp32 does not reach stays behind.
    L result = Traits<L>::store(value > kLargest ? 0.0f : static_cast<float>(value));
    if (static_cast<double>(to_float(result)) > value) --result.bits;
    return result;
  }

 private:
  REGTOPK_HOST_DEVICE static int bits_of(uint64_t value) {
    int bits = 0;
    for (; value != 0; value >>= 1) ++bits;
    return bits;
  }
};

// The type of the levels: what it holds the payload's values hold too.
template <typename T>
using Level = std::conditional_t<std::is_same_v<T, Half>, Half, BFloat16>;

// What a code of so many bits stands for; its lowest bit is the sign.
REGTOPK_HOST_DEVICE inline int level_of_code(int bits, uint32_t code) { return static_cast<int>(bits == 1 ? code : code >> 1); }
template <typename T>
REGTOPK_HOST_DEVICE T value_of_code(Level<T> level, uint32_t code) {
  return Traits<T>::store((code & 1) != 0 ? -to_float(level) : to_float(level));
}

}  // namespace regtopk
