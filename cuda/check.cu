// The bytes of all workers' payloads, checked before anything is made of them.
#include "check.cuh"

#include <algorithm>

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;

// 32 spans: which are idle, the zero bits of all ranks; by a warp.
__device__ void find_idle(const CheckDevice& device, uint32_t word) {
  const WarpGroup warp;
  uint32_t zero = bits_between(0, 0, device.spans.count - word * 32);
  for (uint32_t rank = warp.rank(); rank < device.workers; rank += kWarpThreads) {
    const Global<const uint8_t> bytes = device.payloads.offset(static_cast<size_t>(rank) * device.layout.bytes);
    zero &= bytes.at_byte<const uint32_t>(device.layout.zero_bits_at).load(word);
  }
  for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) zero &= __shfl_xor_sync(kAllLanes, zero, distance);
  const uint32_t span = word * 32 + warp.rank();
  const bool is_idle = ((zero >> warp.rank()) & 1) != 0;
  const bool any = __ballot_sync(kAllLanes, is_idle && device.spans.end(span) < device.spans.end(span + 1)) != 0;
  if (warp.rank() != 0) return;
  device.idle_now.store(word, zero);
  if (any) device.any_idle.store(0, 1);
}

// A warp owns one payload tile of one rank; the first tile's also checks the header. Or it owns 32 spans of all ranks.
// Reads 2 bytes per entry of each payload (2 more for one in 16), or the bitmap, and 8 bytes per payload tile. What is reported is the
// smallest of all findings, whoever comes first.
template <typename T>
__global__ void __launch_bounds__(kThreads) check_kernel(const __grid_constant__ CheckDevice device) {
  constexpr uint32_t kWarps = kThreads / kWarpThreads;
  wait_for_stream();
  const WarpGroup warp;
  const PayloadLayout& layout = device.layout;
  const uint32_t tiles = static_cast<uint32_t>(layout.tiles);
  const uint64_t tile_items = uint64_t{tiles} * device.workers;
  for (uint64_t item = uint64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpThreads; item < tile_items + device.spans.words();
       item += uint64_t{gridDim.x} * kWarps) {
    if (item >= tile_items) {
      find_idle(device, static_cast<uint32_t>(item - tile_items));
      continue;
    }
    const uint32_t rank = static_cast<uint32_t>(item / tiles), tile = static_cast<uint32_t>(item % tiles);
    const Global<const uint8_t> bytes = device.payloads.offset(static_cast<size_t>(rank) * layout.bytes);
    const auto report = [&](PayloadField field, uint32_t stage = 0) { device.status.take_maximum(0, ~status_of(stage, rank, field)); };
    if (tile == 0 && warp.rank() == 0) {
      const PayloadHeader header = load_header(bytes);
      if (!is_header_of(header, layout, layout.type, layout.support) || header.repeated > header.k) report(PayloadField::kHeader);
      if ((header.flags & kFlagAbsent) != 0) device.absent.add(0, 1);
      if (device.spans && rank > 0) compare_exchange_parts(device.payloads, bytes, report);
      if (header.step != device.step) report(PayloadField::kStep, 2);
      else if (header.plan != device.plan) report(PayloadField::kPlan, 2);
    }
    const Global<const uint32_t> starts = bytes.at_byte<const uint32_t>(layout.tile_starts_at);
    const uint32_t entries = static_cast<uint32_t>(layout.tile_entries(tile)), k = static_cast<uint32_t>(layout.k);
    const uint32_t begin = starts.load_uniform(tile), end = tile + 1 < tiles ? starts.load_uniform(tile + 1) : k;
    if (end < begin || end > k || end - begin > entries || (tile == 0 && begin != 0)) {
      if (warp.rank() == 0) report(PayloadField::kTileStarts);
      continue;
    }
    bool valid = true;
    if (layout.support == Support::kOffsets) {
      const Global<const uint16_t> offsets = bytes.at_byte<const uint16_t>(layout.support_at);
      // A lane reads four vectors and the offset before them, all at once, from an entry on that is a multiple of 16.
      constexpr uint32_t kVectors = 4, kRun = kVectors * kVectorEntries;
#pragma unroll 1
      for (uint32_t first = begin / kRun * kRun + warp.rank() * kRun; first < end; first += kWarpThreads * kRun) {
        Vector<uint16_t> run[kVectors];
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v) {
          const uint32_t at = first + v * kVectorEntries;
          run[v] = at < end ? offsets.load_vector(at) : Vector<uint16_t>{};
        }
        uint32_t before = first > begin ? offsets.load(first - 1) : 0;
#pragma unroll
        for (uint32_t i = 0; i < kRun; ++i) {
          const uint32_t entry = first + i, offset = run[i / kVectorEntries].entry[i % kVectorEntries];
          valid &= entry < begin || entry >= end || (offset < entries && (entry == begin || offset > before));
          before = offset;
        }
      }
    } else {
      const Global<const uint32_t> words = bytes.at_byte<const uint32_t>(layout.support_at);
      constexpr uint32_t kWordsOfTile = kTileEntries / 32;
      uint32_t members = 0, word = warp.rank();
      // Whole words two at a time, and many loads before the first is needed.
      const Global<const uint64_t> pairs = bytes.at_byte<const uint64_t>(layout.support_at);
      constexpr uint32_t kPairs = 8;
      for (uint32_t first = 0; (first + kPairs * kWarpThreads) * 64 <= entries; first += kPairs * kWarpThreads) {
        uint64_t loaded[kPairs];
#pragma unroll
        for (uint32_t i = 0; i < kPairs; ++i) loaded[i] = pairs.load(tile * (kWordsOfTile / 2) + first + i * kWarpThreads + warp.rank());
#pragma unroll
        for (uint32_t i = 0; i < kPairs; ++i) members += __popcll(loaded[i]);
        word += 2 * kPairs * kWarpThreads;
      }
      for (; word * 32 < entries; word += kWarpThreads) {
        const uint32_t bits = words.load(tile * kWordsOfTile + word);
        members += __popc(bits);
        // Bits beyond the bucket, up to the byte; what follows is padding or the values.
        if (entries - word * 32 < 32) {
          const uint32_t rest = entries - word * 32, in_bytes = (rest + 7) / 8 * 8;
          const uint32_t beyond = bits & ~((1u << rest) - 1);
          members -= __popc(beyond);
          valid &= (in_bytes == 32 ? beyond : beyond & ((1u << in_bytes) - 1)) == 0;
        }
      }
      valid &= warp.sum(members) == end - begin;
    }
    if (__ballot_sync(kAllLanes, valid) != kAllLanes && warp.rank() == 0) report(PayloadField::kSupport);
  }
}

}  // namespace

template <typename T>
void launch_check(const CheckDevice& device, cudaStream_t stream) {
  const int64_t warps = device.layout.tiles * device.workers + (static_cast<int64_t>(device.spans.count) + 31) / 32,
                most = int64_t{multiprocessors()} * 8;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((warps + kThreads / kWarpThreads - 1) / (kThreads / kWarpThreads), most));
  REGTOPK_LAUNCH_EARLY((check_kernel<T>), blocks, kThreads, stream, device);
}
template void launch_check<double>(const CheckDevice&, cudaStream_t);
template void launch_check<float>(const CheckDevice&, cudaStream_t);
template void launch_check<BFloat16>(const CheckDevice&, cudaStream_t);
template void launch_check<Half>(const CheckDevice&, cudaStream_t);

}  // namespace regtopk
