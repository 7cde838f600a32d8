// The entries of a range of blocks that may turn out to be among the k, in ascending order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "block_cursor.h"
#include "kernels.h"
#include "scratch.h"

namespace regtopk {

// An entry that was sent in the last step and is listed now.
struct SentAgain {
  int64_t index;
  uint32_t magnitude, score;  // keys of |a| and of the regularised score
};

class ListedEntries {
 public:
  explicit ListedEntries(int64_t first_block) : first_block_(first_block) {}

  int64_t first_block() const { return first_block_; }
  int64_t blocks() const { return static_cast<int64_t>(per_block_.size()); }
  int64_t listed_in(int64_t block) const { return per_block_[block - first_block_]; }
  int64_t size() const { return size_; }
  const uint32_t* keys() const { return arrays_.keys; }
  ListArrays from(int64_t position) const { return {arrays_.values + position, arrays_.keys + position, arrays_.offsets + position}; }

  // Makes room for `expected` entries in all; more are possible.
  void expect(int64_t expected) {
    const int64_t wanted = expected + kBlockEntries + kListSlack;
    if (wanted > capacity_) grow_to(wanted);
  }

  // Where a kernel lists the next block, whose entries may all be listed. Only what is used of it is ever touched.
  ListArrays next_block() {
    const int64_t wanted = size_ + kBlockEntries + kListSlack;
    if (wanted > capacity_) grow_to(std::max(wanted, capacity_ + capacity_ / 2));
    return from(size_);
  }

  // Appends the block that was listed there.
  void add_block(int64_t listed) {
    per_block_.push_back(static_cast<uint32_t>(listed));
    size_ += listed;
  }

  // Keeps the entries that keep(position) accepts, asked in order, none of them fallen; forgotten(block, position) hears of
  // the others first.
  template <typename Keep, typename Forgotten>
  void filter(const Keep& keep, const Forgotten& forgotten) {
    int64_t position = 0, kept = 0;
    for (int64_t block = first_block_; block < first_block_ + blocks(); ++block) {
      const int64_t end = position + listed_in(block), kept_before = kept;
      for (; position < end; ++position) {
        if (!keep(position)) {
          forgotten(block, position);
          continue;
        }
        arrays_.values[kept] = arrays_.values[position];
        arrays_.keys[kept] = arrays_.keys[position];
        arrays_.offsets[kept++] = arrays_.offsets[position];
      }
      per_block_[block - first_block_] = static_cast<uint32_t>(kept - kept_before);
    }
    size_ = kept;
    fallen = 0;
  }

  std::vector<SentAgain> sent_again;
  int64_t fallen = 0;  // listed entries whose regularised score is too small to be listed
  bool non_finite = false;

 private:
  static void copy(const ListArrays& from, int64_t count, const ListArrays& to) {
    std::copy_n(from.values, count, to.values);
    std::copy_n(from.keys, count, to.keys);
    std::copy_n(from.offsets, count, to.offsets);
  }

  void grow_to(int64_t capacity) {
    capacity_ = capacity;
    Scratch memory(capacity * static_cast<int64_t>(sizeof(float) + sizeof(uint32_t) + sizeof(uint16_t)));
    const ListArrays arrays{memory.array<float>(), memory.array<uint32_t>(capacity * 4), memory.array<uint16_t>(capacity * 8)};
    copy(arrays_, size_, arrays);
    arrays_ = arrays;
    memory_ = std::move(memory);
  }

  int64_t first_block_;
  int64_t size_ = 0, capacity_ = 0;
  Scratch memory_;
  ListArrays arrays_{};
  std::vector<uint32_t> per_block_;
};

}  // namespace regtopk
