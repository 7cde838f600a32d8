#include "wire.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

namespace regtopk {
namespace {

// Sets bits of 64-bit words that other threads set bits of too, a word at a time.
class BitSetter {
 public:
  explicit BitSetter(uint8_t* begin) : words_(reinterpret_cast<uint64_t*>(begin)) {}
  ~BitSetter() { flush(); }
  BitSetter(const BitSetter&) = delete;
  BitSetter& operator=(const BitSetter&) = delete;

  // `count` bits of a value that has no others.
  void set(int64_t at, uint64_t value, int count) {
    move_to(at / 64);
    bits_ |= value << (at % 64);
    if (at % 64 + count <= 64) return;
    move_to(at / 64 + 1);
    bits_ |= value >> (64 - at % 64);
  }

 private:
  void move_to(int64_t word) {
    if (word == word_) return;
    flush();
    word_ = word;
  }
  void flush() {
    if (bits_ != 0) std::atomic_ref(words_[word_]).fetch_or(bits_, std::memory_order_relaxed);
    bits_ = 0;
  }

  uint64_t* const words_;
  int64_t word_ = 0;
  uint64_t bits_ = 0;
};

PayloadHeader wire_header(PayloadHeader header, const WireLayout& wire) {
  header.value_type = wire.type;
  header.support = wire.support;
  return header;
}

// Writes tile starts and support of what the code stands for.
template <bool kBitmap>
std::optional<PayloadError> decode(const PayloadLayout& layout, const WireLayout& wire, const uint8_t* bytes, uint8_t* payload) {
  const uint8_t* const low = bytes + wire.index_at;
  const uint8_t* const high = bytes + wire.high_at;
  const int low_bits = wire.low_bits;
  const uint32_t low_mask = (1u << low_bits) - 1;
  uint32_t* const starts = reinterpret_cast<uint32_t*>(payload + layout.tile_starts_at);
  uint16_t* const offsets = reinterpret_cast<uint16_t*>(payload + layout.support_at);
  uint8_t* const bits_of = payload + layout.support_at;
  const uint64_t numel = static_cast<uint64_t>(layout.numel), k = static_cast<uint64_t>(layout.k);
  const uint64_t words = static_cast<uint64_t>(wire.values_at - wire.high_at) / 8;
  uint64_t entry = 0, low_at = 0, least = 0;  // of the next index
  uint64_t next = 0;                          // index at which another tile begins, or none
  int64_t tile = -1;
  for (uint64_t word = 0; word < words; ++word) {
    uint64_t bits = 0;
    std::memcpy(&bits, high + word * 8, 8);
    for (; bits != 0; bits &= bits - 1) {
      if (entry == k) return PayloadError{"entries in the index code", std::to_string(k), "more"};
      uint32_t low_word;  // of at most 16 bits; its four bytes reach into the high part at most
      std::memcpy(&low_word, low + low_at / 8, sizeof low_word);
      const uint64_t index =
          (word * 64 + static_cast<uint64_t>(std::countr_zero(bits)) - entry) << low_bits | (low_word >> (low_at % 8) & low_mask);
      if (index < least || index >= next) {
        if (index < least || index >= numel) {
          return PayloadError{
              "index of entry " + std::to_string(entry),
              "more than " + std::to_string(static_cast<int64_t>(least) - 1) + " and less than " + std::to_string(numel),
              std::to_string(index)};
        }
        for (; index >= next; next += kTileEntries) starts[++tile] = static_cast<uint32_t>(entry);
        next = std::min(next, numel);
      }
      if constexpr (kBitmap) bits_of[index / 8] |= static_cast<uint8_t>(1u << (index % 8));
      else offsets[entry] = static_cast<uint16_t>(index);
      least = index + 1;
      ++entry;
      low_at += static_cast<uint64_t>(low_bits);
    }
  }
  if (entry < k) return PayloadError{"entries in the index code", std::to_string(k), std::to_string(entry)};
  while (++tile < layout.tiles) starts[tile] = static_cast<uint32_t>(entry);
  return std::nullopt;
}

// What the values of a tile have in common; units[i] = m of value i, where all are finite.
template <typename T>
TileMeasure measured(const T* values, int64_t count, int bits, std::vector<uint64_t>& units) {
  TileMeasure tile;
  const auto magnitude_of = [&](int64_t i) { return std::abs(static_cast<double>(Traits<T>::load(values[i]))); };
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = magnitude_of(i);
    tile.finite &= is_finite(magnitude);
    largest = std::max(largest, magnitude);
  }
  if (!tile.finite) return tile;
  tile.exponent = TileMeasure::exponent_of(largest);
  units.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    units[i] = tile.fixed(magnitude_of(i));
    tile.sum += units[i];
    tile.count += units[i] > 0;
  }
  tile.zeros = static_cast<uint32_t>(count) - tile.count;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t m = units[i];
    if (m == 0) continue;
    // No branch: which side a value is on cannot be foreseen.
    TileMeasure::Side& side = tile.sides[tile.side_of(bits, m, Traits<T>::load(values[i]) < 0)];
    side.sum += m;
    side.smallest = std::min(side.smallest, m);
    side.largest = std::max(side.largest, m);
    ++side.count;
  }
  return tile;
}

