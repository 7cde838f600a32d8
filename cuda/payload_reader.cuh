// Reading payloads on the device. Nothing read from a payload is ever used as an address without a bound: tile starts are
// clamped to k, offsets to their block tile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../csrc/core/payload.h"
#include "global_memory.cuh"
#include "tile_set.cuh"

namespace regtopk {

template <typename T>
class PayloadReader {
 public:
  using Accumulate = typename Traits<T>::Accumulate;
  static constexpr unsigned kEntries = kBlockEntries<Accumulate>;
  static constexpr unsigned kBlocksPerTile = kTileEntries / kEntries;
  using Set = TileSet<kEntries>;

  __device__ PayloadReader(Global<const uint8_t> bytes, const PayloadLayout& layout) : bytes_(bytes), layout_(layout) {}

  __device__ const PayloadLayout& layout() const { return layout_; }
  __device__ uint32_t first_entry(uint32_t tile) const {
    return tile < layout_.tiles ? clamped(tile_starts().load(tile)) : clamped(0xffffffffu);
  }
  // The same with one tile for all lanes of a warp.
  __device__ uint32_t uniform_first_entry(uint32_t tile) const {
    return tile < layout_.tiles ? clamped(tile_starts().load_uniform(tile)) : clamped(0xffffffffu);
  }
  __device__ uint16_t offset_in_tile(uint32_t entry) const { return bytes_.at_byte<const uint16_t>(layout_.support_at).load(entry); }
  // 32 bits of the bitmap, of the entries 32 word … 32 word + 31 of the bucket; entries past the end are not in it.
  __device__ uint32_t bitmap_word(uint32_t word) const {
    const int64_t first = int64_t{word} * 32;
    if (first >= layout_.numel) return 0;
    const uint32_t bits = bytes_.at_byte<const uint32_t>(layout_.support_at).load(word);
    const int64_t entries = layout_.numel - first;
    return entries >= 32 ? bits : bits & ((1u << entries) - 1);
  }
  __device__ T value(uint32_t entry) const { return bytes_.at_byte<const T>(layout_.values_at).load(entry); }
  __device__ bool has_bitmap() const { return layout_.support == Support::kBitmap; }

  // Entries of the payload before those of a block tile, by counting bits from the beginning of its payload tile.
  template <typename Group>
  __device__ uint32_t bitmap_rank(const Group& group, uint32_t block, uint32_t tile) const {
    constexpr uint32_t kPairsOfTile = kTileEntries / 64, kPairsOfBlock = kEntries / 64;
    const Global<const uint64_t> pairs = bytes_.at_byte<const uint64_t>(layout_.support_at);  // of words
    uint32_t members = 0;
#pragma unroll 1
    for (uint32_t pair = tile * kPairsOfTile + group.rank(); pair < block * kPairsOfBlock; pair += group.size()) {
      members += __popcll(pairs.load(pair));
    }
    return uniform_first_entry(tile) + group.sum(members);
  }

