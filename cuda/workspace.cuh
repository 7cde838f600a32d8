// What the kernels of one compress share: their arguments and the workspace.
#pragma once

#include <cstdint>

#include "bucket_spans.cuh"
#include "global_memory.cuh"
#include "launch.h"
#include "payload_reader.cuh"
#include "write_payload.cuh"

namespace regtopk {

inline constexpr unsigned kHistogramBins = 2048;
inline constexpr unsigned kHistogramBits = 11;
// Written in the number of a block tile's listed entries: some of its accumulated gradient is not finite.
inline constexpr uint32_t kHasNonFinite = 0x80000000u;
inline constexpr uint32_t kHasIdle = 0x40000000u;  // some of its entries are those of idle spans
inline constexpr uint32_t kListedEntries = 0x3fffffffu;
// Written in an entry's offset in the list: the entry was sent in the last step.
inline constexpr uint16_t kWasSent = 0x8000;

// Zero before each call, and zeroed by the last block of finish.
enum Counter : unsigned {
  kSettleDone,      // blocks
  kSampleDone,      // blocks
  kAccumulateDone,  // blocks
  kHits,            // entries whose score is above the bracket
  kListSize,        // entries that belong in the list, more than it holds if it overflowed
  kNonFinite,
  kTicket,          // of finish: the next one to give out
  kItemsDone,       // of the current phase of finish
  kPhase,           // of finish
  kRepeated,
  kDisplaced,
  kLeft,            // blocks of finish
  kCounters = 16
};

enum class Task : uint32_t { kNarrow, kCollect, kPack };

// What is known of the k-th score: it lies in [low, high], `above` entries score more than high, `inside` lie in the range.
// low == high says all. And what finish does next, over the list or over the residual.
template <typename Bits>
struct alignas(16) Selection {
  Bits low, high;
  uint32_t shift;          // (key - low) >> shift is the bin of a key
  uint32_t above, inside;
  uint32_t from_residual;  // the list does not hold all that may be sent
  uint32_t collected;      // it was filled a second time
  Task task;
  uint32_t first_ticket, items;
};

// The bracket and the phases of finish. Narrowing gains 11 bits each time: at most 6 times over the residual and 6 over the
// list in fp64, and collect and pack.
inline constexpr unsigned kSelections = 20;

inline constexpr unsigned kFinishWarps = 8, kFinishBlocks = 3;  // of a block, of a multiprocessor

template <typename T>
struct CompressDevice {
  using Accumulate = typename Traits<T>::Accumulate;
  using Bits = typename Traits<T>::Bits;
  static constexpr unsigned kEntries = kBlockEntries<Accumulate>;
  using Set = TileSet<kEntries>;

  explicit CompressDevice(const PayloadLayout& bucket)
      : layout(bucket), blocks(static_cast<uint32_t>((bucket.numel + kEntries - 1) / kEntries)) {}

  PayloadLayout layout;
  uint32_t blocks;             // block tiles
  uint32_t tiles_of_warp = 1;  // of finish, in each item
  Global<const T> gradient;
  Global<Accumulate> residual;
  Global<uint8_t> payload;
  uint64_t step, plan;
  SentPayload<T> sent;
  Distortion distortion;
  double mu;
  Accumulate decay;
  Chunks chunks;
  Sampling sampling;
  DeviceSpans spans;
  Global<unsigned long long> totals;  // the counters that the operators share, or null

  Global<uint32_t> not_zero;                    // spans, for settle
  Global<uint32_t> any_idle;                    // whether there is an idle span
  Global<uint32_t> idle_spans;                  // a bit per span
  Global<uint32_t> first_span;                  // of each block tile
  Global<uint32_t> idle_entries;                // a bit per entry, of the block tiles marked kHasIdle
  Global<Selection<Bits>> selection;   // the bracket, then one for each phase of finish: written once, so never half new
  Global<uint32_t> counters, histogram;  // who reads the histogram zeroes it
  Global<T> tail_gradient;             // the last J % 4 entries, then zeros: a whole vector
  Global<Accumulate> tail_residual;
  Global<Bits> samples;
  Global<uint32_t> list_begin, list_entries;    // by block tile
  Global<uint32_t> counts;                      // by block tile: entries above the k-th score, and from bit 16 on those at it
  Global<uint64_t> counts_of_item;              // of finish, the same for those after it: look_back.cuh; zeroed by accumulate
  Global<uint32_t> non_finite;                  // a bit per entry, of the block tiles marked kHasNonFinite
  Global<Accumulate> list_values;
  Global<Bits> list_keys;                       // only with feedback: otherwise the value says it
  Global<uint16_t> list_offsets;                // in the block tile, with kWasSent

