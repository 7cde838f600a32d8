// Accumulate: r += g, and a list of the entries that may be sent, in the one pass over gradient and residual.
#include "selection.cuh"

namespace regtopk {
namespace {

// 64 registers a thread and 32 warps a multiprocessor for every type: 16 entries a thread, 4 in fp64.
template <typename T>
constexpr unsigned kThreadsOf = sizeof(typename Traits<T>::Accumulate) == 8 ? 1024 : 512;
template <typename T>
constexpr unsigned kBlocksOfMultiprocessor = 1024 / kThreadsOf<T>;

struct alignas(16) Bins {  // and when they have been read, keys
  uint32_t bins[kHistogramBins];
};

// A block owns block tiles of 32 KiB of the accumulate type, one after the other.
// Reads g and r, writes r: 12 bytes per element in fp32, 10 in 16-bit types. Further, per listed entry (those above the low
// end of the bracket, 1.2 to 3 k) 6 bytes written, 10 with feedback; per entry of the last step 16 read, 4 more with feedback.
// r takes a = r + g even where the entry is sent: finish writes the few that are.
// The place of a block tile in the list depends on which block comes first; nothing depends on the place. Counts and
// histogram are integer sums.
template <typename T, bool kHasFeedback>
__global__ void __launch_bounds__(kThreadsOf<T>, kBlocksOfMultiprocessor<T>)
    accumulate_kernel(const __grid_constant__ CompressDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  using Bits = typename Traits<T>::Bits;
  using Set = typename CompressDevice<T>::Set;
  constexpr unsigned kThreads = kThreadsOf<T>, kEntries = CompressDevice<T>::kEntries;
  constexpr int kVectors = kEntries / (kThreads * kVectorEntries);
  static_assert(kVectors * kThreads * kVectorEntries == kEntries);

  REGTOPK_SHARED(Bins, shared_bins);
  uint32_t (&bins)[kHistogramBins] = shared_bins.bins;
  REGTOPK_SHARED(Set, sent);
  REGTOPK_SHARED(uint32_t[Set::kWords], non_finite_words);
  REGTOPK_SHARED(uint32_t[Set::kWords], idle_words);
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  REGTOPK_SHARED(Found<1>, found);
  REGTOPK_SHARED(SentSize, sent_size);
  REGTOPK_SHARED(Selection<Bits>, bracket);  // not in registers: the loop takes them all
  REGTOPK_SHARED(uint32_t, has_idle);
  REGTOPK_SHARED(uint32_t, touches_idle);
  REGTOPK_SHARED(uint32_t, smallest);
  REGTOPK_SHARED(uint32_t, listed);
  REGTOPK_SHARED(uint32_t, hits);
  REGTOPK_SHARED(uint32_t, list_at);
  REGTOPK_SHARED(uint32_t, last);
  const BlockGroup<kThreads> group{scratch};

  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) bins[bin] = 0;
  wait_for_stream();
  for (uint32_t word = blockIdx.x * kThreads + threadIdx.x; word < 2 * device.items(); word += gridDim.x * kThreads) {
    device.counts_of_item.store(word, 0);
  }
  if (thread_again() == 0) {
    sent_size = device.sent.history();
    has_idle = device.has_idle();
    touches_idle = false;
    bracket = device.selection.load(0);
    listed = hits = 0;
  }
  __syncthreads();

