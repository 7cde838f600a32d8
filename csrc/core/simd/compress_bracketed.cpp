// Compress with a sampled bracket: one pass over memory where the plain path needs four.
//
//   r, g  [J]  ┄┄┄ sampled sectors ┄┄►  sample      low ┌──────── score ────────┐ high
//      │                                                │   below  │ inside │ above
//      ▼                                                ▼
//   accumulate, block by block (8,192 entries, in the first-level cache):
//      below low     r = a
//      inside        r = a        listed: a, key, offset      ─┐
//      above high    r = a - v    listed, taken to be sent    ─┤   lists, one per range of blocks
//      ┌───────────────────────────────────────────────────────┘
//      ▼
//   choose      the k-th key of the lists, and where its ties end ──►  k entries, and where each block's begin
//      ▼
//   pack        payload; r = a - v where an entry inside is sent, r = a where one above is not
//
//   sample      a few entries -> low <= k-th score <= high, nearly always
//   accumulate  r = a; lists the entries with score >= low, with a, key and offset; those above high are taken to be sent,
//               r = a - v, while their cache line is at hand. Per fp32 entry 8 bytes read, 4 written, and 10 per listed one
//   choose      the k-th score among the listed keys, and the index at which its ties end
//   pack        payload from the lists; corrects r where the bracket's guess was wrong
//
// The result does not depend on the bracket: lists hold every entry at or above `low` that could be sent, so that if at
// least k of those are listed the k best are among them. If fewer are, r holds a by then, and recover() finds a lower `low`
// from an exact histogram of r. Nothing of size J is stored: a range that lists far more than k entries drops all but its k best.
#include "compress_bracketed.h"

#include <limits>
#include <mutex>
#include <numeric>

#include "listed_entries.h"
#include "ranked_keys.h"
#include "sample.h"

namespace regtopk {
namespace {

// Below this many listed entries waking a second thread costs more than it saves.
constexpr int64_t kListedWorthThreads = 1 << 16;
// Share of listed entries from which on a vector of 16 nearly always has one.
constexpr double kCrowded = 1.0 / 16.0;
// Bits of a key that the histogram of a missed bracket leaves out: 2048 bins, so that its tables fit the first-level cache.
constexpr int kBinShift = 20;

template <typename T>
class BracketedCompressor {
 public:
  BracketedCompressor(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for)
      : arguments_(arguments),
        layout_(arguments.layout),
        kernels_(kernels),
        parallel_for_(parallel_for),
        residual_(static_cast<float*>(arguments.residual)),
        feedback_(static_cast<const float*>(arguments.feedback)) {}

  void run() {
    bracket_ = arguments_.bracket ? *arguments_.bracket : sample_bracket<T>(arguments_, parallel_for_);
    list_entries(kernels_.accumulate);
    if (eligible_ < layout_.k) recover();
    choose();
    pack();
    for (const auto& [index, value] : held_back_) residual_[index] = value;
  }

 private:
  using Kernel = int64_t (*)(const AccumulateArguments&);

  Block block_at(int64_t block) const { return Block(block, layout_.numel); }

  void list_entries(Kernel kernel) {
    ranges_.clear();
    std::mutex mutex;
    parallel_for_(Block::count(layout_.numel), [&](int64_t begin, int64_t end) {
      ListedEntries range = list_range(kernel, begin, end);
      const std::lock_guard lock(mutex);
      ranges_.push_back(std::move(range));
    });
    std::sort(ranges_.begin(), ranges_.end(), [](const auto& a, const auto& b) { return a.first_block() < b.first_block(); });
    listed_ = eligible_ = 0;
    for (const ListedEntries& range : ranges_) {
      listed_ += range.size();
      eligible_ += range.size() - range.fallen;
    }
  }

  ListedEntries list_range(Kernel kernel, int64_t begin, int64_t end) const {
    ListedEntries range(begin);
    // A sixteenth more than the sample foresees: growing copies, and what is not used is not touched.
    range.expect(static_cast<int64_t>(17.0 / 16.0 * bracket_.expected * static_cast<double>((end - begin) * kBlockEntries)));
    const int64_t most = 2 * layout_.k + kTileEntries;
    uint32_t list_from = bracket_.low;
    std::optional<BlockCursor> sent;
    if (feedback_ != nullptr) sent.emplace(*arguments_.sent, block_at(begin));
    for (int64_t number = begin; number < end; ++number) {
      const Block block = block_at(number);
      const int64_t listed = kernel(
          {.gradient = static_cast<const T*>(arguments_.gradient) + block.index,
           .residual = residual_ + block.index,
           .decay = static_cast<float>(arguments_.decay),
           .entries = block.entries,
           .first_offset = static_cast<uint32_t>(block.first_offset),
           .list_from = list_from,
           .sent_above = bracket_.high,
           .crowded = bracket_.expected > kCrowded,
           .out = range.next_block(),
           .non_finite = &range.non_finite});
      range.add_block(listed);
      if (sent) regularise(range, number, list_from, *sent);
      if (range.size() - range.fallen < layout_.k) continue;
      // k entries of this range come before any later one with the key `low`: ties need no further listing.
      list_from = std::max(list_from, bracket_.low + 1);
      if (range.size() > most) list_from = std::max(list_from, keep_best(range) + 1);
    }
    return range;
  }

