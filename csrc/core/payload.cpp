#include "payload.h"

#include <atomic>
#include <mutex>

namespace regtopk {
namespace {

std::optional<PayloadError> expect_field(const char* field, uint64_t expected, uint64_t got) {
  if (expected == got) return std::nullopt;
  return PayloadError{field, std::to_string(expected), std::to_string(got)};
}

// Whether the support of one tile is as check_tile wants it.
bool is_valid(const PayloadView& payload, int64_t tile) {
  const int64_t begin = payload.first_entry(tile), end = payload.first_entry(tile + 1), entries = payload.layout().tile_entries(tile);
  if (payload.layout().support == Support::kBitmap) {
    const uint8_t* const bitmap = payload.bitmap(tile);
    const int64_t bytes = (entries + 7) / 8;
    const bool beyond_the_end = entries % 8 != 0 && bitmap[bytes - 1] >> (entries % 8) != 0;
    return !beyond_the_end && count_bits(bitmap, bytes) == end - begin;
  }
  const uint16_t* const offsets = payload.offsets();
  bool descending = false;
  for (int64_t entry = begin + 1; entry < end; ++entry) descending |= offsets[entry] <= offsets[entry - 1];
  return !descending && (begin == end || offsets[end - 1] < entries);
}

// Offsets of one tile: ascending, inside the tile, as many as the tile starts say.
std::optional<PayloadError> check_tile(const PayloadView& payload, int64_t tile) {
  if (is_valid(payload, tile)) return std::nullopt;
  const int64_t entries = payload.layout().tile_entries(tile);
  const int64_t end = payload.first_entry(tile + 1);
  int64_t last_entry = payload.first_entry(tile) - 1, previous = -1;
  std::optional<PayloadError> error;
  payload.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
    last_entry = entry;
    if (!error && (offset <= previous || offset >= entries)) {
      error = PayloadError{
          "offset of entry " + std::to_string(entry), "more than " + std::to_string(previous) + " and less than " + std::to_string(entries),
          std::to_string(offset)};
    }
    previous = offset;
  });
  if (!error && last_entry + 1 != end) {
    const std::string where = "entries in tile " + std::to_string(tile);
    const int64_t begin = payload.first_entry(tile);
    return PayloadError{where, std::to_string(end - begin), std::to_string(last_entry + 1 - begin)};
  }
  return error;
}

// Header and tile starts: what reading the support relies on.
std::optional<PayloadError> check_structure(const uint8_t* bytes, const PayloadLayout& layout) {
  const PayloadView payload(bytes, layout);
  const PayloadHeader header = payload.header();
  const PayloadHeader wanted = make_header(layout, header.step, header.plan);
  if (auto error = expect_field("magic", wanted.magic, header.magic)) return error;
  if (auto error = expect_field("version", wanted.version, header.version)) return error;
  if (auto error = expect_field("value type", static_cast<uint64_t>(wanted.value_type), static_cast<uint64_t>(header.value_type)))
    return error;
  if (auto error = expect_field("support", static_cast<uint64_t>(wanted.support), static_cast<uint64_t>(header.support))) return error;
  if (auto error = expect_field("numel", wanted.numel, header.numel)) return error;
  if (auto error = expect_field("k", wanted.k, header.k)) return error;
  if (header.flags & ~kFlags) return PayloadError{"flags", "at most " + std::to_string(kFlags), std::to_string(header.flags)};
  if (auto error = expect_field("spans", wanted.spans, header.spans)) return error;
  if (header.repeated > header.k) return PayloadError{"repeated", "at most " + std::to_string(header.k), std::to_string(header.repeated)};
  if (auto error = expect_field("entries before tile 0", 0, static_cast<uint64_t>(payload.first_entry(0)))) return error;
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    const int64_t begin = payload.first_entry(tile), end = payload.first_entry(tile + 1);
    if (end < begin || end - begin > layout.tile_entries(tile)) {
      return PayloadError{
          "entries before tile " + std::to_string(tile + 1),
          std::to_string(begin) + " to " + std::to_string(begin + layout.tile_entries(tile)), std::to_string(end)};
    }
  }
  return std::nullopt;
}

}  // namespace

