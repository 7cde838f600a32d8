// Walks the entries of a payload block by block: a part of a tile that fits the caches while it is worked on.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "payload.h"

namespace regtopk {

inline constexpr int64_t kBlockEntries = 8192;
inline constexpr int64_t kTileBlocks = kTileEntries / kBlockEntries;
static_assert(kTileEntries % kBlockEntries == 0);

// Where block number `block` of a bucket of `numel` entries lies.
struct Block {
  Block(int64_t block, int64_t numel)
      : index(block * kBlockEntries),
        tile(block / kTileBlocks),
        first_offset(block % kTileBlocks * kBlockEntries),
        entries(std::min(kBlockEntries, numel - index)) {}

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
      const uint8_t* const bitmap = payload.bitmap(first.tile);
      for (int64_t byte = 0; byte < first.first_offset / 8; ++byte) entry_ += std::popcount(bitmap[byte]);
    }
  }

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
