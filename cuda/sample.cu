// Sample: a bracket that very likely holds the k-th score, from about 65,536 entries.
#include "selection.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kSectorEntries = 8;  // 32 bytes of fp32: what the memory reads at least
constexpr unsigned kSectorsOfWarp = kWarpThreads * kVectorEntries / kSectorEntries;

// Spreads the samples inside their strides, so that no period of the gradient meets that of the samples.
__device__ uint32_t scramble(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// Which of the four entries from `index` on were sent in the last step, a bit each, and the payload entry of the first, or one near it.
template <typename T>
__device__ uint32_t sent_among(const PayloadReader<T>& sent, uint32_t index, bool active, uint32_t& entry) {
  const uint32_t tile = index / kTileEntries, offset = index % kTileEntries;
  const WarpGroup warp;
  uint32_t members = 0;
  if (sent.has_bitmap()) {
    // The number of an entry of a bitmap costs a count of all bits before it. A sample can do with the feedback of some entry near by:
    // it decides about the bracket alone.
    if (!active) return 0;
    const uint32_t begin = sent.first_entry(tile), inside = sent.first_entry(tile + 1) - begin;
    entry = begin + static_cast<uint32_t>(uint64_t{inside} * offset / kTileEntries);
    return (sent.bitmap_word(index / 32) >> (index % 32)) & 0xf;
  }
  // One search for the two lanes of a sector.
  uint32_t end = 0;
  if (active && warp.rank() % 2 == 0) {
    end = sent.first_entry(tile + 1);
    entry = sent.lower_bound(sent.first_entry(tile), end, offset);
  }
  entry = __shfl_sync(kAllLanes, entry, warp.rank() & ~1u);
  end = __shfl_sync(kAllLanes, end, warp.rank() & ~1u);
  for (uint32_t next = entry; next < end; ++next) {
    const uint32_t found = sent.offset_in_tile(next);
    if (found >= offset + kVectorEntries) break;
    if (found < offset) ++entry;
    else members |= 1u << (found - offset);
  }
  return members;
}

// Which of the four entries from `index` on, all of one block tile, are those of idle spans, a bit each.
template <typename T>
__device__ uint32_t idle_among(const CompressDevice<T>& device, uint32_t index) {
  uint32_t span = device.first_span.load(index / CompressDevice<T>::kEntries), idle = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < kVectorEntries; ++i) {
    while (span < device.spans.count && device.spans.end(span + 1) <= index + i) ++span;
    if (span < device.spans.count) idle |= ((device.idle_spans.load(span / 32) >> (span % 32)) & 1) << i;
  }
  return idle;
}

