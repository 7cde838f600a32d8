// Finish: the exact choice among the listed entries, and the payload. Where the bracket missed or the list overflowed, the
// same kernel finds the choice in the residual.
#include "look_back.cuh"
#include "phases.cuh"
#include "selection.cuh"
#include "settle.cuh"
#include "write_payload.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = kFinishWarps * kWarpThreads;
// Blocks of a multiprocessor that registers are counted for: for sm_100 three would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr unsigned kBlocksWithFeedback = 2;
#else
constexpr unsigned kBlocksWithFeedback = kFinishBlocks;
#endif

template <typename T, bool kHasFeedback>
class Finish {
  using Device = CompressDevice<T>;
  using Accumulate = typename Device::Accumulate;
  using Bits = typename Device::Bits;
  using Set = typename Device::Set;
  static constexpr unsigned kEntries = Device::kEntries;

 public:
  struct Shared {
    uint32_t bins[kHistogramBins];
    Set sent[kFinishWarps];    // of the block tile that the warp has in hand
    Set chosen[kFinishWarps];
    uint32_t smallest[kFinishWarps];
    typename BlockGroup<kThreads>::Scratch scratch;
    Found<1> found;
    SentSize sent_size;
    bool sent_is_ours;
    typename LookBack<kThreads, 2>::Shared look_back;
    uint32_t above[kFinishWarps], ties[kFinishWarps];  // of the warps' block tiles
  };

  __device__ Finish(const Device& device, Shared& shared)
      : device_(device),
        shared_(shared),
        warp_(),
        sent_(shared.sent[threadIdx.x / kWarpThreads]),
        chosen_(shared.chosen[threadIdx.x / kWarpThreads]) {
    if (threadIdx.x == 0) {
      const SentSize ours = device.sent.ours();
      shared_.sent_is_ours = !device.sent.bytes || ours.entries > 0;
      shared_.sent_size = device.sent.is_void() ? SentSize{} : ours;
    }
    __syncthreads();
  }

  __device__ void run(const Phases& phases) {
    const BlockGroup<kThreads> group{shared_.scratch};
    uint32_t ticket = phases.draw();
    for (uint32_t phase = 0;; ++phase) {
      Selection<Bits> selection = device_.selection.load_uniform(1 + phase);
      if (selection.task == Task::kNarrow) clear_bins();
      const uint32_t end = selection.first_ticket + selection.items;
      uint32_t items = 0;
      for (; ticket < end; ticket = phases.draw(), ++items) {
        work(selection, ticket - selection.first_ticket);
      }
      if (selection.task == Task::kPack) {  // the last one
        if (phases.finish_items(items, selection.items) && threadIdx.x == 0) write_header(device_, shared_.sent_is_ours);
        return;
      }
      if (items > 0 && selection.task == Task::kNarrow) add_bins();
      const bool last = phases.finish_items(items, selection.items);
      if (last) {
        decide(group, selection, phase);
        phases.publish();
      }
      phases.wait_until(phase + 1);
    }
  }

