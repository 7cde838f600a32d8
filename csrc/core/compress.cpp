#include "compress.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "plain.h"

namespace regtopk {
namespace {

constexpr int kDigitBits = 16;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// The last selected entry in the total order: everything before it is sent. One key ends the selection, because equal
// scores are ordered by index.
template <typename Bits>
struct Boundary {
  Bits score_key;
  int64_t index;
  bool includes(Bits key, int64_t entry_index) const { return key > score_key || (key == score_key && entry_index <= index); }
};

// Exact selection by radix: two histograms of 16-bit digits (four in fp64) find the k-th score, a count per tile places
// the entries, and the last pass packs them and writes the residual. Every pass recomputes a = r + g, so nothing of size J
// is stored and the passes before the last one change nothing. Of chunks, each of which fits a tile, one pass finds all boundaries.
template <typename T>
class Compressor {
  using Accumulate = typename Traits<T>::Accumulate;
  using Bits = typename Traits<T>::Bits;

 public:
  Compressor(const CompressArguments& arguments, const ParallelFor& parallel_for)
      : arguments_(arguments),
        layout_(arguments.layout),
        parallel_for_(parallel_for),
        gradient_(static_cast<const T*>(arguments.gradient)),
        residual_(static_cast<Accumulate*>(arguments.residual)),
        feedback_(static_cast<const Accumulate*>(arguments.feedback)),
        decay_(static_cast<Accumulate>(arguments.decay)),
        chunk_bits_(arguments.chunks ? std::countr_zero(static_cast<uint64_t>(arguments.chunks.entries)) : 63) {}

  void run() {
    first_entry_.resize(layout_.tiles);
    if (arguments_.chunks) find_boundaries_of_chunks();
    else boundaries_ = {find_boundary()};
    pack();
  }

 private:
  Accumulate accumulated(int64_t index) const { return residual_[index] * decay_ + Traits<T>::load(gradient_[index]); }

  Accumulate score_of_sent(Accumulate accumulated, int64_t entry) const {
    return regularised_score(accumulated, feedback_[entry], arguments_.distortion, arguments_.mu);
  }

  // keys[offset] = score key of each entry of the tile.
  void score_tile(int64_t tile, Bits* keys) const {
    const int64_t base = tile * kTileEntries, entries = layout_.tile_entries(tile);
    for (int64_t offset = 0; offset < entries; ++offset) keys[offset] = magnitude_key(accumulated(base + offset));
    if (feedback_ == nullptr) return;
    arguments_.sent->for_each_entry(
        tile, [&](int64_t entry, int64_t offset) { keys[offset] = magnitude_key(score_of_sent(accumulated(base + offset), entry)); });
  }

  // Calls body(tile, keys) for every tile, with one scratch buffer for each range of tiles.
  template <typename Body, typename Finish>
  void for_each_tile(const Body& body, const Finish& finish) const {
    parallel_for_(layout_.tiles, [&](int64_t begin, int64_t end) {
      const auto keys = std::make_unique_for_overwrite<Bits[]>(std::min(kTileEntries, layout_.numel));
      auto local = finish.start();
      for (int64_t tile = begin; tile < end; ++tile) {
        score_tile(tile, keys.get());
        body(tile, keys.get(), local);
      }
      finish.merge(local);
    });
  }

  struct NoReduction {
    struct Nothing {};
    Nothing start() const { return {}; }
    void merge(const Nothing&) const {}
  };

  // Sums one histogram per range; integer sums do not depend on the cut.
  struct HistogramReduction {
    std::vector<int64_t>& total;
    std::mutex& mutex;
    std::vector<int64_t> start() const { return std::vector<int64_t>(kDigits, 0); }
    void merge(const std::vector<int64_t>& local) const {
      const std::lock_guard lock(mutex);
      for (int64_t digit = 0; digit < kDigits; ++digit) total[digit] += local[digit];
    }
  };

  Boundary<Bits> find_boundary() {
    Bits prefix = 0, prefix_mask = 0;
    int64_t wanted = layout_.k;  // entries still to take among those that match the prefix
    for (int shift = static_cast<int>(sizeof(Bits)) * 8 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      std::vector<int64_t> histogram(kDigits, 0);
      std::mutex mutex;
      for_each_tile(
          [&](int64_t tile, const Bits* keys, std::vector<int64_t>& local) {
            for (int64_t offset = 0; offset < layout_.tile_entries(tile); ++offset) {
              if ((keys[offset] & prefix_mask) == prefix) ++local[(keys[offset] >> shift) & (kDigits - 1)];
            }
          },
          HistogramReduction{histogram, mutex});
      int64_t digit = kDigits - 1;
      while (histogram[digit] < wanted) wanted -= histogram[digit--];
      prefix |= static_cast<Bits>(digit) << shift;
      prefix_mask |= static_cast<Bits>(kDigits - 1) << shift;
    }
    return place_tiles(prefix, wanted);
  }