// A block owns sectors, one to each pair of its threads; the last block to finish finds the bracket.
// Reads 8 bytes (g, r) and writes 4 per sample, and reads those again: 16 bytes per sample, at most 65,536 of J / 128.
// The sampled entries are a fixed function of J and the histogram is a sum of integers, so the bracket is too; and the
// payload does not depend on it.
template <typename T, bool kHasFeedback>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(CompressDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  using Bits = typename Traits<T>::Bits;
  constexpr unsigned kLoadsAhead = 32 / sizeof(Bits);  // 8 vectors of 16 bytes, 4 of 32
  constexpr unsigned kCoarseShift = sizeof(Bits) * 8 - 1 - kHistogramBits, kFineShift = kCoarseShift - kHistogramBits;
  REGTOPK_SHARED(uint32_t[kHistogramBins], high_bins);
  REGTOPK_SHARED(uint32_t[kHistogramBins], low_bins);
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  REGTOPK_SHARED(Found<2>, found);
  REGTOPK_SHARED(SentSize, sent);
  REGTOPK_SHARED(uint32_t, last);
  const BlockGroup<kThreads> group{scratch};

  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) high_bins[bin] = low_bins[bin] = 0;
  wait_for_stream();
  if (threadIdx.x == 0) sent = kHasFeedback ? device.sent.history() : SentSize{};
  __syncthreads();
  const bool has_idle = device.has_idle();

  const uint32_t sectors = static_cast<uint32_t>(device.sampling.sectors);
  const uint32_t stride = sectors == 0 ? 0 : static_cast<uint32_t>(device.layout.numel / kSectorEntries / sectors);
  const uint32_t warps = gridDim.x * (kThreads / kWarpThreads);
  for (uint32_t first = (blockIdx.x * (kThreads / kWarpThreads) + threadIdx.x / kWarpThreads) * kSectorsOfWarp; first < sectors;
       first += warps * kSectorsOfWarp) {
    const uint32_t sample = first + threadIdx.x % kWarpThreads / 2;
    const bool active = sample < sectors;
    const uint32_t sector = active ? sample * stride + scramble(sample) % stride : 0;
    const uint32_t index = sector * kSectorEntries + threadIdx.x % 2 * kVectorEntries;
    Vector<Accumulate> accumulated{};
    Vector<Bits> keys{};
    if (active) {
      const Vector<T> gradient = device.gradient.load_vector(index);
      accumulated = device.residual.load_vector(index);
      const uint32_t idle = has_idle ? idle_among(device, index) : 0;
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) {
        accumulated.entry[i] = accumulated.entry[i] * device.decay + Traits<T>::load(gradient.entry[i]);
        if ((idle >> i) & 1) accumulated.entry[i] = 0;
        keys.entry[i] = magnitude_key(accumulated.entry[i]);
      }
    }
    if (kHasFeedback && sent.entries > 0) {
      uint32_t entry = 0;
      const uint32_t members = sent_among(device.sent.reader(sent), index, active, entry);
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) {
        if (((members >> i) & 1) && entry < sent.entries) keys.entry[i] = device.score_of_sent(accumulated.entry[i], entry++);
      }
    }
    if (active) {
      device.samples.store_vector((sample * 2 + threadIdx.x % 2) * kVectorEntries, keys);
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) atomicAdd(&high_bins[keys.entry[i] >> kCoarseShift], 1u);
    }
  }
  // The vector that ends beyond the bucket, made whole for accumulate.
  if (blockIdx.x == 0 && threadIdx.x < kVectorEntries) {
    const int64_t index = device.layout.numel / kVectorEntries * kVectorEntries + threadIdx.x;
    const bool inside = index < device.layout.numel;
    device.tail_gradient.store(threadIdx.x, inside ? device.gradient.load(index) : T{});
    device.tail_residual.store(threadIdx.x, inside ? device.residual.load(index) : Accumulate{});
  }
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) {
    if (high_bins[bin] != 0) device.histogram.add(bin, high_bins[bin]);
    high_bins[bin] = 0;
  }
  if (!is_last_block(device.counters, kSampleDone, last)) return;

  // The first 22 bits of the two order statistics: 2^-14 of their size in fp32, 2^-11 in fp64.
  const uint32_t rank_high = static_cast<uint32_t>(device.sampling.rank_high), rank_low = static_cast<uint32_t>(device.sampling.rank_low);
  const Found<2> coarse =
      find_bins(group, found, {rank_high, rank_low}, [&](unsigned, unsigned bin) { return device.histogram.load(bin); });
  const Bin high = coarse.bin[0], low = coarse.bin[1];
  // One block alone: what takes its time is the latency of the loads, so many are on their way before the first is used.
  for (uint32_t first = threadIdx.x * kVectorEntries; first < sectors * kSectorEntries; first += kThreads * kVectorEntries * kLoadsAhead) {
    Vector<Bits> keys[kLoadsAhead];
#pragma unroll
    for (unsigned v = 0; v < kLoadsAhead; ++v) {
      const uint32_t at = first + v * kThreads * kVectorEntries;
      if (at < sectors * kSectorEntries) keys[v] = device.samples.load_vector(at);
    }
#pragma unroll
    for (unsigned v = 0; v < kLoadsAhead; ++v) {
      if (first + v * kThreads * kVectorEntries >= sectors * kSectorEntries) continue;
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) {
        const Bits key = keys[v].entry[i];
        const unsigned bin = key >> kCoarseShift, fine = (key >> kFineShift) % kHistogramBins;
        if (bin == high.index) atomicAdd(&high_bins[fine], 1u);
        if (bin == low.index) atomicAdd(&low_bins[fine], 1u);
      }
    }
  }
  __syncthreads();
  const Found<2> fine = find_bins(group, found, {rank_high - high.above, rank_low - low.above}, [&](unsigned n, unsigned bin) {
    return n == 0 ? high_bins[bin] : low_bins[bin];
  });
  for (unsigned bin = threadIdx.x; bin < kHistogramBins; bin += kThreads) device.histogram.store(bin, 0);
  if (threadIdx.x == 0) {
    Selection<Bits> selection{};
    selection.high = kLargestKey<Bits>;
    if (rank_high > 0 && high.index < kHistogramBins) {
      const Bits prefix = (static_cast<Bits>(high.index) << kHistogramBits) | fine.bin[0].index;
      selection.high = (prefix << kFineShift) + ((Bits{1} << kFineShift) - 1);
    }
    if (rank_low > 0 && low.index < kHistogramBins) {
      selection.low = ((static_cast<Bits>(low.index) << kHistogramBits) | fine.bin[1].index) << kFineShift;
    }
    // Entries that are not finite are listed whatever their score, so the list may begin at infinity at the latest.
    if (selection.low > kInfinityKey<Bits>) selection.low = kInfinityKey<Bits>;
    selection.shift = shift_of(selection.low, selection.high);
    device.selection.store(0, selection);
  }
}

}  // namespace

template <typename T>
void launch_sample(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream) {
  constexpr int64_t kSectorsOfBlock = kSectorsOfWarp * (kThreads / kWarpThreads);
  const unsigned blocks =
      static_cast<unsigned>(device.sampling.sectors == 0 ? 1 : (device.sampling.sectors + kSectorsOfBlock - 1) / kSectorsOfBlock);
  if (has_feedback) REGTOPK_LAUNCH_EARLY((sample_kernel<T, true>), blocks, kThreads, stream, device);
  else REGTOPK_LAUNCH_EARLY((sample_kernel<T, false>), blocks, kThreads, stream, device);
}
template void launch_sample<double>(const CompressDevice<double>&, bool, cudaStream_t);
template void launch_sample<float>(const CompressDevice<float>&, bool, cudaStream_t);
template void launch_sample<BFloat16>(const CompressDevice<BFloat16>&, bool, cudaStream_t);
template void launch_sample<Half>(const CompressDevice<Half>&, bool, cudaStream_t);

}  // namespace regtopk