  // First entry of [begin, end) whose offset is not below `offset`.
  __device__ uint32_t lower_bound(uint32_t begin, uint32_t end, uint32_t offset) const {
    while (begin < end) {
      const uint32_t middle = begin + (end - begin) / 2;
      if (offset_in_tile(middle) < offset) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }

  // The entries of a block tile, with offsets; the lanes of a warp search together, in two latencies of memory, three where a payload
  // tile has many.
  __device__ void range_of_block(const WarpGroup& warp, uint32_t block, uint32_t& begin, uint32_t& end) const {
    const uint32_t tile = block / kBlocksPerTile, low = block % kBlocksPerTile * kEntries, high = low + kEntries;
    const uint32_t from = uniform_first_entry(tile), next = uniform_first_entry(tile + 1), to = next > from ? next : from;
    if (to - from > kCounted) {
      begin = lower_bound_by_warp(warp, from, to, low);
      end = lower_bound_by_warp(warp, begin, to, high);
      return;
    }
    begin = end = from;
#pragma unroll
    for (uint32_t first = 0; first < kCounted; first += kWarpThreads) {
      const uint32_t entry = from + first + warp.rank();
      const uint32_t offset = entry < to ? offset_in_tile(entry) : 0xffffffffu;
      begin += __popc(__ballot_sync(kAllLanes, offset < low));
      end += __popc(__ballot_sync(kAllLanes, offset < high));
    }
  }

  // Fills `set` with the entries of a block tile, ranks it and returns the number of its first entry; entry number
  // first + set.rank_of(offset) is the one at `offset`. The members of the group call it together; `smallest` is theirs.
  // With offsets, all threads read the whole payload tile at once: 8 (fp64: 16) times the bytes that a binary search would
  // touch, 16 k bytes in all, and one memory latency instead of a dozen.
  template <typename Group>
  __device__ uint32_t load_block(const Group& group, uint32_t block, Set& set, uint32_t& smallest) const {
    const uint32_t tile = block / kBlocksPerTile;
    if (has_bitmap()) {
      const uint32_t first_word = block * Set::kWords;
      group.sync();
      for (uint32_t word = group.rank(); word < Set::kWords; word += group.size()) set.words[word] = bitmap_word(first_word + word);
      const uint32_t first = bitmap_rank(group, block, tile);
      set.rank(group);
      return first;
    }
    const uint32_t begin = uniform_first_entry(tile), end = uniform_first_entry(tile + 1);
    const uint32_t base = (block % kBlocksPerTile) * kEntries;
    group.sync();
    if (group.rank() == 0) smallest = end;
    set.clear(group);
#pragma unroll 1  // accumulate holds 32 registers of loads in flight here
    for (uint32_t entry = begin + group.rank(); entry < end; entry += group.size()) {
      const uint32_t offset = offset_in_tile(entry) - base;  // wraps to a large number below the block
      if (offset < kEntries) {
        set.insert(offset);
        atomicMin(&smallest, entry);
      }
    }
    set.rank(group);
    return smallest;
  }

 private:
  __device__ Global<const uint32_t> tile_starts() const { return bytes_.at_byte<const uint32_t>(layout_.tile_starts_at); }
  // As lower_bound: probes at 32 places while many are left, then a count.
  static constexpr uint32_t kCounted = 4 * kWarpThreads;
  __device__ uint32_t lower_bound_by_warp(const WarpGroup& warp, uint32_t begin, uint32_t end, uint32_t offset) const {
#pragma unroll 1
    while (end - begin > kCounted) {
      const uint32_t stride = (end - begin) / kWarpThreads;
      const uint32_t below = __popc(__ballot_sync(kAllLanes, offset_in_tile(begin + (warp.rank() + 1) * stride - 1) < offset));
      begin += below * stride;
      if (below < kWarpThreads) end = begin + stride - 1;
    }
    uint32_t below = 0;
#pragma unroll
    for (uint32_t first = 0; first < kCounted; first += kWarpThreads) {
      const uint32_t entry = begin + first + warp.rank();
      below += __popc(__ballot_sync(kAllLanes, entry < end && offset_in_tile(entry) < offset));
    }
    return begin + below;
  }
  __device__ uint32_t clamped(uint32_t entry) const { return entry < layout_.k ? entry : static_cast<uint32_t>(layout_.k); }

  Global<const uint8_t> bytes_;
  PayloadLayout layout_;
};

// What a payload's own header says of its size; no entries: there is no payload of this bucket.
struct SentSize {
  uint32_t entries, spans;
};

// The last step's own payload and the feedback of its entries. Its k may differ from this step's, so it is read from its
// header, on the device: nothing waits for it on the host.
template <typename T>
struct SentPayload {
  Global<const uint8_t> bytes;
  Global<const typename Traits<T>::Accumulate> feedback;
  int64_t numel = 0;
  int64_t size = 0;              // of the payload, in bytes
  int64_t feedback_entries = 0;  // 0 without feedback
  Global<const int64_t> verdict;  // the entry of its round, or null
  int64_t round = -1;

  __device__ bool is_void() const { return verdict && verdict.load_uniform(0) == round; }
  // Or there is none.
  __device__ bool is_ours() const { return !bytes || ours().entries > 0; }
  // What of it a selection looks at: nothing after a void round.
  __device__ SentSize history() const { return is_void() ? SentSize{} : ours(); }
  // No entries where none was given, or its header is that of another bucket's payload.
  __device__ SentSize ours() const {
    if (!bytes) return {};
    const PayloadHeader header = bytes.template at_byte<const PayloadHeader>(0).load_uniform(0);
    const bool is_ours = header.magic == kPayloadMagic && header.version == kPayloadVersion && header.value_type == Traits<T>::kType &&
                         header.numel == static_cast<uint64_t>(numel) && header.k >= 1 && header.k <= static_cast<uint64_t>(numel) &&
                         header.k <= 0xffffffffull && (!feedback || header.k == static_cast<uint64_t>(feedback_entries));
    if (!is_ours) return {};
    const SentSize found{static_cast<uint32_t>(header.k), header.spans};
    const PayloadLayout layout = layout_of(found);
    return layout.bytes == size && layout.support == header.support ? found : SentSize{};
  }
  __device__ PayloadLayout layout_of(SentSize of) const {
    return PayloadLayout::of_checked(numel, of.entries, Traits<T>::kType, sizeof(T), of.spans);
  }
  __device__ PayloadReader<T> reader(SentSize of) const { return PayloadReader<T>(bytes, layout_of(of)); }
};

}  // namespace regtopk
