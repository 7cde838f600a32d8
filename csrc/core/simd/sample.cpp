#include "sample.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "ranked_keys.h"
#include "scratch.h"

namespace regtopk {
namespace {

constexpr int64_t kSectorEntries = 8;  // 32 bytes of fp32
constexpr int64_t kSectorsPerTile = kTileEntries / kSectorEntries;
constexpr uint32_t kInfinityKey = 0x7f800000u;
constexpr double kDeviations = 5.0;
constexpr int64_t kPrefetched = 32;  // sectors: each is a miss of the caches and of the TLB

inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// The strata of a bucket: `width` consecutive sectors each, a power of two that divides a tile.
struct Strata {
  explicit Strata(int64_t numel) {
    const int64_t sectors = numel / kSectorEntries;
    const int64_t wanted = std::clamp<int64_t>(numel / 32, 1024, 65536) / kSectorEntries;
    const int64_t ideal_width = std::max<int64_t>(1, (sectors + wanted - 1) / wanted);
    width = std::min<int64_t>(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(ideal_width))), kSectorsPerTile);
    width_bits = std::countr_zero(static_cast<uint64_t>(width));
    count = sectors / width;
    if (sectors % width != 0 && chosen_sector(count) < sectors) ++count;
  }

  // A multiplicative hash instead of a fixed place: gradients have periods of their own, the rows of a matrix.
  int64_t chosen_sector(int64_t stratum) const {
    const uint64_t hash = (static_cast<uint64_t>(stratum) + 1) * 0x9e3779b97f4a7c15ull;
    return stratum * width + static_cast<int64_t>((hash >> 32) & static_cast<uint64_t>(width - 1));
  }

  int64_t width, count;
  int width_bits;
};

// The keys of the strata [begin, end).
template <typename T>
void sample_keys(const CompressArguments& arguments, const Strata& strata, int64_t begin, int64_t end, uint32_t* keys) {
  const T* const gradient = static_cast<const T*>(arguments.gradient);
  const float* const residual = static_cast<const float*>(arguments.residual);
  const float* const feedback = static_cast<const float*>(arguments.feedback);
  const float decay = static_cast<float>(arguments.decay);
  for (int64_t stratum = begin; stratum < end; ++stratum) {
    if (stratum + kPrefetched < end) {
      const int64_t later = strata.chosen_sector(stratum + kPrefetched) * kSectorEntries;
      prefetch(gradient + later);
      prefetch(residual + later);
    }
    const int64_t first = strata.chosen_sector(stratum) * kSectorEntries;
    for (int64_t at = 0; at < kSectorEntries; ++at) {
      keys[stratum * kSectorEntries + at] = magnitude_key(residual[first + at] * decay + Traits<T>::load(gradient[first + at]));
    }
  }
  if (feedback == nullptr) return;
  const auto patch = [&](int64_t stratum, int64_t index, int64_t entry) {
    const float accumulated = residual[index] * decay + Traits<T>::load(gradient[index]);
    keys[stratum * kSectorEntries + index % kSectorEntries] =
        magnitude_key(regularised_score(accumulated, feedback[entry], arguments.distortion, arguments.mu));
  };
  if (arguments.sent->layout().support == Support::kBitmap) {
    // Many entries: a sector is one byte of the bitmap, and bits are counted up to it. Tiles follow each other.
    static_assert(kSectorEntries == 8 && kTileEntries % 8 == 0);
    const uint8_t* const bitmap = arguments.sent->bitmap(0);
    const int64_t first_tile = begin * strata.width / kSectorsPerTile;
    int64_t entry = arguments.sent->first_entry(first_tile), counted = first_tile * kSectorsPerTile;
    for (int64_t stratum = begin; stratum < end; ++stratum) {
      const int64_t sector = strata.chosen_sector(stratum);
      entry += count_bits(bitmap + counted, sector - counted);
      counted = sector;
      int64_t of_bit = entry;
      for (unsigned bits = bitmap[sector]; bits != 0; bits &= bits - 1) {
        patch(stratum, sector * kSectorEntries + std::countr_zero(bits), of_bit++);
      }
    }
    return;
  }
  for (int64_t tile = 0; tile < arguments.layout.tiles; ++tile) {
    arguments.sent->for_each_entry(tile, [&](int64_t entry, int64_t offset) {
      const int64_t index = tile * kTileEntries + offset, sector = index / kSectorEntries;
      const int64_t stratum = sector >> strata.width_bits;
      if (begin <= stratum && stratum < end && strata.chosen_sector(stratum) == sector) patch(stratum, index, entry);
    });
  }
}

// Variance of the number of sampled keys at or above `threshold`. Neighbours are alike in many gradients (rows of an
// embedding), so sectors are counted, not entries.
double variance_above(const uint32_t* keys, int64_t sectors, uint32_t threshold) {
  int64_t total = 0, squares = 0;
  for (int64_t sector = 0; sector < sectors; ++sector) {
    int above = 0;
    for (int64_t at = 0; at < kSectorEntries; ++at) above += keys[sector * kSectorEntries + at] >= threshold;
    total += above;
    squares += above * above;
  }
  const double mean = static_cast<double>(total) / static_cast<double>(sectors);
  return static_cast<double>(squares) - mean * static_cast<double>(total);
}

}  // namespace

template <typename T>
Bracket sample_bracket(const CompressArguments& arguments, const ParallelFor& parallel_for) {
  const PayloadLayout& layout = arguments.layout;
  if (layout.numel < 4096) return {};
  const Strata strata(layout.numel);
  const int64_t count = strata.count * kSectorEntries;
  const Scratch memory(count * static_cast<int64_t>(sizeof(uint32_t)));
  uint32_t* const keys = memory.array<uint32_t>();
  const auto sample = [&](int64_t begin, int64_t end) { sample_keys<T>(arguments, strata, begin, end, keys); };
  // On the calling thread it takes about a fiftieth of the pass that follows, and waking another may take longer, unless
  // there is feedback for many entries.
  const bool dense = arguments.feedback != nullptr && layout.support == Support::kBitmap;
  if (dense) parallel_for(strata.count, sample);
  else serial_for(strata.count, sample);
  const RankedKeys ranked(keys, count);

  const double rank = static_cast<double>(layout.k) * static_cast<double>(count) / static_cast<double>(layout.numel);
  // A bin that holds few keys is as good as the key itself: the bracket becomes a little wider, and stays exact on ties.
  const int64_t tolerance = 2 + static_cast<int64_t>(std::sqrt(rank));
  const uint32_t middle = ranked.not_above(std::clamp<int64_t>(static_cast<int64_t>(rank + 0.5), 1, count), tolerance);
  // The constants carry the tail where few or no sampled keys lie above.
  const double margin = kDeviations * std::sqrt(variance_above(keys, strata.count, middle) + 1.0) + 3.0;
  const int64_t low_rank = static_cast<int64_t>(std::ceil(rank + margin));
  const int64_t high_rank = static_cast<int64_t>(std::floor(rank - margin));
  Bracket bracket;
  bracket.expected = std::min(1.0, static_cast<double>(low_rank) / static_cast<double>(count));
  if (low_rank <= count) bracket.low = std::min(ranked.not_above(low_rank, tolerance), kInfinityKey);
  if (high_rank >= 1) bracket.high = ranked.not_below(high_rank, tolerance);
  return bracket;
}

template Bracket sample_bracket<float>(const CompressArguments&, const ParallelFor&);
template Bracket sample_bracket<BFloat16>(const CompressArguments&, const ParallelFor&);
template Bracket sample_bracket<Half>(const CompressArguments&, const ParallelFor&);

}  // namespace regtopk
