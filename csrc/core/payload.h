// The payload: what one worker sends for one bucket, as bytes.
//
//   header | exchange part | entries before each tile (u32) | offsets (u16 per entry) or bitmap (1 bit per gradient entry) | values
//
// The exchange part is there where the bucket has spans, its parameters: the scale of the gradients (f64), what this rank
// alone did to its state (u64), and one bit per span, 1 where the gradient is zero in all its entries.
// Each part starts at a multiple of 8 bytes and the whole is a multiple of 16; bytes between parts are 0. A tile is
// 65,536 consecutive gradient entries, so that a u16 offset reaches exactly one. Entries are in ascending order.
// The bitmap is used where it is the smaller of the two, k / J > 1/16. The size depends on (J, k, value type) alone and
// equal input gives equal bytes. All numbers are little-endian.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "parallel.h"
#include "value_types.h"

namespace regtopk {

static_assert(std::endian::native == std::endian::little, "payloads are written in native order, which must be little");

inline constexpr uint32_t kPayloadMagic = 0x6b707472;  // "rtpk"
inline constexpr uint16_t kPayloadVersion = 1;
inline constexpr int64_t kTileEntries = 65536;
inline constexpr uint32_t kFlagNonFinite = 1;  // the accumulated gradient held an infinity or a NaN
inline constexpr uint32_t kFlagAbsent = 2;     // this rank contributes nothing: its values are 0, and the average is the others'
inline constexpr uint32_t kFlags = kFlagNonFinite | kFlagAbsent;
// Not among them, so that every receiver rejects the payload: a device had no valid support to fill it at, and its values are 0.
inline constexpr uint32_t kFlagUnfilled = 4;

enum class Support : uint8_t { kOffsets = 0, kBitmap = 1, kEliasFano = 2 };  // the last on the wire alone: wire.h

struct PayloadHeader {
  uint32_t magic;
  uint16_t version;
  ValueType value_type;
  Support support;
  uint64_t step;
  uint64_t numel;      // J
  uint64_t k;          // entries sent
  uint64_t plan;       // hash of the bucket's layout
  uint64_t repeated;   // entries that were sent in the last step too
  uint64_t displaced;  // entries that the plain magnitude would have sent and the RegTop-k factor did not
  uint32_t flags;
  uint32_t spans;      // 0 where there is no exchange part
};
static_assert(sizeof(PayloadHeader) == 64);

// The fixed beginning of the exchange part; the bits follow.
struct ExchangePart {
  double scale;   // what the gradients were multiplied by
  uint64_t deed;  // see deed.h
};

// Where the parts of a payload of (numel, k, type, spans) lie, in bytes from its beginning.
struct PayloadLayout {
  // Throws std::invalid_argument unless 1 <= k <= numel and k fits the u32 counts.
  PayloadLayout(int64_t numel, int64_t k, ValueType type, int64_t spans = 0);
  // The same of numbers that were checked before, without the exception that device code cannot throw.
  REGTOPK_HOST_DEVICE static PayloadLayout of_checked(
      int64_t numel, int64_t k, ValueType type, int64_t bytes_per_value, int64_t spans = 0) {
    PayloadLayout layout;
    layout.numel = numel;
    layout.k = k;
    layout.type = type;
    layout.support = k > numel / 16 ? Support::kBitmap : Support::kOffsets;
    layout.tiles = (numel + kTileEntries - 1) / kTileEntries;
    layout.spans = spans;
    layout.zero_bits_at = sizeof(PayloadHeader) + sizeof(ExchangePart);
    layout.tile_starts_at = spans == 0 ? sizeof(PayloadHeader) : round_up(layout.zero_bits_at + (spans + 7) / 8, 8);
    layout.support_at = round_up(layout.tile_starts_at + layout.tiles * 4, 8);
    layout.values_at = round_up(layout.support_at + (layout.support == Support::kOffsets ? k * 2 : (numel + 7) / 8), 8);
    layout.bytes = round_up(layout.values_at + k * bytes_per_value, 16);
    return layout;
  }

  int64_t numel, k;
  ValueType type;
  Support support;
  int64_t tiles, spans;
  int64_t zero_bits_at, tile_starts_at, support_at, values_at, bytes;

  REGTOPK_HOST_DEVICE int64_t tile_entries(int64_t tile) const { return tile + 1 < tiles ? kTileEntries : numel - tile * kTileEntries; }

 private:
  PayloadLayout() = default;
  REGTOPK_HOST_DEVICE static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
};

// Number of bits set. Arithmetic on words, which compilers turn into vectors; std::popcount is a call to a table on the
// plainest instruction set.
inline int64_t count_bits(const uint8_t* bytes, int64_t count) {
  const auto of_word = [](uint64_t word) {
    word -= (word >> 1) & 0x5555555555555555ull;
    word = (word & 0x3333333333333333ull) + ((word >> 2) & 0x3333333333333333ull);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0full;
    return (word * 0x0101010101010101ull) >> 56;
  };
  uint64_t total = 0, word = 0;
  int64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    std::memcpy(&word, bytes + at, 8);
    total += of_word(word);
  }
  word = 0;
  std::memcpy(&word, bytes + at, static_cast<size_t>(count - at));
  return static_cast<int64_t>(total + of_word(word));
}

// Reads a payload that check_payload found valid.
class PayloadView {
 public:
  PayloadView(const uint8_t* bytes, const PayloadLayout& layout) : bytes_(bytes), layout_(layout) {}

