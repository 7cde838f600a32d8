// A bucket cut into chunks of so many consecutive entries, each of which sends its own k; 0 entries: the bucket as a whole. The size
// is a power of two, at least 64, and divides a tile. What the whole chunks leave of the bucket's k is sent by the last, shorter one.
#pragma once

#include "payload.h"

namespace regtopk {

struct Chunks {
  int64_t entries = 0, k = 0;

  explicit operator bool() const { return entries > 0; }
  REGTOPK_HOST_DEVICE int64_t count(int64_t numel) const { return (numel + entries - 1) / entries; }
  int64_t k_of(int64_t chunk, const PayloadLayout& layout) const { return (chunk + 1) * entries > layout.numel ? layout.k - chunk * k : k; }
};
inline constexpr int64_t kSmallestChunk = 64;
inline constexpr int64_t kLargestChunkOfDevice = 4096;

}  // namespace regtopk
