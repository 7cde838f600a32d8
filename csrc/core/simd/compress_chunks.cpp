// Compress where each chunk of a bucket selects by itself: one chunk after the other, start to end while it is in the caches. Its
// place in the payload is known beforehand.
//
//   accumulate   r = a; the largest key of every few entries
//   list         the entries from a key on that the k best have at least: that of the k-th largest among those maxima
//   choose       the k-th key of the list, and where its ties end
//   pack         the chunk's part of the payload; r = a - v
#include "compress_chunks.h"

#include <bit>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "block_cursor.h"
#include "listed_entries.h"
#include "ranked_keys.h"
#include "scratch.h"

namespace regtopk {
namespace {

constexpr uint32_t kInfinityKey = 0x7f800000u, kNoKey = 0x7fffffffu;
// Share of listed entries from which on listing without a branch is faster.
constexpr int64_t kCrowded = 16;
// Maxima for each that is counted: with fewer, groups hold more than one of the best, and the list becomes longer.
constexpr int64_t kSpread = 2;
// Entries of which kernels of every instruction set find maxima.
constexpr int64_t kWholeVectors = 64;

template <typename T>
class ChunkCompressor {
 public:
  ChunkCompressor(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for)
      : arguments_(arguments),
        layout_(arguments.layout),
        chunks_(arguments.chunks),
        kernels_(kernels),
        parallel_for_(parallel_for),
        residual_(static_cast<float*>(arguments.residual)),
        feedback_(static_cast<const float*>(arguments.feedback)),
        writer_(arguments.payload, layout_) {}

  void run() {
    PayloadHeader header = make_header(layout_, arguments_.step, arguments_.plan);
    std::mutex mutex;
    parallel_for_(layout_.tiles, [&](int64_t begin, int64_t end) {
      Range range(*this, begin);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kTileEntries / chunks_.entries;
        writer_.set_first_entry(tile, first * chunks_.k);
        for (int64_t chunk = first; chunk * chunks_.entries < std::min((tile + 1) * kTileEntries, layout_.numel); ++chunk)
          compress(range, chunk);
      }
      const std::lock_guard lock(mutex);
      header.repeated += range.repeated;
      header.displaced += range.displaced;
      if (range.non_finite) header.flags |= kFlagNonFinite;
    });
    if (arguments_.sent != nullptr && feedback_ == nullptr) {
      header.repeated = static_cast<uint64_t>(count_common(*arguments_.sent, PayloadView(arguments_.payload, layout_), parallel_for_));
    }
    writer_.set_header(header);
  }

 private:
  // What one thread works with, from chunk to chunk.
  struct Range {
    Range(const ChunkCompressor& all, int64_t tile) {
      const int64_t room = all.chunks_.entries + kListSlack;
      memory = Scratch(room * static_cast<int64_t>(sizeof(float) + 2 * sizeof(uint32_t) + sizeof(uint16_t)));
      list = {memory.array<float>(), memory.array<uint32_t>(room * 4), memory.array<uint16_t>(room * 8)};
      maxima = memory.array<uint32_t>(room * 10);
      if (all.feedback_ == nullptr) return;
      const Block first(tile * kTileBlocks, all.layout_.numel);
      sent.emplace(*all.arguments_.sent, first);
      sent_before = sent->entry();
      found.resize(all.chunks_.entries);
    }

    Scratch memory;
    ListArrays list;
    uint32_t* maxima;
    std::optional<BlockCursor> sent;
    int64_t sent_before = 0;  // entries sent in the last step before this chunk
    std::vector<BlockCursor::Found> found;
    std::vector<SentAgain> sent_again;
    uint64_t repeated = 0, displaced = 0;
    bool non_finite = false;
  };