 private:
  __device__ void clear_bins() {
    for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) shared_.bins[bin] = 0;
    __syncthreads();
  }
  __device__ void add_bins() {
    __syncthreads();
    for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) {
      if (shared_.bins[bin] != 0) device_.histogram.add(bin, shared_.bins[bin]);
    }
  }
  __device__ void count_key(const Selection<Bits>& selection, Bits key) {
    if (in_range(selection, key)) atomicAdd(&shared_.bins[(key - selection.low) >> selection.shift], 1u);
  }

  __device__ void work(const Selection<Bits>& selection, uint32_t item) {
    if (selection.task == Task::kNarrow && !selection.from_residual) {
      narrow_list(selection, item);
      return;
    }
    if (selection.task == Task::kPack) pack(selection, item);
    else if (selection.task == Task::kCollect) each_tile(item, [&](uint32_t block) { collect(selection, block); });
    else each_tile(item, [&](uint32_t block) { visit(selection, block, Purpose::kNarrow); });
  }
  // The block tiles of an item that are this warp's.
  template <typename Function>
  __device__ void each_tile(uint32_t item, const Function& function) {
    const uint32_t first = (item * kFinishWarps + threadIdx.x / kWarpThreads) * device_.tiles_of_warp;
    for (uint32_t block = first; block < first + device_.tiles_of_warp && block < device_.blocks; ++block) function(block);
  }

  struct Entry {
    Accumulate accumulated;
    Bits key;
    bool was_sent;
  };

  __device__ Bits listed_key(uint32_t at) const {
    if constexpr (kHasFeedback) return device_.list_keys.load(at);
    else return magnitude_key(device_.list_values.load(at));
  }
  __device__ void narrow_list(const Selection<Bits>& selection, uint32_t item) {
    const uint32_t size = device_.counters.load_uniform(kListSize), first = item * kListChunk;
    const uint32_t entries = size - first < kListChunk ? size - first : kListChunk;
    for (uint32_t i = threadIdx.x; i < entries; i += kThreads) count_key(selection, listed_key(first + i));
  }

  // a of an entry, after accumulate: the residual; where a is not finite the residual it had, decayed, plus the gradient; and 0 where
  // the span is idle.
  __device__ Accumulate accumulated(uint32_t block, uint32_t offset, uint32_t marks) const {
    const uint32_t index = block * kEntries + offset;
    if (is_idle(index, marks)) return 0;
    const Accumulate kept = device_.residual.load(index);
    if ((marks & kHasNonFinite) != 0 && ((device_.non_finite.load(index / 32) >> (index % 32)) & 1)) {
      return kept * device_.decay + Traits<T>::load(device_.gradient.load(index));
    }
    return kept;
  }
  __device__ bool is_idle(uint32_t index, uint32_t marks) const {
    return (marks & kHasIdle) != 0 && ((device_.idle_entries.load(index / 32) >> (index % 32)) & 1) != 0;
  }
  // Of a block tile: kHasNonFinite, kHasIdle.
  __device__ uint32_t marks_of(uint32_t block) const { return device_.list_entries.load_uniform(block) & ~kListedEntries; }

  // Of an entry sent in the last step, in the block tile that each_of_residual loaded.
  __device__ Bits score_key(Accumulate accumulated, uint32_t offset) const {
    const uint32_t number = first_sent_ + sent_.rank_of(offset);
    return number < shared_.sent_size.entries ? device_.score_of_sent(accumulated, number) : magnitude_key(accumulated);
  }

  // Calls function(offset, entry) for each entry of a block tile.
  template <typename Function>
  __device__ void each_of_residual(uint32_t block, const Function& function) {
    const uint32_t entries = device_.entries_of(block), marks = marks_of(block);
    const SentSize sent = shared_.sent_size;
    if (sent.entries > 0) {
      first_sent_ = device_.sent.reader(sent).load_block(warp_, block, sent_, shared_.smallest[threadIdx.x / kWarpThreads]);
    }
    for (uint32_t offset = warp_.rank(); offset < entries; offset += kWarpThreads) {
      Entry entry;
      entry.accumulated = accumulated(block, offset, marks);
      entry.was_sent = sent.entries > 0 && sent_.contains(offset);
      entry.key = kHasFeedback && entry.was_sent ? score_key(entry.accumulated, offset) : magnitude_key(entry.accumulated);
      function(offset, entry);
    }
    warp_.sync();
  }
  template <typename Function>
  __device__ void each_of_list(uint32_t block, const Function& function) {
    const uint32_t begin = device_.list_begin.load_uniform(block), entries = device_.list_entries.load_uniform(block) & kListedEntries;
    for (uint32_t i = warp_.rank(); i < entries; i += kWarpThreads) {
      const uint16_t offset = device_.list_offsets.load(begin + i);
      const Accumulate value = device_.list_values.load(begin + i);
      Bits key = magnitude_key(value);
      if constexpr (kHasFeedback) key = device_.list_keys.load(begin + i);
      function(static_cast<uint32_t>(offset & ~kWasSent), Entry{value, key, (offset & kWasSent) != 0});
    }
  }

  // What a look at the entries of a block tile is for. One function for all of them, because each copy of the loops over
  // residual and list costs a thousand instructions.
  enum class Purpose {
    kNarrow,   // count the keys in the range by bin
    kCollect,  // choose what may be sent by the range
    kCount,    // count keys above the k-th score and at it
    kTies,     // choose the keys at it
    kChoose    // choose what is sent, ties up to ties_end; count the repeated and the displaced entries
  };
  struct Counts {
    uint32_t above = 0, ties = 0, repeated = 0, displaced = 0;
  };
  // Choosing adds to chosen_.
  __device__ Counts visit(const Selection<Bits>& selection, uint32_t block, Purpose purpose, uint32_t ties_end = 0) {
    Counts counts;
    const Bits low = selection.low;
    const auto look = [&](uint32_t offset, const Entry& entry) {
      bool choose = false;
      if (purpose == Purpose::kNarrow) {
        count_key(selection, entry.key);
      } else if (purpose == Purpose::kCollect) {
        choose = magnitude_key(entry.accumulated) >= (low < kInfinityKey<Bits> ? low : kInfinityKey<Bits>);
      } else if (purpose == Purpose::kCount) {
        counts.above += entry.key > low;
        counts.ties += entry.key == low;
      } else if (purpose == Purpose::kTies) {
        choose = entry.key == low;
      } else {
        const Bits magnitude = magnitude_key(entry.accumulated);
        choose = entry.key > low || (entry.key == low && offset < ties_end);
        counts.repeated += entry.was_sent && choose;
        counts.displaced += entry.was_sent && !choose && (magnitude > low || (magnitude == low && offset < ties_end));
      }
      if (choose) chosen_.insert(offset);
    };
    if (selection.from_residual) each_of_residual(block, look);
    else each_of_list(block, look);
    return counts;
  }

  // Fills the list anew, with what may be sent by the narrower range: one more read of the residual.
  __device__ void collect(const Selection<Bits>& selection, uint32_t block) {
    chosen_.clear(warp_);
    visit(selection, block, Purpose::kCollect);
    const uint32_t entries = chosen_.rank(warp_);
    const uint32_t marks = marks_of(block);
    uint32_t begin = 0;
    if (warp_.rank() == 0 && entries > 0) begin = device_.counters.add(kListSize, entries);
    begin = __shfl_sync(kAllLanes, begin, 0);
    if (warp_.rank() == 0) {
      device_.list_begin.store(block, begin);
      device_.list_entries.store(block, entries | marks);
    }
    if (begin + uint64_t{entries} > static_cast<uint64_t>(device_.sampling.list_capacity)) return;
    each_chosen(block, marks, [&](uint32_t offset, Accumulate value) {
      const uint32_t at = begin + chosen_.rank_of(offset);
      const bool was_sent = shared_.sent_size.entries > 0 && sent_.contains(offset);
      Bits key = magnitude_key(value);
      if constexpr (kHasFeedback) {
        if (was_sent) key = score_key(value, offset);
        device_.list_keys.store(at, key);
      }
      device_.list_values.store(at, value);
      device_.list_offsets.store(at, static_cast<uint16_t>(offset | (was_sent ? kWasSent : 0)));
    });
  }

  // Calls function(offset, a) for each entry of chosen_.
  template <typename Function>
  __device__ void each_chosen(uint32_t block, uint32_t marks, const Function& function) {
    for (unsigned word = warp_.rank(); word < Set::kWords; word += kWarpThreads) {
      for (uint32_t bits = chosen_.words[word]; bits != 0; bits &= bits - 1) {
        const uint32_t offset = word * 32 + __ffs(bits) - 1;
        function(offset, accumulated(block, offset, marks));
      }
    }
  }

  // One past the offset of the last tie that is sent. Ties are sent in index order until k entries are: all of this block
  // tile's, none, or, in the one tile where they run out, those up to an offset.
  __device__ uint32_t end_of_ties(const Selection<Bits>& selection, uint32_t block, uint32_t before, uint32_t wanted) {
    if (before >= wanted) return 0;
    if (before + (device_.counts.load_uniform(block) >> 16) < wanted) return kEntries;
    chosen_.clear(warp_);
    visit(selection, block, Purpose::kTies);
    chosen_.rank(warp_);
    return chosen_.member(wanted - before - 1) + 1;
  }

  // The entries of an item that are sent, behind those of all items before it.
  __device__ void pack(const Selection<Bits>& selection, uint32_t item) {
    const unsigned own = threadIdx.x / kWarpThreads;
    Counts of_warp;
    each_tile(item, [&](uint32_t block) {
      const Counts counts = visit(selection, block, Purpose::kCount);
      const uint32_t above = warp_.sum(counts.above), ties = warp_.sum(counts.ties);
      if (warp_.rank() == 0) device_.counts.store(block, above | ties << 16);
      of_warp.above += above;
      of_warp.ties += ties;
    });
    if (warp_.rank() == 0) shared_.above[own] = of_warp.above, shared_.ties[own] = of_warp.ties;
    __syncthreads();
    Counts before;
    typename LookBack<kThreads, 2>::Sums all;  // above and ties
#pragma unroll
    for (unsigned warp = 0; warp < kFinishWarps; ++warp) {
      if (warp == own) before.above = static_cast<uint32_t>(all.of[0]), before.ties = static_cast<uint32_t>(all.of[1]);
      all.of[0] += shared_.above[warp];
      all.of[1] += shared_.ties[warp];
    }
    const auto of_items = LookBack<kThreads, 2>{device_.counts_of_item, shared_.look_back}.before(item, all);
    before.above += static_cast<uint32_t>(of_items.of[0]);
    before.ties += static_cast<uint32_t>(of_items.of[1]);
    const uint32_t wanted = static_cast<uint32_t>(device_.layout.k) - selection.above;
    each_tile(item, [&](uint32_t block) {
      const uint32_t counts = device_.counts.load_uniform(block);
      const uint32_t first = before.above + (before.ties < wanted ? before.ties : wanted);
      pack(selection, block, first, end_of_ties(selection, block, before.ties, wanted));
      before.above += counts & 0xffff;
      before.ties += counts >> 16;
    });
  }

  // A block tile, whose first entry in the payload is number `first`.
  __device__ void pack(const Selection<Bits>& selection, uint32_t block, uint32_t first, uint32_t ties_end) {
    warp_.sync();
    chosen_.clear(warp_);
    const Counts counts = visit(selection, block, Purpose::kChoose, ties_end);
    chosen_.rank(warp_);

    const DevicePayloadWriter<T> writer(device_.payload, device_.layout);
    constexpr uint32_t kBlocksPerTile = kTileEntries / kEntries;
    if (block % kBlocksPerTile == 0 && warp_.rank() == 0) writer.store_first_entry(block / kBlocksPerTile, first);
    if (device_.layout.support == Support::kBitmap) {
      for (unsigned word = warp_.rank(); word < Set::kWords; word += kWarpThreads) {
        writer.store_bitmap_word(block * Set::kWords + word, chosen_.words[word]);
      }
    }
    const uint32_t marks = marks_of(block);
    const auto send = [&](uint32_t offset, Accumulate accumulated) {
      const uint32_t entry = first + chosen_.rank_of(offset), index = block * kEntries + offset;
      if (entry >= device_.layout.k) return;  // never, with feedback that aggregate wrote
      const bool is_number = accumulated == accumulated;
      const T value = Traits<T>::store(is_number ? accumulated : std::numeric_limits<Accumulate>::quiet_NaN());
      writer.store_entry(entry, index, value);
      // Of an idle span 0 is sent, and the residual keeps what it has.
      if (!is_finite(accumulated) || (accumulated == 0 && is_idle(index, marks))) return;
      device_.residual.store(index, accumulated - Traits<T>::load(value));
    };
    if (selection.from_residual) {
      each_chosen(block, marks, send);
    } else {
      each_of_list(block, [&](uint32_t offset, const Entry& entry) {
        if (chosen_.contains(offset)) send(offset, entry.accumulated);
      });
    }
    const uint32_t repeated = warp_.sum(counts.repeated), displaced = warp_.sum(counts.displaced);
    if (warp_.rank() == 0 && repeated > 0) device_.counters.add(kRepeated, repeated);
    if (warp_.rank() == 0 && displaced > 0) device_.counters.add(kDisplaced, displaced);
  }

  // By the one block that finished the phase: what the next phase does.
  __device__ void decide(const BlockGroup<kThreads>& group, Selection<Bits> selection, uint32_t phase) {
    const uint32_t next_ticket = selection.first_ticket + selection.items;
    const uint32_t k = static_cast<uint32_t>(device_.layout.k);
    if (selection.task == Task::kNarrow) {
      const Bin bin = find_bin(group, shared_.found, k - selection.above, [&](unsigned i) { return device_.histogram.load(i); });
      for (unsigned i = threadIdx.x; i < kHistogramBins; i += kThreads) device_.histogram.store(i, 0);
      take_bin(selection, bin);
      choose_task(selection, device_);
      if (selection.task == Task::kCollect && threadIdx.x == 0) device_.counters.store(kListSize, 0);
    } else {  // kCollect
      selection.collected = 1;
      selection.from_residual = device_.counters.load(kListSize) > static_cast<uint64_t>(device_.sampling.list_capacity);
      choose_task(selection, device_);
    }
    selection.first_ticket = next_ticket;
    if (threadIdx.x == 0) device_.selection.store(2 + phase, selection);
  }

  const Device& device_;
  Shared& shared_;
  WarpGroup warp_;
  Set& sent_;
  Set& chosen_;
  uint32_t first_sent_ = 0;
};

