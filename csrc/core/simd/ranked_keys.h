// Order statistics of keys: the n-th largest, exactly, without sorting.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <vector>

namespace regtopk {

// A histogram over the range that the keys span, so that keys of one binade spread as well as keys of many. A question is
// answered from the one bin that holds the rank.
class RankedKeys {
 public:
  // `keys` must outlive this; count >= 1.
  RankedKeys(const uint32_t* keys, int64_t count) : keys_(keys), count_(count) {
    uint32_t high = keys[0];
    low_ = keys[0];
    for (int64_t at = 1; at < count; ++at) {
      low_ = std::min(low_, keys[at]);
      high = std::max(high, keys[at]);
    }
    const int bin_bits = count < 4096 ? 8 : 11;
    shift_ = std::max(0, static_cast<int>(std::bit_width(high - low_)) - bin_bits);
    bins_.assign(((high - low_) >> shift_) + 1, 0);
    for (int64_t at = 0; at < count; ++at) ++bins_[(keys[at] - low_) >> shift_];
  }

  // The rank-th largest key; the largest has rank 1.
  uint32_t exactly(int64_t rank) const {
    const size_t bin = bin_of(rank);
    return shift_ == 0 ? low_ + static_cast<uint32_t>(bin) : inside(bin, rank);
  }

  // A key not above, or not below, the rank-th largest: at most `tolerance` keys lie between the two.
  uint32_t not_above(int64_t rank, int64_t tolerance) const {
    const size_t bin = bin_of(rank);
    if (bins_[bin] > tolerance && shift_ != 0) return inside(bin, rank);
    return low_ + (static_cast<uint32_t>(bin) << shift_);
  }
  uint32_t not_below(int64_t rank, int64_t tolerance) const {
    const size_t bin = bin_of(rank);
    if (bins_[bin] > tolerance && shift_ != 0) return inside(bin, rank);
    return std::min(low_ + (static_cast<uint32_t>(bin + 1) << shift_) - 1, 0x7fffffffu);
  }

 private:
  // The bin that holds the key of that rank; makes it the rank within the bin.
  size_t bin_of(int64_t& rank) const {
    size_t bin = bins_.size() - 1;
    while (bins_[bin] < rank) rank -= bins_[bin--];
    return bin;
  }

  uint32_t inside(size_t bin, int64_t rank) const {
    std::vector<uint32_t> inside;
    inside.reserve(bins_[bin]);
    for (int64_t at = 0; at < count_; ++at) {
      if ((keys_[at] - low_) >> shift_ == bin) inside.push_back(keys_[at]);
    }
    if (inside.size() > 4096) return RankedKeys(inside.data(), static_cast<int64_t>(inside.size())).exactly(rank);
    std::nth_element(inside.begin(), inside.begin() + (rank - 1), inside.end(), std::greater<>());
    return inside[rank - 1];
  }

  const uint32_t* keys_;
  int64_t count_;
  uint32_t low_;
  int shift_;
  std::vector<int64_t> bins_;
};

}  // namespace regtopk