// What each code of a tile stands for.
template <typename T>
struct CodeValues {
  T of[4];
  CodeValues(int bits, const Level<T>* levels) {
    for (uint32_t code = 0; code < 1u << bits; ++code) of[code] = value_of_code<T>(levels[level_of_code(bits, code)], code);
  }
};

// What the codes of the entries of a tile stand for, a byte of them at a time.
template <int kBits, typename T>
void read_codes(const uint8_t* codes, const Level<T>* levels, int64_t entry, int64_t end, T* values) {
  constexpr int64_t kInByte = 8 / kBits;
  const CodeValues<T> code_values(kBits, levels);
  const auto value = [&](unsigned byte, int64_t place) { return code_values.of[byte >> (place * kBits) & ((1 << kBits) - 1)]; };
  for (; entry < end && entry % kInByte != 0; ++entry) values[entry] = value(codes[entry / kInByte], entry % kInByte);
  for (; entry + kInByte <= end; entry += kInByte) {
    const unsigned byte = codes[entry / kInByte];
    for (int64_t place = 0; place < kInByte; ++place) values[entry + place] = value(byte, place);
  }
  for (; entry < end; ++entry) values[entry] = value(codes[entry / kInByte], entry % kInByte);
}

// Calls function(entry, offset, residual of the entry) for each entry of a tile; residuals, each a line of its own, are on their way
// some entries ahead.
template <typename Accumulate, typename Function>
void for_each_residual(const PayloadView& view, int64_t tile, Accumulate* residual, const Function& function) {
  constexpr int64_t kAhead = 16;
  residual += tile * kTileEntries;
  const bool has_offsets = view.layout().support == Support::kOffsets;
  const uint16_t* const offsets = view.offsets();
  const int64_t end = view.first_entry(tile + 1);
  view.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
    if (has_offsets && entry + kAhead < end) __builtin_prefetch(residual + offsets[entry + kAhead], 1);
    function(entry, residual[offset]);
  });
}

// Narrows the values of one tile, and gives what they leave out to the residual.
template <typename T, typename W>
void narrow_tile(const PayloadView& view, int64_t tile, T* values, W* narrow, T* residual) {
  for_each_residual(view, tile, residual, [&](int64_t entry, T& kept) {
    const T value = values[entry];
    narrow[entry] = narrowed<W>(value);
    values[entry] = Traits<W>::load(narrow[entry]);
    if (value != 0 && is_finite(value)) kept = kept + value - values[entry];
  });
}

// The same in codes of one bit or two.
template <typename T>
void code_tile(
    int bits, const PayloadView& view, int64_t tile, T* values, Level<T>* levels, BitSetter& codes,
    typename Traits<T>::Accumulate* residual, std::vector<uint64_t>& units) {
  const int64_t begin = view.first_entry(tile);
  const TileMeasure measure = measured(values + begin, view.first_entry(tile + 1) - begin, bits, units);
  for (int side : {0, 1}) levels[tile * 2 + side] = measure.template stored<Level<T>>(measure.level(bits, side));
  const CodeValues<T> code_values(bits, levels + tile * 2);
  for_each_residual(view, tile, residual, [&](int64_t entry, auto& kept) {
    const auto value = Traits<T>::load(values[entry]);
    const uint64_t m = measure.finite ? units[entry - begin] : 0;
    const uint32_t code = measure.code_of(bits, m, value < 0);
    codes.set(entry * bits, code, bits);
    values[entry] = code_values.of[code];
    if (value == 0 || !is_finite(value)) return;
    kept = kept + value;
    // Of a tile that is not finite nothing is applied: its round is void.
    if (measure.finite) kept = kept - Traits<T>::load(values[entry]);
  });
}

}  // namespace

std::optional<PayloadError> check_wire_header(const PayloadHeader& header, const PayloadLayout& layout, const WireLayout& wire) {
  const PayloadHeader wanted = wire_header(make_header(layout, header.step, header.plan), wire);
  const std::pair<const char*, std::pair<uint64_t, uint64_t>> fields[] = {
      {"magic", {wanted.magic, header.magic}},
      {"version", {wanted.version, header.version}},
      {"value type", {static_cast<uint64_t>(wanted.value_type), static_cast<uint64_t>(header.value_type)}},
      {"support", {static_cast<uint64_t>(wanted.support), static_cast<uint64_t>(header.support)}},
      {"numel", {wanted.numel, header.numel}},
      {"k", {wanted.k, header.k}},
      {"spans", {wanted.spans, header.spans}}};
  for (const auto& [name, values] : fields) {
    if (values.first != values.second) return PayloadError{name, std::to_string(values.first), std::to_string(values.second)};
  }
  return std::nullopt;
}