  // RegTop-k: replaces the keys of the last block's listed entries that were sent in the last step, and notes both. Entries
  // that are not listed matter neither way: a factor never raises a score. Those that fall below what is listed stay in the
  // list, which is less work than closing the gaps; they cannot be among the k.
  void regularise(ListedEntries& range, int64_t number, uint32_t list_from, BlockCursor& sent) const {
    const Block block = block_at(number);
    const ListArrays list = range.from(0);
    const int64_t tile_index = block.tile * kTileEntries;
    BlockCursor::Found found[kBlockEntries];
    const int64_t count = sent.find_listed(block, list.offsets, range.size() - range.listed_in(number), range.size(), found);
    // The scores by themselves, so that many are on their way at once.
    const size_t before = range.sent_again.size();
    range.sent_again.resize(before + static_cast<size_t>(count));
    SentAgain* const sent_again = range.sent_again.data() + before;
    for (int64_t number_found = 0; number_found < count; ++number_found) {
      const auto [entry, position] = found[number_found];
      const float score = regularised_score(list.values[position], feedback_[entry], arguments_.distortion, arguments_.mu);
      sent_again[number_found] = {tile_index + list.offsets[position], list.keys[position], magnitude_key(score)};
    }
    for (int64_t number_found = 0; number_found < count; ++number_found) {
      const auto [index, magnitude, score] = sent_again[number_found];
      const int64_t position = found[number_found].position;
      if (magnitude > bracket_.high && score <= bracket_.high) take_back(index, list.values[position]);
      list.keys[position] = score;
      range.fallen += score < list_from;
    }
  }

  // An entry was taken to be sent and is not. One that is not finite kept its residual anyway.
  void take_back(int64_t index, float accumulated) const {
    if (is_finite(accumulated)) residual_[index] = accumulated;
  }

  // Keeps the first k in the total order and returns the key of the last one.
  uint32_t keep_best(ListedEntries& range) const {
    const uint32_t last_key = RankedKeys(range.keys(), range.size()).exactly(layout_.k);
    int64_t above, ties;
    kernels_.count_keys(range.keys(), range.size(), last_key, &above, &ties);
    int64_t ties_wanted = layout_.k - above;
    const ListArrays list = range.from(0);
    const auto keep = [&](int64_t at) { return list.keys[at] > last_key || (list.keys[at] == last_key && ties_wanted-- > 0); };
    range.filter(keep, [&](int64_t block, int64_t at) {
      if (list.keys[at] > bracket_.high) take_back(block_at(block).tile * kTileEntries + list.offsets[at], list.values[at]);
    });
    return last_key;
  }

  // Calls body(index in the bucket, list, position) for every listed entry.
  template <typename Body>
  void for_each_listed(const Body& body) {
    for (ListedEntries& range : ranges_) {
      const ListArrays list = range.from(0);
      int64_t position = 0;
      for (int64_t number = range.first_block(); number < range.first_block() + range.blocks(); ++number) {
        const int64_t tile_index = block_at(number).tile * kTileEntries;
        for (const int64_t end = position + range.listed_in(number); position < end; ++position) {
          body(tile_index + list.offsets[position], list, position);
        }
      }
    }
  }

  // The bracket missed. r holds a but for the listed entries: makes that good, an entry that is not finite included, whose
  // residual is held back until the end; then takes the bracket from an exact histogram and lists again.
  void recover() {
    for_each_listed([&](int64_t index, const ListArrays& list, int64_t position) {
      const float accumulated = list.values[position];
      if (!is_finite(accumulated)) held_back_.emplace_back(index, residual_[index]);
      else if (list.keys[position] <= bracket_.high) return;
      residual_[index] = accumulated;
    });
    const std::vector<int64_t> histogram = histogram_of_scores();
    int64_t bin = static_cast<int64_t>(histogram.size()) - 1;
    int64_t before = 0;
    while (before + histogram[bin] < layout_.k) before += histogram[bin--];
    bracket_.low = static_cast<uint32_t>(bin) << kBinShift;
    bracket_.high = bracket_.low | ((1u << kBinShift) - 1);
    bracket_.expected = std::min(1.0, 2.0 * static_cast<double>(layout_.k) / static_cast<double>(layout_.numel));
    const bool non_finite = !held_back_.empty();
    list_entries(kernels_.list_again);
    for (ListedEntries& range : ranges_) range.non_finite |= non_finite;
  }

