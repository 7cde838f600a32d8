// The kernels, written once over a vector type V: lanes of fp32 and of 32-bit keys, and the operations on them. Included
// by one file per instruction set; everything has internal linkage, see kernels.h.
//
// V::Mask says yes or no per lane; V::bits makes it an integer. Keys are below 2^31, so signed comparisons order them.
#pragma once

#include "kernels.h"

namespace regtopk {
namespace {

constexpr uint32_t kInfinityKey = 0x7f800000u;
constexpr uint32_t kNanKey = 0x7fc00000u;

// The value types: how lanes are read from memory, what the wire carries for a value (the nearest one, a finite value
// never made infinite, and one NaN), and what is kept of a finite value that is sent: a - v.
struct Float32 {
  using Stored = float;
  template <typename V>
  static typename V::Floats load(const float* from) {
    return V::load(from);
  }
  template <typename V>
  static typename V::Floats load_first(const float* from, int64_t count) {
    return V::load_first(from, count);
  }
  template <typename V>
  static typename V::Floats wire_of(typename V::Floats value) {
    return V::select(V::above(V::magnitude(value), V::keys(kInfinityKey)), V::as_floats(V::keys(kNanKey)), value);
  }
  template <typename V>
  static typename V::Floats kept_of(typename V::Floats) {
    return V::floats(0.0f);
  }
  template <typename V>
  static void store(float* to, typename V::Floats wire) {
    V::store(to, wire);
  }
  template <typename V>
  static void store_first(float* to, int64_t count, typename V::Floats wire) {
    V::store_first(to, count, wire);
  }
};

template <typename T>
struct SixteenBits {
  using Stored = uint16_t;
  template <typename V>
  static typename V::Floats load(const uint16_t* from) {
    return T::template widen<V>(V::load_u16(from));
  }
  template <typename V>
  static typename V::Floats load_first(const uint16_t* from, int64_t count) {
    return T::template widen<V>(V::load_first_u16(from, count));
  }
  template <typename V>
  static typename V::Keys wire_of(typename V::Floats value) {
    const auto magnitude = V::magnitude(value);
    const auto sign = V::template shift_left<15>(V::template shift_right<31>(V::as_keys(value)));
    auto wire = V::smaller(T::template round<V>(magnitude), V::keys(T::kLargest));
    wire = V::select(V::at_least(magnitude, V::keys(kInfinityKey)), V::keys(T::kInfinity), wire);
    wire = V::either(wire, sign);
    return V::select(V::above(magnitude, V::keys(kInfinityKey)), V::keys(T::kNan), wire);
  }
  template <typename V>
  static typename V::Floats kept_of(typename V::Floats value) {
    return V::difference(value, T::template widen<V>(wire_of<V>(value)));
  }
  template <typename V>
  static void store(uint16_t* to, typename V::Keys wire) {
    V::store_u16(to, wire);
  }
  template <typename V>
  static void store_first(uint16_t* to, int64_t count, typename V::Keys wire) {
    V::store_first_u16(to, count, wire);
  }
};

struct BFloat16 : SixteenBits<BFloat16> {
  static constexpr uint32_t kInfinity = 0x7f80u, kLargest = 0x7f7fu, kNan = 0x7fc0u;
  template <typename V>
  static typename V::Floats widen(typename V::Keys stored) {
    return V::as_floats(V::template shift_left<16>(stored));
  }
  // To nearest even; the sign is left out.
  template <typename V>
  static typename V::Keys round(typename V::Keys magnitude) {
    const auto odd = V::both(V::template shift_right<16>(magnitude), V::keys(1));
    return V::template shift_right<16>(V::sum(V::sum(magnitude, V::keys(0x7fffu)), odd));
  }
};

struct Float16 : SixteenBits<Float16> {
  static constexpr uint32_t kInfinity = 0x7c00u, kLargest = 0x7bffu, kNan = 0x7e00u;
  template <typename V>
  static typename V::Floats widen(typename V::Keys stored) {
    return V::widen_half(stored);
  }
  template <typename V>
  static typename V::Keys round(typename V::Keys magnitude) {
    return V::round_to_half(V::as_floats(magnitude));
  }
};

// Lists entries of vectors of accumulated values.
template <typename V, typename T, bool kFirstTime>
struct Lister {
  const AccumulateArguments& arguments;
  int64_t listed = 0;
  bool non_finite = false;

