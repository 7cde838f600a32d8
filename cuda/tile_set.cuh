// A set of entries of one block tile, in shared memory, that knows how many of its members come before each.
//
// This is how entries find their place in index order although threads find them in any order: put them in, rank, and
// member number rank_of(offset) is the one at `offset`. The words are also the bitmap form of a payload's support.
#pragma once

#include <cstdint>

#include "groups.cuh"

namespace regtopk {

// A block tile: 32 KiB of the accumulate type, 8,192 entries of fp32 and 4,096 of fp64. A payload tile is 8 or 16 of them.
template <typename Accumulate>
inline constexpr unsigned kBlockEntries = 32768 / sizeof(Accumulate);

template <unsigned kEntries>
struct TileSet {
  static constexpr unsigned kWords = kEntries / 32;
  uint32_t words[kWords];
  uint16_t members_before[kWords];  // of each word; set by rank()

  // The members of a group call these together; each ends with a barrier of the group.
  template <typename Group>
  __device__ void clear(const Group& group) {
    for (unsigned word = group.rank(); word < kWords; word += group.size()) words[word] = 0;
    group.sync();
  }
  // Returns the number of members.
  template <typename Group>
  __device__ uint32_t rank(const Group& group) {
    group.sync();
    constexpr unsigned kPerThread = (kWords + Group::size() - 1) / Group::size();
    const unsigned first = group.rank() * kPerThread;
    uint32_t members = 0;
    for (unsigned i = 0; i < kPerThread; ++i) members += first + i < kWords ? __popc(words[first + i]) : 0;
    uint32_t total, before = group.exclusive_sum(members, total);
    for (unsigned i = 0; i < kPerThread && first + i < kWords; ++i) {
      members_before[first + i] = static_cast<uint16_t>(before);
      before += __popc(words[first + i]);
    }
    group.sync();
    return total;
  }

  __device__ void insert(unsigned offset) { atomicOr(&words[offset / 32], 1u << (offset % 32)); }
  __device__ bool contains(unsigned offset) const { return (words[offset / 32] >> (offset % 32)) & 1; }
  __device__ uint32_t rank_of(unsigned offset) const {
    return members_before[offset / 32] + __popc(words[offset / 32] & ((1u << (offset % 32)) - 1));
  }
  // Offset of member `rank`; it exists.
  __device__ unsigned member(uint32_t rank) const {
    unsigned word = 0;
    while (word + 1 < kWords && members_before[word + 1] <= rank) ++word;
    uint32_t bits = words[word];
    for (uint32_t skip = rank - members_before[word]; skip > 0; --skip) bits &= bits - 1;
    return word * 32 + __ffs(bits) - 1;
  }
};

}  // namespace regtopk