  // Counts of the scores by the upper bits of their keys. Entries that are not finite may be in any of the last bins: they
  // were all listed, so that the one that is looked for is below.
  std::vector<int64_t> histogram_of_scores() const {
    std::vector<int64_t> total(size_t{1} << (31 - kBinShift), 0);
    std::mutex mutex;
    parallel_for_(layout_.tiles, [&](int64_t begin, int64_t end) {
      // Tables used in turn: with one, equal keys in a row would wait for each other's count.
      constexpr int64_t kTables = 4;
      std::vector<uint32_t> tables(total.size() * kTables, 0);
      const auto count_of = [&](float value, int64_t table) -> uint32_t& {
        return tables[((std::bit_cast<uint32_t>(value) & 0x7fffffffu) >> kBinShift) * kTables + table];
      };
      for (int64_t tile = begin; tile < end; ++tile) {
        const float* const values = residual_ + tile * kTileEntries;
        const int64_t entries = layout_.tile_entries(tile);
        int64_t at = 0;
        for (; at + kTables <= entries; at += kTables) {
          for (int64_t table = 0; table < kTables; ++table) ++count_of(values[at + table], table);
        }
        for (; at < entries; ++at) ++count_of(values[at], 0);
        if (feedback_ == nullptr) continue;
        arguments_.sent->for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          --count_of(values[offset], 0);
          ++count_of(regularised_score(values[offset], feedback_[entry], arguments_.distortion, arguments_.mu), 0);
        });
      }
      const std::lock_guard lock(mutex);
      for (size_t bin = 0; bin < total.size(); ++bin) {
        // Wraps around where an entry left another table than it was counted in; the sum does not.
        uint32_t sum = 0;
        for (int64_t table = 0; table < kTables; ++table) sum += tables[bin * kTables + table];
        total[bin] += sum;
      }
    });
    return total;
  }