  // For finite entries that are stored as the residual already.
  void list(int64_t at) {
    const auto accumulated = V::load(arguments.residual + at);
    const auto keys = V::magnitude(accumulated);
    const auto listing = V::at_least(keys, V::keys(arguments.list_from));
    const auto sending = V::above(keys, V::keys(arguments.sent_above)) & listing;
    V::store_where(arguments.residual + at, sending, T::template kept_of<V>(accumulated));
    append(V::bits(listing), accumulated, keys, at);
  }

  // For any entries, of which only `lanes` exist.
  void store_and_list(typename V::Floats accumulated, typename V::Mask lanes, int64_t at) {
    using Mask = typename V::Mask;
    auto keys = V::magnitude(accumulated);
    const Mask odd = V::at_least(keys, V::keys(kInfinityKey)) & lanes;
    keys = V::select(V::above(keys, V::keys(kInfinityKey)), V::keys(kNanKey), keys);
    const Mask listing = V::at_least(keys, V::keys(arguments.list_from)) & lanes;
    const Mask sending = V::above(keys, V::keys(arguments.sent_above)) & listing;
    const Mask writing = V::without(kFirstTime ? lanes : sending, odd);
    non_finite |= V::bits(odd) != 0;
    V::store_where(arguments.residual + at, writing, V::select(sending, T::template kept_of<V>(accumulated), accumulated));
    append(V::bits(listing), accumulated, keys, at);
  }

  void append(unsigned listing, typename V::Floats accumulated, typename V::Keys keys, int64_t at) {
    const ListArrays& out = arguments.out;
    V::store(out.values + listed, V::compress(listing, accumulated));
    V::store_keys(out.keys + listed, V::compress(listing, keys));
    const auto offsets = V::sum(V::lane_numbers(), V::keys(arguments.first_offset + static_cast<uint32_t>(at)));
    V::store_u16(out.offsets + listed, V::compress(listing, offsets));
    listed += __builtin_popcount(listing);
  }
};

// Four vectors share one branch: with few listed entries it is not taken, and the loop is an addition at the speed of
// memory. With many there is none. Streams r and g once: 8 bytes read and 4 written per fp32 entry.
template <typename V, typename T, bool kFirstTime>
int64_t accumulate_block(const AccumulateArguments& arguments) {
  using Stored = typename T::Stored;
  constexpr int64_t kVectors = kMaximumEntries;
  const Stored* const gradient = static_cast<const Stored*>(arguments.gradient);
  float* const residual = arguments.residual;
  const auto decay = V::floats(arguments.decay);
  // Entries that are not finite need care even where they are too small to be listed, an infinity below a NaN.
  const auto unusual_from = V::keys(arguments.list_from < kInfinityKey ? arguments.list_from : kInfinityKey);
  const auto infinity = V::keys(kInfinityKey);
  Lister<V, T, kFirstTime> lister{arguments};
  int64_t at = 0;
  for (; at + kVectors * V::kLanes <= arguments.entries; at += kVectors * V::kLanes) {
    typename V::Floats accumulated[kVectors];
    typename V::Keys largest = V::keys(0);
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const int64_t first = at + vector * V::kLanes;
      accumulated[vector] = V::load(residual + first);
      if constexpr (kFirstTime) accumulated[vector] = V::sum(V::product(accumulated[vector], decay), T::template load<V>(gradient + first));
      largest = V::larger(largest, V::magnitude(accumulated[vector]));
    }
    if (arguments.maxima != nullptr) V::store_keys(arguments.maxima + at / kVectors, largest);
    if (V::bits(V::at_least(largest, infinity)) != 0) [[unlikely]] {
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        lister.store_and_list(accumulated[vector], V::all_lanes(), at + vector * V::kLanes);
      }
      continue;
    }
    if constexpr (kFirstTime) {
      for (int64_t vector = 0; vector < kVectors; ++vector) V::store(residual + at + vector * V::kLanes, accumulated[vector]);
    }
    if (arguments.crowded) {
      for (int64_t vector = 0; vector < kVectors; ++vector) lister.list(at + vector * V::kLanes);
      continue;
    }
    if (V::bits(V::at_least(largest, unusual_from)) == 0) [[likely]]
      continue;
    unsigned vectors = 0;
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const bool any = V::bits(V::at_least(V::magnitude(accumulated[vector]), unusual_from)) != 0;
      vectors |= static_cast<unsigned>(any) << vector;
    }
    for (; vectors != 0; vectors &= vectors - 1) lister.list(at + __builtin_ctz(vectors) * V::kLanes);
  }
  for (; at < arguments.entries; at += V::kLanes) {
    const int64_t count = arguments.entries - at < V::kLanes ? arguments.entries - at : V::kLanes;
    typename V::Floats accumulated = V::load_first(residual + at, count);
    if constexpr (kFirstTime) accumulated = V::sum(V::product(accumulated, decay), T::template load_first<V>(gradient + at, count));
    lister.store_and_list(accumulated, V::first_lanes(count), at);
  }
  if (lister.non_finite) *arguments.non_finite = true;
  return lister.listed;
}