  const uint8_t* bytes() const { return bytes_; }
  const PayloadLayout& layout() const { return layout_; }
  PayloadHeader header() const {
    PayloadHeader header;
    std::memcpy(&header, bytes_, sizeof header);
    return header;
  }
  int64_t first_entry(int64_t tile) const {
    return tile < layout_.tiles ? reinterpret_cast<const uint32_t*>(bytes_ + layout_.tile_starts_at)[tile] : layout_.k;
  }
  ExchangePart exchange_part() const {
    ExchangePart part;
    std::memcpy(&part, bytes_ + sizeof(PayloadHeader), sizeof part);
    return part;
  }
  // Whether the gradient was zero in all entries of that span.
  bool is_zero(int64_t span) const { return (bytes_[layout_.zero_bits_at + span / 8] >> (span % 8) & 1) != 0; }
  template <typename T>
  const T* values() const {
    return reinterpret_cast<const T*>(bytes_ + layout_.values_at);
  }
  const uint16_t* offsets() const { return reinterpret_cast<const uint16_t*>(bytes_ + layout_.support_at); }
  const uint8_t* bitmap(int64_t tile) const { return bytes_ + layout_.support_at + tile * (kTileEntries / 8); }

  // The first entry at or behind that gradient index.
  int64_t entry_at(int64_t index) const;

  // Calls function(entry, offset) for each entry of a tile, ascending; offset is in [0, 65536).
  template <typename Function>
  void for_each_entry(int64_t tile, Function&& function) const {
    int64_t entry = first_entry(tile);
    if (layout_.support == Support::kOffsets) {
      const uint16_t* offsets = this->offsets();
      for (const int64_t end = first_entry(tile + 1); entry < end; ++entry) function(entry, int64_t{offsets[entry]});
      return;
    }
    const uint8_t* bitmap = this->bitmap(tile);
    const int64_t bitmap_bytes = (layout_.tile_entries(tile) + 7) / 8;
    for (int64_t byte = 0; byte < bitmap_bytes; byte += 8) {
      uint64_t bits = 0;
      std::memcpy(&bits, bitmap + byte, static_cast<size_t>(std::min<int64_t>(8, bitmap_bytes - byte)));
      for (; bits != 0; bits &= bits - 1) function(entry++, byte * 8 + std::countr_zero(bits));
    }
  }

 private:
  const uint8_t* bytes_;
  PayloadLayout layout_;
};

// Fills a payload tile by tile. Tiles may be filled at the same time: they share no byte.
template <typename T>
class PayloadWriter {
 public:
  // Zeroes everything but the values.
  PayloadWriter(uint8_t* bytes, const PayloadLayout& layout) : bytes_(bytes), layout_(layout) {
    std::memset(bytes_, 0, layout_.values_at);
    const int64_t values_end = layout_.values_at + layout_.k * static_cast<int64_t>(sizeof(T));
    std::memset(bytes_ + values_end, 0, layout_.bytes - values_end);
  }

  T* values() { return reinterpret_cast<T*>(bytes_ + layout_.values_at); }
  uint16_t* offsets() { return reinterpret_cast<uint16_t*>(bytes_ + layout_.support_at); }
  uint8_t* bitmap(int64_t tile) { return bytes_ + layout_.support_at + tile * (kTileEntries / 8); }

  void set_header(const PayloadHeader& header) { std::memcpy(bytes_, &header, sizeof header); }
  void set_first_entry(int64_t tile, int64_t entry) {
    reinterpret_cast<uint32_t*>(bytes_ + layout_.tile_starts_at)[tile] = static_cast<uint32_t>(entry);
  }
  void set_entry(int64_t tile, int64_t entry, int64_t offset, T value) {
    if (layout_.support == Support::kOffsets) {
      offsets()[entry] = static_cast<uint16_t>(offset);
    } else {
      bitmap(tile)[offset / 8] |= static_cast<uint8_t>(1u << (offset % 8));
    }
    values()[entry] = value;
  }

 private:
  uint8_t* bytes_;
  PayloadLayout layout_;
};

// The header that compress writes, before its counts and flags are known.
REGTOPK_HOST_DEVICE inline PayloadHeader make_header(const PayloadLayout& layout, uint64_t step, uint64_t plan) {
  PayloadHeader header{};
  header.magic = kPayloadMagic;
  header.version = kPayloadVersion;
  header.value_type = layout.type;
  header.support = layout.support;
  header.step = step;
  header.numel = static_cast<uint64_t>(layout.numel);
  header.k = static_cast<uint64_t>(layout.k);
  header.plan = plan;
  header.spans = static_cast<uint32_t>(layout.spans);
  return header;
}

// What is wrong with received bytes: the field, the value expected and the value found.
struct PayloadError {
  std::string field, expected, got;
};

// Checks untrusted bytes of the size that `layout` gives: the header, the tile starts and every offset. Reading a payload
// that passes stays in bounds.
std::optional<PayloadError> check_payload(const uint8_t* bytes, const PayloadLayout& layout, const ParallelFor& parallel_for);

// Number of entries that two valid payloads of one bucket have in common.
int64_t count_common(const PayloadView& one, const PayloadView& other, const ParallelFor& parallel_for);

// Packs `layout.k` entries given by ascending gradient index, and the reverse.
template <typename T>
void encode(const PayloadLayout& layout, const PayloadHeader& header, const int64_t* indices, const T* values, uint8_t* bytes);
void decode_indices(const PayloadView& payload, int64_t* indices);

}  // namespace regtopk
