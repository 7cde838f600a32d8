// Walks the entries of a payload block by block: a part of a tile that fits the caches while it is worked on.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "../payload.h"

namespace regtopk {

inline constexpr int64_t kBlockEntries = 8192;
inline constexpr int64_t kTileBlocks = kTileEntries / kBlockEntries;
static_assert(kTileEntries % kBlockEntries == 0);

// Where block number `block` of a bucket of `numel` entries lies. Blocks of another size divide a tile and are a multiple of 64 entries.
struct Block {
  Block(int64_t block, int64_t numel, int64_t size = kBlockEntries)
      : index(block * size), tile(index / kTileEntries), first_offset(index % kTileEntries), entries(std::min(size, numel - index)) {}

  static int64_t count(int64_t numel) { return (numel + kBlockEntries - 1) / kBlockEntries; }

  int64_t index;         // of its first entry in the bucket
  int64_t tile;
  int64_t first_offset;  // of its first entry in the tile
  int64_t entries;
};

class BlockCursor {
 public:
  // `payload` must outlive the cursor.
  BlockCursor(const PayloadView& payload, const Block& first) : payload_(&payload), entry_(payload.first_entry(first.tile)) {
    if (payload.layout().support == Support::kOffsets) {
      const uint16_t* const offsets = payload.offsets();
      const int64_t end = payload.first_entry(first.tile + 1);
      entry_ = std::lower_bound(offsets + entry_, offsets + end, first.first_offset) - offsets;
    } else {
      entry_ += count_bits(payload.bitmap(first.tile), first.first_offset / 8);
    }
  }

  // An entry of the payload, and where its offset stands in a list of offsets.
  struct Found {
    int64_t entry, position;
  };

  // Finds the entries of a block whose offsets are in offsets[begin, end), which ascend: `found` has room for as many.
  // Returns how many there are. Blocks must be visited as by visit().
  int64_t find_listed(const Block& block, const uint16_t* offsets, int64_t begin, int64_t end, Found* found) {
    int64_t count = 0, position = begin;
    if (payload_->layout().support == Support::kOffsets) {
      visit(block, [&](int64_t entry, int64_t offset) {
        while (position < end && offsets[position] < offset) ++position;
        if (position < end && offsets[position] == offset) found[count++] = {entry, position};
      });
      return count;
    }
    // Many entries: asking for the listed ones is less work than walking through all. Without a branch, which would be
    // foreseen wrongly about once per entry found. A bitmap consists of whole words.
    const uint8_t* const bitmap = payload_->bitmap(block.tile);
    const auto word_at = [&](int64_t offset) {
      uint64_t word;
      std::memcpy(&word, bitmap + offset / 64 * 8, sizeof word);
      return word;
    };
    for (; position < end; ++position) {
      found[count].position = position;
      count += word_at(offsets[position]) >> offsets[position] % 64u & 1u;
    }
    int64_t byte = block.first_offset / 8;
    const int64_t bytes_end = byte + (block.entries + 7) / 8;
    for (int64_t number = 0; number < count; ++number) {
      const int64_t offset = offsets[found[number].position], at = offset / 64 * 8;
      entry_ += count_bits(bitmap + byte, at - byte);
      byte = at;
      found[number].entry = entry_ + std::popcount(word_at(offset) & ((uint64_t{1} << offset % 64) - 1));
    }
    entry_ += count_bits(bitmap + byte, bytes_end - byte);
    return count;
  }

  // Passes a block whose entries were read otherwise, `count` of them. Their first one is entry().
  int64_t entry() const { return entry_; }
  void skip(int64_t count) { entry_ += count; }

  // Calls function(entry, offset in the tile) for the entries of a block, ascending. Blocks must be visited in order,
  // from the first one on, leaving none out.
  template <typename Function>
  void visit(const Block& block, Function&& function) {
    const int64_t end_offset = block.first_offset + block.entries;
    if (payload_->layout().support == Support::kOffsets) {
      const uint16_t* const offsets = payload_->offsets();
      const int64_t end = payload_->first_entry(block.tile + 1);
      for (; entry_ < end && offsets[entry_] < end_offset; ++entry_) function(entry_, int64_t{offsets[entry_]});
      return;
    }
    const uint8_t* const bitmap = payload_->bitmap(block.tile);
    for (int64_t offset = block.first_offset; offset < end_offset; offset += 64) {
      uint64_t bits = 0;
      std::memcpy(&bits, bitmap + offset / 8, static_cast<size_t>(std::min<int64_t>(64, end_offset - offset) + 7) / 8);
      for (; bits != 0; bits &= bits - 1) function(entry_++, offset + std::countr_zero(bits));
    }
  }

 private:
  const PayloadView* payload_;
  int64_t entry_;
};

}  // namespace regtopk