template <typename V>
void count_keys(const uint32_t* keys, int64_t count, uint32_t key, int64_t* above, int64_t* equal) {
  int64_t more = 0, same = 0;
  for (int64_t at = 0; at < count; at += V::kLanes) {
    const auto lanes = V::first_lanes(count - at);
    const auto here = V::load_keys(keys + at);
    more += __builtin_popcount(V::bits(V::above(here, V::keys(key)) & lanes));
    same += __builtin_popcount(V::bits(V::same(here, V::keys(key)) & lanes));
  }
  *above = more;
  *equal = same;
}

template <typename V>
int64_t gather_keys(const uint32_t* keys, int64_t count, uint32_t low, uint32_t high, uint32_t* out) {
  int64_t gathered = 0;
  for (int64_t at = 0; at < count; at += V::kLanes) {
    const auto here = V::load_keys(keys + at);
    const auto in_range = V::without(V::at_least(here, V::keys(low)), V::above(here, V::keys(high)));
    const unsigned bits = V::bits(in_range & V::first_lanes(count - at));
    V::store_keys(out + gathered, V::compress(bits, here));
    gathered += __builtin_popcount(bits);
  }
  return gathered;
}

template <typename V, typename T>
int64_t pack_block(const PackArguments& arguments) {
  using Stored = typename T::Stored;
  Stored* const out = static_cast<Stored*>(arguments.values);
  int64_t sent = 0;
  for (int64_t at = 0; at < arguments.listed; at += V::kLanes) {
    const auto lanes = V::first_lanes(arguments.listed - at);
    const auto keys = V::load_keys(arguments.list.keys + at);
    const auto values = V::load(arguments.list.values + at);
    const auto offsets = V::load_u16(arguments.list.offsets + at);
    const auto tie = V::without(V::same(keys, V::keys(arguments.boundary_key)), V::at_least(offsets, V::keys(arguments.ties_until)));
    const unsigned sending = V::bits((V::above(keys, V::keys(arguments.boundary_key)) | tie) & lanes);
    const unsigned foreseen = V::bits(V::above(keys, V::keys(arguments.sent_above)) & lanes);
    const unsigned finite = ~V::bits(V::at_least(V::magnitude(values), V::keys(kInfinityKey)));
    const uint16_t* const offset = arguments.list.offsets + at;
    if (const unsigned wrong = (sending ^ foreseen) & finite) {
      float accumulated[V::kLanes], kept[V::kLanes];
      V::store(accumulated, values);
      V::store(kept, T::template kept_of<V>(values));
      for (unsigned rest = wrong; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        arguments.residual[offset[lane]] = (sending >> lane & 1) != 0 ? kept[lane] : accumulated[lane];
      }
    }
    if (sending == 0) continue;
    const int64_t count = __builtin_popcount(sending);
    T::template store_first<V>(out + sent, count, T::template wire_of<V>(V::compress(sending, values)));
    if (arguments.offsets != nullptr) {
      V::store_first_u16(arguments.offsets + sent, count, V::compress(sending, offsets));
    } else {
      for (unsigned rest = sending; rest != 0; rest &= rest - 1) {
        const uint16_t where = offset[__builtin_ctz(rest)];
        arguments.bitmap[where >> 3] = static_cast<uint8_t>(arguments.bitmap[where >> 3] | 1u << (where & 7));
      }
    }
    sent += count;
  }
  return sent;
}

