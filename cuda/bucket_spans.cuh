// The spans of a bucket, its parameters, on the device.
#pragma once

#include <cstdint>

#include "global_memory.cuh"
#include "groups.cuh"

namespace regtopk {

// Bits [begin, end) of a bitmap, as they lie in word number `word`.
__device__ inline uint32_t bits_between(uint32_t word, uint32_t begin, uint32_t end) {
  const uint32_t first = word * 32, from = begin > first ? begin - first : 0, to = end > first ? end - first : 0;
  if (from >= 32 || to <= from) return 0;
  return (to >= 32 ? ~0u : (1u << to) - 1) & (~0u << from);
}

// Ends that are not ascending from 0 to J make other spans of it, but reach nothing beyond the bucket.
struct DeviceSpans {
  Global<const int64_t> ends;  // [count + 1], or null: a bucket without spans
  uint32_t count = 0, numel = 0;

  explicit REGTOPK_HOST_DEVICE operator bool() const { return static_cast<bool>(ends); }
  __device__ uint32_t words() const { return (count + 31) / 32; }
  __device__ uint32_t end(uint32_t number) const { return clamped(ends.load(number)); }
  __device__ uint32_t uniform_end(uint32_t number) const { return clamped(ends.load_uniform(number)); }

  // The first span that ends behind an entry; by the lanes of a warp together, which read 32 ends at a time.
  __device__ uint32_t find(uint32_t entry) const {
    const WarpGroup warp;
    uint32_t first = 0, rest = count;
    while (rest > 0) {
      const uint32_t step = (rest + kWarpThreads - 1) / kWarpThreads, at = (warp.rank() + 1) * step - 1;
      const uint32_t before = __popc(__ballot_sync(kAllLanes, at < rest && end(first + at + 1) <= entry)) * step;
      first += before;
      rest = rest - before < step - 1 ? rest - before : step - 1;
    }
    return first;
  }

  // Calls function(span, from, to, inside) with all lanes of a warp together, until all spans of the entries [begin, end) have been
  // some lane's: its span's entries among them are [from, to); of a lane that is not `inside` there are none. `first` is find(begin).
  template <typename Function>
  __device__ void for_each(uint32_t first, uint32_t begin, uint32_t end_entry, const Function& function) const {
    const WarpGroup warp;
    bool more = true;
    for (uint32_t span = first + warp.rank(); more; span += kWarpThreads) {
      uint32_t from = end_entry, to = end_entry;
      if (span < count) {
        const uint32_t span_begin = end(span), span_end = end(span + 1);
        from = span_begin > begin ? span_begin : begin;
        to = span_end < end_entry ? span_end : end_entry;
      }
      more = __shfl_sync(kAllLanes, to < end_entry, kWarpThreads - 1);
      function(span, from, to, from < to);
    }
  }

  // The entries of flagged spans among those of word number `word` of a block tile; all lanes of a warp call it together.
  // `first_span` is find() of the block tile's first entry.
  __device__ uint32_t
  entries_in(Global<const uint32_t> flags, uint32_t first_span, uint32_t tile_begin, uint32_t tile_entries, uint32_t word) const {
    const auto is_flagged = [&](uint32_t span) { return ((flags.load_uniform(span / 32) >> (span % 32)) & 1) != 0; };
    return entries_of(is_flagged, first_span, tile_begin, tile_entries, word);
  }
  // The same of spans for which a function says it.
  template <typename IsFlagged>
  __device__ uint32_t
  entries_of(const IsFlagged& is_flagged, uint32_t first_span, uint32_t tile_begin, uint32_t tile_entries, uint32_t word) const {
    uint32_t bits = 0;
    for (uint32_t span = first_span; span < count; ++span) {
      const uint32_t begin = uniform_end(span), end = uniform_end(span + 1);
      if (begin >= tile_begin + tile_entries) break;
      if (!is_flagged(span)) continue;
      bits |= bits_between(word, begin > tile_begin ? begin - tile_begin : 0, end > tile_begin ? end - tile_begin : 0);
    }
    return bits;
  }
  // Whether a block tile has a flagged span, 32 at a time.
  template <typename IsFlagged>
  __device__ bool has_any(const IsFlagged& is_flagged, uint32_t first_span, uint32_t tile_begin, uint32_t tile_entries) const {
    const WarpGroup warp;
    for (uint32_t span = first_span + warp.rank();; span += kWarpThreads) {
      const bool begins_inside = span < count && end(span) < tile_begin + tile_entries;
      if (__ballot_sync(kAllLanes, begins_inside && is_flagged(span)) != 0) return true;
      if (__ballot_sync(kAllLanes, begins_inside) != kAllLanes) return false;
    }
  }

 private:
  __device__ uint32_t clamped(int64_t entry) const { return static_cast<uint64_t>(entry) < numel ? static_cast<uint32_t>(entry) : numel; }
};

}  // namespace regtopk