PayloadLayout::PayloadLayout(int64_t numel, int64_t k, ValueType type, int64_t spans) {
  if (k < 1 || k > numel || k > int64_t{UINT32_MAX}) {
    throw std::invalid_argument(
        "payload: expected 1 <= k <= min(numel, 2^32 - 1), got k=" + std::to_string(k) + " and numel=" + std::to_string(numel));
  }
  *this = of_checked(numel, k, type, value_bytes(type), spans);
}

int64_t PayloadView::entry_at(int64_t index) const {
  const int64_t tile = index / kTileEntries, offset = index % kTileEntries;
  const int64_t begin = first_entry(tile);
  if (offset == 0 || tile >= layout_.tiles) return begin;
  if (layout_.support == Support::kOffsets) {
    const uint16_t* const first = offsets();
    return std::lower_bound(first + begin, first + first_entry(tile + 1), offset) - first;
  }
  const uint8_t* const bits = bitmap(tile);
  const int64_t rest = offset % 8 == 0 ? 0 : std::popcount(static_cast<unsigned>(bits[offset / 8] & ((1u << (offset % 8)) - 1)));
  return begin + count_bits(bits, offset / 8) + rest;
}

std::optional<PayloadError> check_payload(const uint8_t* bytes, const PayloadLayout& layout, const ParallelFor& parallel_for) {
  if (auto error = check_structure(bytes, layout)) return error;
  const PayloadView payload(bytes, layout);
  // The error of the lowest tile is reported, whatever the cut into ranges.
  std::mutex mutex;
  int64_t first_bad_tile = layout.tiles;
  std::optional<PayloadError> first_error;
  parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (auto error = check_tile(payload, tile)) {
        const std::lock_guard lock(mutex);
        if (tile < first_bad_tile) first_bad_tile = tile, first_error = std::move(error);
        return;
      }
    }
  });
  return first_error;
}

int64_t count_common(const PayloadView& one, const PayloadView& other, const ParallelFor& parallel_for) {
  const bool bitmaps = one.layout().support == Support::kBitmap && other.layout().support == Support::kBitmap;
  std::atomic<int64_t> total = 0;
  parallel_for(one.layout().tiles, [&](int64_t begin, int64_t end) {
    uint8_t marks[kTileEntries / 8];
    int64_t common = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      if (bitmaps) {
        const int64_t bytes = (one.layout().tile_entries(tile) + 7) / 8;
        for (int64_t byte = 0; byte < bytes; ++byte) marks[byte] = one.bitmap(tile)[byte] & other.bitmap(tile)[byte];
        common += count_bits(marks, bytes);
        continue;
      }
      std::memset(marks, 0, sizeof marks);
      one.for_each_entry(tile, [&](int64_t, int64_t offset) { marks[offset / 8] |= static_cast<uint8_t>(1u << (offset % 8)); });
      other.for_each_entry(tile, [&](int64_t, int64_t offset) { common += marks[offset / 8] >> (offset % 8) & 1; });
    }
    total += common;
  });
  return total;
}

template <typename T>
void encode(const PayloadLayout& layout, const PayloadHeader& header, const int64_t* indices, const T* values, uint8_t* bytes) {
  PayloadWriter<T> writer(bytes, layout);
  writer.set_header(header);
  int64_t entry = 0;
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    writer.set_first_entry(tile, entry);
    for (; entry < layout.k && indices[entry] / kTileEntries == tile; ++entry) {
      writer.set_entry(tile, entry, indices[entry] % kTileEntries, values[entry]);
    }
  }
}
template void encode<double>(const PayloadLayout&, const PayloadHeader&, const int64_t*, const double*, uint8_t*);
template void encode<float>(const PayloadLayout&, const PayloadHeader&, const int64_t*, const float*, uint8_t*);
template void encode<BFloat16>(const PayloadLayout&, const PayloadHeader&, const int64_t*, const BFloat16*, uint8_t*);
template void encode<Half>(const PayloadLayout&, const PayloadHeader&, const int64_t*, const Half*, uint8_t*);

void decode_indices(const PayloadView& payload, int64_t* indices) {
  for (int64_t tile = 0; tile < payload.layout().tiles; ++tile) {
    payload.for_each_entry(tile, [&](int64_t entry, int64_t offset) { indices[entry] = tile * kTileEntries + offset; });
  }
}

}  // namespace regtopk