// Calls body(lanes with a bit, first lane, payload entry) for each vector of a block. Without a branch on vectors that have
// none: at the densities that have bitmaps it would be foreseen wrongly too often.
template <typename V, typename Body>
int64_t visit_bitmap(const BitmapArguments& arguments, const Body& body) {
  int64_t entry = 0, at = 0;
  const auto visit = [&](unsigned lanes) {
    body(lanes, at, entry);
    entry += __builtin_popcount(lanes);
  };
  for (; at + V::kLanes <= arguments.entries; at += V::kLanes) {
    unsigned lanes = 0;
    __builtin_memcpy(&lanes, arguments.bitmap + at / 8, V::kLanes / 8);
    visit(lanes);
  }
  if (at < arguments.entries) {
    unsigned lanes = 0;
    __builtin_memcpy(&lanes, arguments.bitmap + at / 8, static_cast<size_t>(arguments.entries - at + 7) / 8);
    visit(lanes);
  }
  return entry;
}

// The lanes without a bit add +0, which changes no sum: one that begins with +0 is never -0.
template <typename V, typename T>
int64_t add_values(const BitmapArguments& arguments) {
  const auto* const values = static_cast<const typename T::Stored*>(arguments.values);
  return visit_bitmap<V>(arguments, [&](unsigned lanes, int64_t at, int64_t entry) {
    const auto spread = V::expand(lanes, T::template load_first<V>(values + entry, __builtin_popcount(lanes)));
    V::store(arguments.sums + at, V::sum(V::load(arguments.sums + at), spread));
  });
}

template <typename V>
int64_t take_sums(const BitmapArguments& arguments) {
  return visit_bitmap<V>(arguments, [&](unsigned lanes, int64_t at, int64_t entry) {
    V::store_first(arguments.taken + entry, __builtin_popcount(lanes), V::compress(lanes, V::load(arguments.sums + at)));
  });
}

// Writes each gradient entry once and reads only the sums that are not zero.
template <typename V, typename T>
void write_average(const AverageArguments& arguments) {
  using Stored = typename T::Stored;
  constexpr int64_t kVectorBytes = V::kLanes * 4;
  Stored* const out = static_cast<Stored*>(arguments.gradient);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  const auto divisor = V::floats(arguments.divisor);
  const auto zero = V::floats(0.0f);
  const bool streaming = arguments.streaming && aligned;
  const auto infinity = V::keys(kInfinityKey);
  auto unusual = V::at_least(V::keys(0), infinity);  // nowhere
  const auto average_at = [&](int64_t at) {
    const auto average = V::quotient(V::load(arguments.sums + at), divisor);
    unusual = unusual | V::at_least(V::magnitude(average), infinity);
    return T::template wire_of<V>(average);
  };
  for (int64_t block = 0; block * kAverageBlock < arguments.entries; ++block) {
    const int64_t first = block * kAverageBlock;
    const bool touched = arguments.touched[block] != 0;
    if (arguments.entries - first < kAverageBlock) {
      for (int64_t at = first; at < arguments.entries; at += V::kLanes) {
        const auto wire = average_at(at);
        const int64_t count = arguments.entries - at < V::kLanes ? arguments.entries - at : V::kLanes;
        T::template store_first<V>(out + at, count, wire);
        V::store(arguments.sums + at, zero);
      }
    } else if (touched) {
      for (int64_t at = first; at < first + kAverageBlock; at += V::kLanes) {
        const auto wire = average_at(at);
        if (streaming) V::stream(out + at, wire);
        else T::template store<V>(out + at, wire);
        V::store(arguments.sums + at, zero);
      }
    } else {
      float* const bytes = reinterpret_cast<float*>(out + first);
      constexpr int64_t kFloats = kAverageBlock * static_cast<int64_t>(sizeof(Stored)) / 4;
      for (int64_t at = 0; at < kFloats; at += V::kLanes) {
        if (streaming) V::stream(bytes + at, zero);
        else V::store(bytes + at, zero);
      }
    }
  }
  if (V::bits(unusual) != 0) *arguments.non_finite = true;
  if (streaming) V::finish_streaming();
}

template <typename V, typename T>
constexpr Kernels make_kernels() {
  return {
      &accumulate_block<V, T, true>,
      &accumulate_block<V, T, false>,
      &count_keys<V>,
      &gather_keys<V>,
      &pack_block<V, T>,
      &add_values<V, T>,
      &take_sums<V>,
      &write_average<V, T>};
}

}  // namespace
}  // namespace regtopk