void to_wire(
    const PayloadLayout& layout, const WireLayout& wire, uint8_t* payload, void* residual, uint8_t* bytes,
    const ParallelFor& parallel_for) {
  const PayloadView view(payload, layout);
  const PayloadHeader header = wire_header(view.header(), wire);
  std::memcpy(bytes, &header, sizeof header);
  std::memcpy(bytes + sizeof header, payload + sizeof header, wire.index_at - sizeof header);
  if (wire.has_code()) std::memset(bytes + wire.index_at, 0, wire.values_at - wire.index_at);
  else std::memcpy(bytes + wire.index_at, payload + wire.index_at, wire.values_at - wire.index_at);
  const auto write_code = [&](int64_t tile, BitSetter& low, BitSetter& high) {
    if (!wire.has_code()) return;
    view.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
      const uint64_t index = static_cast<uint64_t>(tile * kTileEntries + offset);
      low.set(entry * wire.low_bits, index & ((1ull << wire.low_bits) - 1), wire.low_bits);
      high.set(static_cast<int64_t>(index >> wire.low_bits) + entry, 1, 1);
    });
  };
  if (wire.has_levels()) {
    std::memset(bytes + wire.values_at, 0, wire.bytes - wire.values_at);
    return with_value_type(layout.type, [&]<typename T>(T) {
      T* const values = reinterpret_cast<T*>(payload + layout.values_at);
      parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
        BitSetter low(bytes + wire.index_at), high(bytes + wire.high_at), codes(bytes + wire.codes_at);
        std::vector<uint64_t> units;
        auto* const kept = static_cast<typename Traits<T>::Accumulate*>(residual);
        for (int64_t tile = begin; tile < end; ++tile) {
          write_code(tile, low, high);
          code_tile(wire.code_bits(), view, tile, values, reinterpret_cast<Level<T>*>(bytes + wire.values_at), codes, kept, units);
        }
      });
    });
  }
  with_wire_types(layout.type, wire.type, [&]<typename T, typename W>(T, W) {
    using Accumulate = typename Traits<T>::Accumulate;
    T* const values = reinterpret_cast<T*>(payload + layout.values_at);
    W* const narrow = reinterpret_cast<W*>(bytes + wire.values_at);
    Accumulate* const kept = static_cast<Accumulate*>(residual);
    const int64_t values_end = wire.values_at + layout.k * static_cast<int64_t>(sizeof(W));
    std::memset(bytes + values_end, 0, wire.bytes - values_end);
    if constexpr (sizeof(T) == sizeof(W)) {
      std::memcpy(narrow, values, layout.k * sizeof(T));
      if (!wire.has_code()) return;
    }
    parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
      BitSetter low(bytes + wire.index_at), high(bytes + wire.high_at);
      for (int64_t tile = begin; tile < end; ++tile) {
        write_code(tile, low, high);
        if constexpr (sizeof(W) < sizeof(T)) narrow_tile(view, tile, values, narrow, kept);
      }
    });
  });
}

std::optional<PayloadError> from_wire(const PayloadLayout& layout, const WireLayout& wire, const uint8_t* bytes, uint8_t* payload) {
  PayloadHeader header;
  std::memcpy(&header, bytes, sizeof header);
  if (auto error = check_wire_header(header, layout, wire)) return error;
  return with_value_type(layout.type, [&]<typename T>(T) -> std::optional<PayloadError> {
    PayloadWriter<T> writer(payload, layout);  // zeroes all but the values
    header.value_type = layout.type;
    header.support = layout.support;
    writer.set_header(header);
    std::memcpy(payload + sizeof header, bytes + sizeof header, wire.index_at - sizeof header);
    if (!wire.has_code()) std::memcpy(payload + wire.index_at, bytes + wire.index_at, wire.values_at - wire.index_at);
    else if (auto error = (layout.support == Support::kBitmap ? decode<true> : decode<false>)(layout, wire, bytes, payload)) return error;
    T* const values = writer.values();
    if (!wire.has_levels()) {
      with_wire_types(layout.type, wire.type, [&]<typename U, typename W>(U, W) {
        const W* const narrow = reinterpret_cast<const W*>(bytes + wire.values_at);
        for (int64_t entry = 0; entry < layout.k; ++entry) values[entry] = Traits<T>::store(Traits<W>::load(narrow[entry]));
      });
      return std::nullopt;
    }
    const PayloadView view(payload, layout);
    const Level<T>* const levels = reinterpret_cast<const Level<T>*>(bytes + wire.values_at);
    int64_t entry = 0;
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      const int64_t end = tile + 1 < layout.tiles ? std::min(view.first_entry(tile + 1), layout.k) : layout.k;
      const auto read = wire.code_bits() == 1 ? read_codes<1, T> : read_codes<2, T>;
      read(bytes + wire.codes_at, levels + tile * 2, entry, end, values);
      entry = std::max(entry, end);
    }
    return std::nullopt;
  });
}

}  // namespace regtopk