  __device__ uint32_t entries_of(uint32_t block) const {
    const uint32_t first = block * kEntries, numel = static_cast<uint32_t>(layout.numel);
    return numel - first < kEntries ? numel - first : kEntries;
  }
  // Of finish: to each warp of a block as many block tiles.
  REGTOPK_HOST_DEVICE uint32_t items() const {
    const uint32_t tiles = kFinishWarps * tiles_of_warp;
    return (blocks + tiles - 1) / tiles;
  }
  __device__ bool has_idle() const { return spans && any_idle.load_uniform(0) != 0; }
  // Of 32 entries of a block tile, those of idle spans; all lanes of a warp call it together.
  __device__ uint32_t idle_word(uint32_t block, uint32_t word) const {
    return spans.entries_in(idle_spans, first_span.load_uniform(block), block * kEntries, entries_of(block), word);
  }
  __device__ Bits score_of_sent(Accumulate accumulated, uint32_t entry) const {
    return magnitude_key(regularised_score(accumulated, sent.feedback.load(entry), distortion, mu));
  }
};

template <typename Bits>
inline constexpr Bits kLargestKey = static_cast<Bits>(~Bits{0}) >> 1;
template <typename Bits>
inline constexpr Bits kInfinityKey = sizeof(Bits) == 8 ? static_cast<Bits>(0x7ff0000000000000ull) : static_cast<Bits>(0x7f800000u);

// Gives the parts of a workspace their places, one call after the other; of a null workspace there is the size alone.
struct Cutter {
  uint8_t* workspace;
  int64_t bytes = 0;  // so far

  template <typename U>
  void operator()(Global<U>& part, int64_t entries) {
    part = Global<U>(reinterpret_cast<U*>(workspace + bytes));
    bytes += (entries * static_cast<int64_t>(sizeof(U)) + kAlignment - 1) / kAlignment * kAlignment;
  }
};

// Cuts a workspace into its parts; with a null workspace, finds its size.
template <typename T>
int64_t place_workspace(CompressDevice<T>& device, uint8_t* workspace, bool has_feedback) {
  Cutter place{workspace};
  using Device = CompressDevice<T>;
  place(device.counters, kCounters);
  place(device.histogram, kHistogramBins);
  place(device.not_zero, kMaxSpans / 32);
  static_assert(sizeof(uint32_t) * (kCounters + kHistogramBins) + kMaxSpans / 8 == kZeroedBytes);
  place(device.selection, kSelections);
  place(device.tail_gradient, kVectorEntries);
  place(device.tail_residual, kVectorEntries);
  place(device.samples, device.sampling.sectors * 8);
  place(device.list_begin, device.blocks);
  place(device.list_entries, device.blocks);
  place(device.counts, device.blocks);  // read by whole vectors
  place(device.counts_of_item, 2 * ((device.blocks + kFinishWarps - 1) / kFinishWarps));
  place(device.non_finite, int64_t{device.blocks} * Device::Set::kWords);
  if (device.layout.spans > 0) {
    place(device.any_idle, 1);
    place(device.idle_spans, (device.layout.spans + 31) / 32);
    place(device.first_span, device.blocks);
    place(device.idle_entries, int64_t{device.blocks} * Device::Set::kWords);
  }
  const int64_t capacity = (device.sampling.list_capacity + kVectorEntries - 1) / kVectorEntries * kVectorEntries;  // whole vectors
  place(device.list_values, capacity);
  place(device.list_offsets, device.sampling.list_capacity);
  place(device.list_keys, has_feedback ? capacity : 0);
  return place.bytes;
}

// True in the one block that comes last of all blocks of the kernel; what the others wrote can then be read.
__device__ inline bool is_last_block(Global<uint32_t> counters, Counter done, uint32_t& flag) {
  __syncthreads();
  if (threadIdx.x == 0) {  // one thread's fences serve the block: see phases.cuh
    __threadfence();
    flag = counters.add(done, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return flag;
}

// The header of what the kernels have packed; by one thread.
template <typename T>
__device__ void write_header(const CompressDevice<T>& device, bool sent_is_ours) {
  const uint32_t repeated = device.counters.load(kRepeated), displaced = device.counters.load(kDisplaced);
  DevicePayloadWriter<T>(device.payload, device.layout)
      .store_header(device.step, device.plan, repeated, displaced, device.counters.load(kNonFinite) != 0, sent_is_ours);
  if (!device.totals) return;
  device.totals.add(kTotalRepeated, repeated);
  device.totals.add(kTotalDisplaced, displaced);
}

template <typename T>
void launch_sample(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream);
template <typename T>
void launch_accumulate(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream);
template <typename T>
void launch_chunks(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream);
// Of all entries, or of none: `sends`.
template <typename T>
void launch_whole(const CompressDevice<T>& device, bool sends, cudaStream_t stream);
template <typename T>
void launch_finish(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream);

}  // namespace regtopk
