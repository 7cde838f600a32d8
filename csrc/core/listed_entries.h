// The entries of a range of blocks that may turn out to be among the k, in ascending order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "block_cursor.h"
#include "kernels.h"

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
  const uint32_t* keys() const { return keys_.get(); }
  ListArrays from(int64_t position) { return {values_.get() + position, keys_.get() + position, offsets_.get() + position}; }

  // Room for `more` entries behind the last one, and kListSlack.
  void make_room(int64_t more) {
    const int64_t wanted = size_ + more + kListSlack;
    if (wanted <= capacity_) return;
    capacity_ = std::max(wanted, capacity_ + capacity_ / 2);
    move_to_larger(values_);
    move_to_larger(keys_);
    move_to_larger(offsets_);
  }

  // Takes over `listed` entries written to from(size()), as the next block's.
  void add_block(int64_t listed) {
    per_block_.push_back(static_cast<uint32_t>(listed));
    size_ += listed;
  }

  // From `position`, the first entry of `from_block`, on: keeps the entries that keep(position) accepts, asked in order; forgotten(block, position) hears of the others first.
  template <typename Keep, typename Forgotten>
  void filter(int64_t from_block, int64_t position, const Keep& keep, const Forgotten& forgotten) {
    int64_t kept = position;
    for (int64_t block = from_block; block < first_block_ + blocks(); ++block) {
      const int64_t end = position + listed_in(block), kept_before = kept;
      for (; position < end; ++position) {
        if (!keep(position)) {
          forgotten(block, position);
          continue;
        }
        values_[kept] = values_[position];
        keys_[kept] = keys_[position];
        offsets_[kept++] = offsets_[position];
      }
      per_block_[block - first_block_] = static_cast<uint32_t>(kept - kept_before);
    }
    size_ = kept;
  }

  std::vector<SentAgain> sent_again;
  bool non_finite = false;

 private:
  template <typename Element>
  void move_to_larger(std::unique_ptr<Element[]>& array) {
    auto larger = std::make_unique_for_overwrite<Element[]>(capacity_);
    std::copy_n(array.get(), size_, larger.get());
    array = std::move(larger);
  }

  int64_t first_block_;
  int64_t size_ = 0, capacity_ = 0;
  std::unique_ptr<float[]> values_;
  std::unique_ptr<uint32_t[]> keys_;
  std::unique_ptr<uint16_t[]> offsets_;
  std::vector<uint32_t> per_block_;
};

}  // namespace regtopk