  for (uint32_t block = blockIdx.x; block < device.blocks; block += gridDim.x) {
    const uint32_t first = block * kEntries, entries = device.entries_of(block);
    if (has_idle) {
      uint32_t idle = 0;
      if (threadIdx.x < Set::kWords) idle_words[threadIdx.x] = idle = device.idle_word(block, threadIdx.x);
      const bool any = __syncthreads_or(idle != 0);
      if (thread_again() == 0) touches_idle = any;
      __syncthreads();
    }
    // Looked up twice, because no register is left to keep it.
    const auto idle_of = [&](int v) {  // of four entries, a bit each
      const uint32_t offset = (v * kThreads + threadIdx.x) * kVectorEntries;
      return idle_words[offset / 32] >> (offset % 32);
    };
    Vector<T> gradient[kVectors];
    Vector<Accumulate> residual[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t offset = (v * kThreads + threadIdx.x) * kVectorEntries;
      if (offset < entries) {
        // The vector that ends beyond the bucket is read from its copy: every load is a whole vector.
        const bool whole = offset + kVectorEntries <= entries;
        const uint32_t at = whole ? first + offset : 0;
        gradient[v] = (whole ? device.gradient : Global<const T>(device.tail_gradient)).load_vector(at);
        residual[v] = (whole ? device.residual : device.tail_residual).load_vector(at);
      } else {
        gradient[v] = {};
        residual[v] = {};
      }
    }

    uint32_t first_sent = 0;
    if (sent_size.entries > 0) first_sent = device.sent.reader(sent_size).load_block(group, block, sent, smallest);

    uint32_t chosen = 0;  // bit 4 v + i: entry i of vector v
    bool any_non_finite = false;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t offset = (v * kThreads + threadIdx.x) * kVectorEntries;
      const uint32_t idle = touches_idle ? idle_of(v) : 0;
      Vector<Accumulate> kept;
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) {
        Accumulate accumulated = residual[v].entry[i] * device.decay + Traits<T>::load(gradient[v].entry[i]);
        if ((idle >> i) & 1) accumulated = residual[v].entry[i];
        const Bits key = magnitude_key(accumulated);
        const bool finite = key < kInfinityKey<Bits>, inside = offset + i < entries;
        kept.entry[i] = finite ? accumulated : residual[v].entry[i];
        residual[v].entry[i] = accumulated;
        chosen |= static_cast<uint32_t>(inside && key >= bracket.low) << (v * kVectorEntries + i);
        any_non_finite |= !finite;  // entries past the end are 0
      }
      if (offset + kVectorEntries <= entries) {
        device.residual.store_vector(first + offset, kept);
      } else {
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          if (offset + i < entries) device.residual.store(first + offset + i, kept.entry[i]);
        }
      }
    }

    if (touches_idle) {  // to the selection they are 0
      any_non_finite = false;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t idle = idle_of(v);
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          Accumulate& accumulated = residual[v].entry[i];
          if ((idle >> i) & 1) {
            accumulated = 0;
            if (bracket.low > 0) chosen &= ~(1u << (v * kVectorEntries + i));
            else chosen |= 1u << (v * kVectorEntries + i);
          }
          any_non_finite |= !is_finite(accumulated);
        }
      }
      if (threadIdx.x < Set::kWords) device.idle_entries.store(block * Set::kWords + threadIdx.x, idle_words[threadIdx.x]);
    }

    // Room in the list, a contiguous part for the block tile; inside it in any order.
    const WarpGroup warp;
    const uint32_t count = __popc(chosen);
    const uint32_t before_in_warp = warp.exclusive_sum(count);
    uint32_t place = 0;
    if (warp.rank() == kWarpThreads - 1 && before_in_warp + count > 0) place = atomicAdd(&listed, before_in_warp + count);
    place = __shfl_sync(kAllLanes, place, kWarpThreads - 1) + before_in_warp;
    any_non_finite = __syncthreads_or(any_non_finite);
    if (thread_again() == 0) {
      list_at = listed > 0 ? device.counters.add(kListSize, listed) : 0;
      // A list that overflows stays unread.
      if (list_at + uint64_t{listed} > static_cast<uint64_t>(device.sampling.list_capacity)) list_at = 0xffffffffu;
      device.list_begin.store(block, list_at);
      device.list_entries.store(block, listed | (any_non_finite ? kHasNonFinite : 0) | (touches_idle ? kHasIdle : 0));
      listed = 0;
    }
    __syncthreads();

    if (any_non_finite) {
      for (unsigned word = threadIdx.x; word < Set::kWords; word += kThreads) non_finite_words[word] = 0;
      __syncthreads();
#pragma unroll
      for (int each = 0; each < kVectors * kVectorEntries; ++each) {
        const uint32_t offset = (each / kVectorEntries * kThreads + threadIdx.x) * kVectorEntries + each % kVectorEntries;
        if (!is_finite(residual[each / kVectorEntries].entry[each % kVectorEntries])) {
          atomicOr(&non_finite_words[offset / 32], 1u << (offset % 32));
        }
      }
      __syncthreads();
      for (unsigned word = threadIdx.x; word < Set::kWords; word += kThreads) {
        device.non_finite.store(block * Set::kWords + word, non_finite_words[word]);
      }
      if (thread_again() == 0) device.counters.store(kNonFinite, 1);
    }

    const bool in_list = list_at != 0xffffffffu;
    for (uint32_t rest = chosen, at = list_at + place; rest != 0; rest &= rest - 1, ++at) {
      const int bit = __ffs(rest) - 1;
      Accumulate accumulated{};
#pragma unroll
      for (int each = 0; each < kVectors * kVectorEntries; ++each) {
        if (each == bit) accumulated = residual[each / kVectorEntries].entry[each % kVectorEntries];
      }
      const uint32_t offset = (bit / kVectorEntries * kThreads + threadIdx.x) * kVectorEntries + bit % kVectorEntries;
      const bool was_sent = sent_size.entries > 0 && sent.contains(offset);
      Bits key = magnitude_key(accumulated);
      if constexpr (kHasFeedback) {
        if (was_sent) {
          const uint32_t entry = first_sent + sent.rank_of(offset);
          if (entry < sent_size.entries) key = device.score_of_sent(accumulated, entry);
        }
      }
      if (key > bracket.high) atomicAdd(&hits, 1u);
      else if (key >= bracket.low) atomicAdd(&bins[(key - bracket.low) >> bracket.shift], 1u);
      if (in_list) {
        device.list_values.store(at, accumulated);
        device.list_offsets.store(at, static_cast<uint16_t>(offset | (was_sent ? kWasSent : 0)));
        if constexpr (kHasFeedback) device.list_keys.store(at, key);
      }
    }
  }

  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) {
    if (bins[bin] != 0) device.histogram.add(bin, bins[bin]);
  }
  if (thread_again() == 0 && hits > 0) device.counters.add(kHits, hits);
  if (!is_last_block(device.counters, kAccumulateDone, last)) return;

  Selection<Bits> selection = first_selection(group, found, bracket, device);
  static_assert(sizeof bins >= kNarrowedAlone * sizeof(Bits));
  narrow_alone(group, reinterpret_cast<Bits*>(&shared_bins), listed, found, selection, device, kHasFeedback);
  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) device.histogram.store(bin, 0);
  if (thread_again() == 0) {
    device.selection.store(1, selection);
    if (selection.task == Task::kCollect) device.counters.store(kListSize, 0);  // finish fills the list anew
  }
}

}  // namespace

template <typename T>
void launch_accumulate(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream) {
  constexpr unsigned kThreads = kThreadsOf<T>;
  const unsigned most = static_cast<unsigned>(multiprocessors()) * kBlocksOfMultiprocessor<T>;
  const unsigned blocks = device.blocks < most ? device.blocks : most;
  if (has_feedback) REGTOPK_LAUNCH_EARLY((accumulate_kernel<T, true>), blocks, kThreads, stream, device);
  else REGTOPK_LAUNCH_EARLY((accumulate_kernel<T, false>), blocks, kThreads, stream, device);
}
template void launch_accumulate<double>(const CompressDevice<double>&, bool, cudaStream_t);
template void launch_accumulate<float>(const CompressDevice<float>&, bool, cudaStream_t);
template void launch_accumulate<BFloat16>(const CompressDevice<BFloat16>&, bool, cudaStream_t);
template void launch_accumulate<Half>(const CompressDevice<Half>&, bool, cudaStream_t);

}  // namespace regtopk