// A block owns, in each phase, the items whose tickets it draws: a block tile to a warp, or 2,048 entries of the list.
// Per listed entry, 1.2 to 3 k of them: 4 bytes read to narrow, 6 to count, 6 and once more 6 to pack (10 with feedback);
// per entry sent 6 bytes written to the payload and 4 to the residual. Nothing per element, unless the bracket missed:
// then two reads of the residual, 8 bytes per element in fp32, to narrow and to fill the list anew; where more entries
// share one score than the list holds, the residual takes the list's place and is read once more for every phase.
// Places are counts of entries before, by index, so that neither tickets nor threads decide them.
template <typename T, bool kHasFeedback>
__global__ void __launch_bounds__(
    kThreads, sizeof(typename Traits<T>::Accumulate) == 8 ? 2
              : kHasFeedback                              ? kBlocksWithFeedback
                                                          : kFinishBlocks) finish_kernel(const __grid_constant__ CompressDevice<T> device) {
  using Work = Finish<T, kHasFeedback>;
  REGTOPK_SHARED(typename Work::Shared, shared);
  REGTOPK_SHARED(Phases::Shared, phases);
  wait_for_stream();
  const Phases together{device.counters, phases};
  Work(device, shared).run(together);
  together.leave();
}

}  // namespace

template <typename T>
void launch_finish(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream) {
  const unsigned tiles = kFinishWarps * device.tiles_of_warp, items = (device.blocks + tiles - 1) / tiles;
  const unsigned most = static_cast<unsigned>(multiprocessors()) * kFinishBlocks, blocks = items < most ? items : most;
  if (has_feedback) REGTOPK_LAUNCH_EARLY((finish_kernel<T, true>), blocks, kThreads, stream, device);
  else REGTOPK_LAUNCH_EARLY((finish_kernel<T, false>), blocks, kThreads, stream, device);
}
template void launch_finish<double>(const CompressDevice<double>&, bool, cudaStream_t);
template void launch_finish<float>(const CompressDevice<float>&, bool, cudaStream_t);
template void launch_finish<BFloat16>(const CompressDevice<BFloat16>&, bool, cudaStream_t);
template void launch_finish<Half>(const CompressDevice<Half>&, bool, cudaStream_t);

}  // namespace regtopk