  void compress(Range& range, int64_t chunk) {
    const Block block(chunk, layout_.numel, chunks_.entries);
    const int64_t k = chunks_.k_of(chunk, layout_);
    const ListArrays& list = range.list;
    float* const residual = residual_ + block.index;
    bool non_finite = false;
    AccumulateArguments accumulate{
        .gradient = static_cast<const T*>(arguments_.gradient) + block.index,
        .residual = residual,
        .decay = static_cast<float>(arguments_.decay),
        .entries = block.entries,
        .first_offset = static_cast<uint32_t>(block.first_offset),
        .list_from = kInfinityKey,
        .sent_above = kNoKey,
        .crowded = false,
        .out = list,
        .non_finite = &non_finite,
        .maxima = range.maxima};
    int64_t listed = kernels_.accumulate(accumulate);
    // r holds a but for entries that are not finite, which are listed: it does for a while.
    std::vector<std::pair<float*, float>> held_back;
    for (int64_t at = 0; at < listed; ++at) {
      float& kept = residual[list.offsets[at] - block.first_offset];
      held_back.emplace_back(&kept, kept);
      kept = list.values[at];
    }
    // A factor lowers the scores of at most as many as were sent.
    const int64_t wanted = k + (range.sent ? sent_in(range, block) : 0);
    accumulate.list_from = arguments_.bracket ? 0 : lower_bound(range.maxima, block.entries, wanted);
    accumulate.crowded = wanted * kCrowded > block.entries;
    listed = kernels_.list_again(accumulate);
    regularise(range, block, listed);

    const uint32_t boundary_key = RankedKeys(list.keys, listed).exactly(k);
    int64_t above, ties;
    kernels_.count_keys(list.keys, listed, boundary_key, &above, &ties);
    int64_t position = 0;
    for (ties = k - above; !(list.keys[position] == boundary_key && --ties == 0);) ++position;
    const uint32_t ties_until = list.offsets[position] + 1u;
    const bool bitmap = layout_.support == Support::kBitmap;
    kernels_.pack(
        {.list = list,
         .listed = listed,
         .boundary_key = boundary_key,
         .ties_until = ties_until,
         .sent_above = kNoKey,
         .residual = residual_ + block.tile * kTileEntries,
         .values = writer_.values() + chunk * chunks_.k,
         .offsets = bitmap ? nullptr : writer_.offsets() + chunk * chunks_.k,
         .bitmap = bitmap ? writer_.bitmap(block.tile) : nullptr});

    const auto is_chosen = [&](uint32_t key, int64_t offset) { return key > boundary_key || (key == boundary_key && offset < ties_until); };
    for (const auto& [offset, magnitude, score] : range.sent_again) {
      if (is_chosen(score, offset)) ++range.repeated;
      else if (is_chosen(magnitude, offset)) ++range.displaced;
    }
    for (const auto& [kept, value] : held_back) *kept = value;
    range.non_finite |= non_finite;
  }

  // A key that at least `wanted` entries of a chunk reach, from its maxima, which it overwrites.
  static uint32_t lower_bound(uint32_t* maxima, int64_t entries, int64_t wanted) {
    int64_t count = entries / kWholeVectors * kWholeVectors / kMaximumEntries;
    if (count < wanted) return 0;
    for (; count % 2 == 0 && count / 2 >= kSpread * wanted; count /= 2) {
      for (int64_t at = 0; at < count / 2; ++at) maxima[at] = std::max(maxima[at], maxima[at + count / 2]);
    }
    return std::min(RankedKeys(maxima, count).not_above(wanted, wanted / 8), kInfinityKey);
  }

  // How many of the chunk's entries were sent in the last step.
  int64_t sent_in(Range& range, const Block& block) const {
    if (arguments_.sent->layout().support == Support::kBitmap) {
      return count_bits(arguments_.sent->bitmap(block.tile) + block.first_offset / 8, (block.entries + 7) / 8);
    }
    const int64_t end = arguments_.sent->entry_at(block.index + block.entries);
    return end - std::exchange(range.sent_before, end);
  }

  // RegTop-k: replaces the keys of the listed entries that were sent in the last step, and notes both.
  void regularise(Range& range, const Block& block, int64_t listed) const {
    if (!range.sent) return;
    const ListArrays& list = range.list;
    const int64_t count = range.sent->find_listed(block, list.offsets, 0, listed, range.found.data());
    range.sent_again.resize(static_cast<size_t>(count));
    // The scores by themselves, so that many are on their way at once.
    for (int64_t number = 0; number < count; ++number) {
      const auto [entry, position] = range.found[number];
      const float score = regularised_score(list.values[position], feedback_[entry], arguments_.distortion, arguments_.mu);
      range.sent_again[number] = {list.offsets[position], list.keys[position], magnitude_key(score)};
    }
    for (int64_t number = 0; number < count; ++number) list.keys[range.found[number].position] = range.sent_again[number].score;
  }

  const CompressArguments& arguments_;
  const PayloadLayout& layout_;
  const Chunks& chunks_;
  const Kernels& kernels_;
  const ParallelFor& parallel_for_;
  float* const residual_;
  const float* const feedback_;
  PayloadWriter<T> writer_;
};

}  // namespace

void compress_chunks(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for) {
  with_value_type(arguments.layout.type, [&]<typename T>(T) {
    if constexpr (sizeof(typename Traits<T>::Accumulate) == sizeof(float)) {
      ChunkCompressor<T>(arguments, kernels, parallel_for).run();
    }
  });
}

}  // namespace regtopk
