// The wire form of a payload: narrower values, and a shorter code of the support. What compress writes is narrowed before it
// is sent, and what arrives is widened before it is added up: two passes over the entries sent, none over the gradient.
//
//   header | exchange part | index code | values in the wire's type
//
// The index code is the payload's own, tile starts and offsets or the bitmap, or Elias-Fano's where that is asked for and
// smaller: of entry i at gradient index x the low_bits lowest bits of x, at bit i low_bits of the low part, and a 1 at bit
// (x >> low_bits) + i of the high part, whose other bits are 0. Parts begin at multiples of 8 bytes, bits from the lowest on.
// The size depends on (J, k, value types) alone and equal payloads give equal bytes.
//
// Of values in one bit or two (levels.h) there are the two levels of each tile, 16 bits each, and a code of each entry.
#pragma once

#include <limits>

#include "levels.h"
#include "payload.h"
#include "score.h"

namespace regtopk {

// Calls function(T{}, W{}) with the types of the payload's values and the wire's, which are the same or W the narrower. A bit and
// two have no type.
template <typename Function>
decltype(auto) with_wire_types(ValueType payload, ValueType wire, Function&& function) {
  return with_value_type(payload, [&]<typename T>(T) {
    return with_value_type(wire, [&]<typename W>(W) {
      if constexpr (sizeof(W) < sizeof(T)) return function(T{}, W{});
      else return function(T{}, T{});
    });
  });
}

// The wire's value for one: the nearest to its nearest fp32. Finite stays finite.
template <typename W, typename T>
REGTOPK_HOST_DEVICE W narrowed(T value) {
  constexpr T kLargest = std::numeric_limits<float>::max();
  const T bounded = !is_finite(value) ? value : value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  return Traits<W>::store(static_cast<float>(bounded));
}

// Where the parts of the wire form lie, in bytes from its beginning.
struct WireLayout {
  // Values of `type`, which is narrower than the payload's or the same.
  REGTOPK_HOST_DEVICE static WireLayout of_checked(const PayloadLayout& payload, ValueType type, int64_t bytes_per_value, bool elias_fano) {
    WireLayout wire;
    wire.type = type;
    wire.support = payload.support;
    wire.index_at = payload.tile_starts_at;
    wire.low_bits = 0;
    while (wire.low_bits < 16 && payload.numel >> (wire.low_bits + 1) >= payload.k) ++wire.low_bits;
    wire.high_at = round_up(wire.index_at + (payload.k * wire.low_bits + 7) / 8, 8);
    wire.high_bits = payload.k + ((payload.numel - 1) >> wire.low_bits) + 1;
    wire.values_at = round_up(wire.high_at + (wire.high_bits + 7) / 8, 8);
    if (elias_fano && wire.values_at < payload.values_at) wire.support = Support::kEliasFano;
    else wire.values_at = payload.values_at;
    wire.codes_at = round_up(wire.values_at + payload.tiles * 4, 8);
    const int64_t codes_end = round_up(wire.codes_at + (payload.k * wire.code_bits() + 7) / 8, 8);
    wire.bytes = round_up(wire.has_levels() ? codes_end : wire.values_at + payload.k * bytes_per_value, 16);
    return wire;
  }
  static WireLayout of(const PayloadLayout& payload, ValueType type, bool elias_fano) {
    return of_checked(payload, type, type == ValueType::kTwoBits || type == ValueType::kSign ? 0 : value_bytes(type), elias_fano);
  }

  ValueType type;
  Support support;
  int low_bits;
  int64_t high_bits;
  int64_t index_at, high_at, values_at, codes_at, bytes;

  REGTOPK_HOST_DEVICE int code_bits() const { return type == ValueType::kSign ? 1 : type == ValueType::kTwoBits ? 2 : 0; }  // of a value
  REGTOPK_HOST_DEVICE bool has_levels() const { return code_bits() > 0; }
  REGTOPK_HOST_DEVICE bool has_code() const { return support == Support::kEliasFano; }

 private:
  REGTOPK_HOST_DEVICE static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
};

// The header of a wire form, but for what differs from rank to rank and from step to step.
std::optional<PayloadError> check_wire_header(const PayloadHeader& header, const PayloadLayout& layout, const WireLayout& wire);

// Writes the wire form of a payload of this process, at an address that is a multiple of 8. The payload's values become what
// the wire carries, and the difference returns to the residual [J] of the accumulate type: sent plus kept stays what was given.
void to_wire(
    const PayloadLayout& layout, const WireLayout& wire, uint8_t* payload, void* residual, uint8_t* bytes, const ParallelFor& parallel_for);

// The payload that untrusted bytes of the size that `wire` gives stand for; where its index code is the payload's own, as
// unchecked as they are.
std::optional<PayloadError> from_wire(const PayloadLayout& layout, const WireLayout& wire, const uint8_t* bytes, uint8_t* payload);

}  // namespace regtopk