  void find_boundaries_of_chunks() {
    const Chunks& chunks = arguments_.chunks;
    boundaries_.resize(chunks.count(layout_.numel));
    for_each_tile(
        [&](int64_t tile, const Bits* keys, NoReduction::Nothing&) {
          const int64_t base = tile * kTileEntries;
          first_entry_[tile] = base / chunks.entries * chunks.k;
          for (int64_t begin = 0; begin < layout_.tile_entries(tile); begin += chunks.entries) {
            const int64_t chunk = (base + begin) / chunks.entries, k = chunks.k_of(chunk, layout_);
            std::vector<Bits> ranked(keys + begin, keys + std::min(begin + chunks.entries, layout_.tile_entries(tile)));
            std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<>());
            const Bits score_key = ranked[k - 1];
            int64_t ties = k - std::count_if(ranked.begin(), ranked.end(), [&](Bits key) { return key > score_key; });
            int64_t offset = begin;
            while (!(keys[offset] == score_key && --ties == 0)) ++offset;
            boundaries_[chunk] = {score_key, base + offset};
          }
        },
        NoReduction{});
  }

  // Counts what each tile sends and finds the index at which the k-th score's ties end.
  Boundary<Bits> place_tiles(Bits score_key, int64_t ties_wanted) {
    std::vector<int64_t> above(layout_.tiles, 0), ties(layout_.tiles, 0);
    for_each_tile(
        [&](int64_t tile, const Bits* keys, NoReduction::Nothing&) {
          int64_t above_here = 0, ties_here = 0;
          for (int64_t offset = 0; offset < layout_.tile_entries(tile); ++offset) {
            above_here += keys[offset] > score_key;
            ties_here += keys[offset] == score_key;
          }
          above[tile] = above_here;
          ties[tile] = ties_here;
        },
        NoReduction{});
    Boundary<Bits> boundary{score_key, -1};
    for (int64_t tile = 0, entry = 0; tile < layout_.tiles; ++tile) {
      first_entry_[tile] = entry;
      const int64_t taken = std::min(ties[tile], ties_wanted);
      if (taken > 0 && taken == ties_wanted) boundary.index = index_of_tie(tile, score_key, taken);
      ties_wanted -= taken;
      entry += above[tile] + taken;
    }
    return boundary;
  }

  int64_t index_of_tie(int64_t tile, Bits score_key, int64_t count) const {
    std::vector<Bits> keys(layout_.tile_entries(tile));
    score_tile(tile, keys.data());
    int64_t offset = 0;
    while (!(keys[offset] == score_key && --count == 0)) ++offset;
    return tile * kTileEntries + offset;
  }

  void pack() {
    PayloadWriter<T> writer(arguments_.payload, layout_);
    PayloadHeader header = make_header(layout_, arguments_.step, arguments_.plan);
    std::mutex mutex;
    struct Counts {
      int64_t repeated = 0, displaced = 0;
      bool non_finite = false;
    };
    struct HeaderReduction {
      PayloadHeader& header;
      std::mutex& mutex;
      Counts start() const { return {}; }
      void merge(const Counts& local) const {
        const std::lock_guard lock(mutex);
        header.repeated += static_cast<uint64_t>(local.repeated);
        header.displaced += static_cast<uint64_t>(local.displaced);
        if (local.non_finite) header.flags |= kFlagNonFinite;
      }
    };
    for_each_tile(
        [&](int64_t tile, const Bits* keys, Counts& counts) {
          const int64_t base = tile * kTileEntries;
          if (arguments_.sent != nullptr) {
            arguments_.sent->for_each_entry(tile, [&](int64_t, int64_t offset) {
              const int64_t index = base + offset;
              const Boundary<Bits>& boundary = boundaries_[index >> chunk_bits_];
              if (boundary.includes(keys[offset], index)) ++counts.repeated;
              else if (boundary.includes(magnitude_key(accumulated(index)), index)) ++counts.displaced;
            });
          }
          int64_t entry = first_entry_[tile];
          writer.set_first_entry(tile, entry);
          for (int64_t offset = 0; offset < layout_.tile_entries(tile); ++offset) {
            const int64_t index = base + offset;
            const Accumulate value = accumulated(index);
            const bool finite = is_finite(value);
            Accumulate kept = value;
            if (boundaries_[index >> chunk_bits_].includes(keys[offset], index)) {
              const T sent = Traits<T>::store(value == value ? value : std::numeric_limits<Accumulate>::quiet_NaN());
              writer.set_entry(tile, entry++, offset, sent);
              kept = value - Traits<T>::load(sent);
            }
            if (finite) residual_[index] = kept;
            else counts.non_finite = true;
          }
        },
        HeaderReduction{header, mutex});
    writer.set_header(header);
  }

  const CompressArguments& arguments_;
  const PayloadLayout& layout_;
  const ParallelFor& parallel_for_;
  const T* gradient_;
  Accumulate* residual_;
  const Accumulate* feedback_;
  const Accumulate decay_;
  const int chunk_bits_;
  std::vector<int64_t> first_entry_;          // of each tile, in the payload
  std::vector<Boundary<Bits>> boundaries_;    // of each chunk, or of the bucket
};

}  // namespace

void compress_plain(const CompressArguments& arguments, const ParallelFor& parallel_for) {
  with_value_type(arguments.layout.type, [&]<typename T>(T) { Compressor<T>(arguments, parallel_for).run(); });
}

void put_back(const PayloadView& payload, void* residual, const ParallelFor& parallel_for) {
  with_value_type(payload.layout().type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    Accumulate* const kept = static_cast<Accumulate*>(residual);
    const T* const values = payload.values<T>();
    parallel_for(payload.layout().tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        payload.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          const Accumulate value = Traits<T>::load(values[entry]);
          if (is_finite(value) && value != 0) kept[tile * kTileEntries + offset] += value;
        });
      }
    });
  });
}

}  // namespace regtopk