  // Finds the last entry sent in the total order, boundary_key_ and boundary_index_, and where each block's entries begin.
  void choose() {
    const int64_t ranges = static_cast<int64_t>(ranges_.size());
    std::vector<int64_t> above_high_of(ranges);
    for_listed(ranges, [&](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) {
        int64_t equal;
        kernels_.count_keys(ranges_[range].keys(), ranges_[range].size(), bracket_.high, &above_high_of[range], &equal);
      }
    });
    const int64_t above_high = std::accumulate(above_high_of.begin(), above_high_of.end(), int64_t{0});
    const bool among_high = above_high >= layout_.k;
    const uint32_t low = among_high ? bracket_.high + 1 : bracket_.low;
    const uint32_t high = among_high ? 0x7fffffffu : bracket_.high;
    const int64_t most = among_high ? above_high : listed_ - above_high;
    const Scratch memory((most + kListSlack) * static_cast<int64_t>(sizeof(uint32_t)));
    uint32_t* const candidates = memory.array<uint32_t>();
    int64_t gathered = 0;
    for (const ListedEntries& range : ranges_) {
      gathered += kernels_.gather_keys(range.keys(), range.size(), low, high, candidates + gathered);
    }
    boundary_key_ = RankedKeys(candidates, gathered).exactly(layout_.k - (among_high ? 0 : above_high));
    place_blocks();
  }

  void place_blocks() {
    const int64_t blocks = Block::count(layout_.numel);
    placed_memory_ = Scratch(blocks * static_cast<int64_t>(sizeof(Placed)));
    placed_ = placed_memory_.array<Placed>();
    for (size_t number = 0; number < ranges_.size(); ++number) {
      const ListedEntries& range = ranges_[number];
      int64_t position = 0;
      for (int64_t block = range.first_block(); block < range.first_block() + range.blocks(); ++block) {
        const int64_t listed = range.listed_in(block);
        placed_[block] = {position, static_cast<uint32_t>(number), static_cast<uint32_t>(listed), 0, 0, 0, 0};
        position += listed;
      }
    }
    for_listed(blocks, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        int64_t above, ties;
        kernels_.count_keys(list_of(placed_[block]).keys, placed_[block].listed, boundary_key_, &above, &ties);
        placed_[block].above = static_cast<uint32_t>(above);
        placed_[block].ties = static_cast<uint32_t>(ties);
      }
    });
    int64_t ties_wanted = layout_.k;
    for (int64_t block = 0; block < blocks; ++block) ties_wanted -= placed_[block].above;
    int64_t entry = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      Placed& placed = placed_[block];
      placed.first_entry = static_cast<uint32_t>(entry);
      const int64_t taken = std::min<int64_t>(placed.ties, ties_wanted);
      placed.ties_until = taken > 0 ? static_cast<uint32_t>(kTileEntries) : 0;
      if (taken > 0 && taken == ties_wanted) {
        const uint16_t last_offset = offset_of_tie(list_of(placed), taken);
        placed.ties_until = last_offset + 1u;
        boundary_index_ = block_at(block).tile * kTileEntries + last_offset;
      }
      ties_wanted -= taken;
      entry += placed.above + taken;
    }
  }

  // Work that grows with the listed entries, cut into `count` parts.
  template <typename Body>
  void for_listed(int64_t count, const Body& body) const {
    if (listed_ < kListedWorthThreads) serial_for(count, body);
    else parallel_for_(count, body);
  }

  // A block: where its list is, and what of it is sent.
  struct Placed {
    int64_t position;  // of its list in the range's
    uint32_t range, listed;
    uint32_t above, ties;  // listed entries above the boundary's key, and equal to it
    uint32_t first_entry;  // in the payload
    uint32_t ties_until;   // ties with a smaller offset are sent
  };

  ListArrays list_of(const Placed& placed) const { return ranges_[placed.range].from(placed.position); }

  uint16_t offset_of_tie(const ListArrays& list, int64_t count) const {
    int64_t position = 0;
    while (!(list.keys[position] == boundary_key_ && --count == 0)) ++position;
    return list.offsets[position];
  }

  void pack() {
    PayloadWriter<T> writer(arguments_.payload, layout_);
    const bool bitmap = layout_.support == Support::kBitmap;
    for_listed(Block::count(layout_.numel), [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const Placed& placed = placed_[number];
        const int64_t tile = block_at(number).tile;
        if (number % kTileBlocks == 0) writer.set_first_entry(tile, placed.first_entry);
        kernels_.pack(
            {.list = list_of(placed),
             .listed = placed.listed,
             .boundary_key = boundary_key_,
             .ties_until = placed.ties_until,
             .sent_above = bracket_.high,
             .residual = residual_ + tile * kTileEntries,
             .values = writer.values() + placed.first_entry,
             .offsets = bitmap ? nullptr : writer.offsets() + placed.first_entry,
             .bitmap = bitmap ? writer.bitmap(tile) : nullptr});
      }
    });
    PayloadHeader header = make_header(layout_, arguments_.step, arguments_.plan);
    for (const ListedEntries& range : ranges_) {
      if (range.non_finite) header.flags |= kFlagNonFinite;
      for (const SentAgain& sent : range.sent_again) {
        if (is_chosen(sent.score, sent.index)) ++header.repeated;
        else if (is_chosen(sent.magnitude, sent.index)) ++header.displaced;
      }
    }
    if (arguments_.sent != nullptr && feedback_ == nullptr) {
      header.repeated = static_cast<uint64_t>(count_common(*arguments_.sent, PayloadView(arguments_.payload, layout_), parallel_for_));
    }
    writer.set_header(header);
  }

  bool is_chosen(uint32_t key, int64_t index) const { return key > boundary_key_ || (key == boundary_key_ && index <= boundary_index_); }

  const CompressArguments& arguments_;
  const PayloadLayout& layout_;
  const Kernels& kernels_;
  const ParallelFor& parallel_for_;
  float* residual_;
  const float* feedback_;
  Bracket bracket_;
  std::vector<ListedEntries> ranges_;
  int64_t listed_ = 0, eligible_ = 0;  // entries in the lists, and those of them that have not fallen
  std::vector<std::pair<int64_t, float>> held_back_;  // index and residual of entries that are not finite
  uint32_t boundary_key_ = 0;
  int64_t boundary_index_ = -1;
  Scratch placed_memory_;
  Placed* placed_ = nullptr;  // one per block
};

}  // namespace

void compress_bracketed(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for) {
  with_value_type(arguments.layout.type, [&]<typename T>(T) {
    if constexpr (sizeof(typename Traits<T>::Accumulate) == sizeof(float)) {
      BracketedCompressor<T>(arguments, kernels, parallel_for).run();
    }
  });
}

}  // namespace regtopk
