// Measure: the squared 2-norm of an average, of the entries that someone has sent. All others are 0.
#include "launch.h"
#include "ordered_sum.cuh"
#include "payload_reader.cuh"
#include "workspace.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;
constexpr uint32_t kTileWords = kTileEntries / 32;

template <typename T>
struct MeasureDevice {
  PayloadLayout layout;
  Global<const uint8_t> payloads;
  uint32_t workers = 0;
  Global<const T> gradient;
  Global<double> squared_norm;

  Global<uint32_t> counters;  // zero before each call and after it
  Global<double> sums;        // of each payload tile

  REGTOPK_HOST_DEVICE uint32_t tiles() const { return static_cast<uint32_t>(layout.tiles); }
  __device__ PayloadReader<T> reader(uint32_t worker) const {
    return PayloadReader<T>(payloads.offset(static_cast<size_t>(worker) * layout.bytes), layout);
  }
};

template <typename T>
int64_t place_workspace(MeasureDevice<T>& device, uint8_t* workspace) {
  Cutter place{workspace};
  place(device.counters, kCounters);
  static_assert(sizeof(uint32_t) * kCounters == kMeasureZeroedBytes);
  place(device.sums, device.tiles());
  return place.bytes;
}

// Puts into the set what one of `parts` warps finds of a worker's entries of a tile.
template <typename T>
__device__ void take_in(const PayloadReader<T>& reader, uint32_t tile, uint32_t entries, uint32_t part, uint32_t parts, uint32_t* members) {
  const uint32_t first = part * kWarpThreads + threadIdx.x % kWarpThreads, step = parts * kWarpThreads;
  if (reader.has_bitmap()) {
    for (uint32_t word = first; word * 32 < entries; word += step) {
      const uint32_t bits = reader.bitmap_word(tile * kTileWords + word);
      if (bits != 0) atomicOr(&members[word], bits);
    }
    return;
  }
  const uint32_t end = reader.uniform_first_entry(tile + 1);
  for (uint32_t entry = reader.uniform_first_entry(tile) + first; entry < end; entry += step) {
    const uint32_t offset = reader.offset_in_tile(entry);  // whatever it is, it is in the set
    atomicOr(&members[offset / 32], 1u << offset % 32);
  }
}

// A block takes a payload tile. What it reads follows k: the places of all workers' entries, and of each entry the average once. An entry
// that several workers have sent is in the set once, so that the sum is that of the whole bucket: an entry of 0 changes none.
template <typename T>
__global__ void __launch_bounds__(kThreads) measure_kernel(const __grid_constant__ MeasureDevice<T> device) {
  REGTOPK_SHARED(uint32_t[kTileWords], members);
  REGTOPK_SHARED(double[kThreads], lanes);
  REGTOPK_SHARED(uint32_t, last);
  const OrderedSum<kThreads> ordered{lanes};
  // The warps share the workers; where there are fewer, each worker's entries.
  const uint32_t warp = threadIdx.x / kWarpThreads, parts = device.workers < kWarps ? kWarps : 1;
  for (uint32_t tile = blockIdx.x; tile < device.tiles(); tile += gridDim.x) {
    const uint32_t begin = tile * static_cast<uint32_t>(kTileEntries), rest = static_cast<uint32_t>(device.layout.numel) - begin;
    const uint32_t entries = rest < kTileEntries ? rest : static_cast<uint32_t>(kTileEntries);
    __syncthreads();
    for (uint32_t word = threadIdx.x; word < kTileWords; word += kThreads) members[word] = 0;
    __syncthreads();
    for (uint32_t worker = parts == 1 ? warp : 0; worker < device.workers; worker += parts == 1 ? kWarps : 1) {
      take_in(device.reader(worker), tile, entries, parts == 1 ? 0 : warp, parts, members);
    }
    __syncthreads();
    double sum = 0;
#pragma unroll 8
    for (uint32_t offset = threadIdx.x; offset < entries; offset += kThreads) {
      const bool is_member = (members[offset / 32] >> offset % 32 & 1) != 0;
      const double value = is_member ? static_cast<double>(Traits<T>::load(device.gradient.load(begin + offset))) : 0.0;
      sum += value * value;
    }
    sum = ordered.of_tile(sum);
    if (threadIdx.x == 0) device.sums.store(tile, sum);
  }
  if (!is_last_block(device.counters, kSampleDone, last)) return;
  const double sum = ordered.of_tiles(device.sums, device.tiles());
  if (threadIdx.x != 0) return;
  device.squared_norm.store(0, sum);
  device.counters.store(kSampleDone, 0);
}

}  // namespace

int64_t measure_workspace_bytes(const PayloadLayout& layout) {
  MeasureDevice<float> device{.layout = layout};
  return place_workspace(device, nullptr);
}

cudaError_t launch_measure(const MeasureLaunch& arguments, cudaStream_t stream) {
  if (arguments.layout.numel > kMaxEntries || arguments.layout.spans > kMaxSpans || arguments.workers > kMaxEntries ||
      is_misaligned(arguments.payloads) || is_misaligned(arguments.workspace)) {
    return cudaErrorInvalidValue;
  }
  return with_value_type(arguments.layout.type, [&]<typename T>(T) {
    MeasureDevice<T> device{
        .layout = arguments.layout,
        .payloads = Global(arguments.payloads),
        .workers = static_cast<uint32_t>(arguments.workers),
        .gradient = Global(static_cast<const T*>(arguments.gradient)),
        .squared_norm = Global(arguments.squared_norm)};
    place_workspace(device, static_cast<uint8_t*>(arguments.workspace));
    const uint32_t most = static_cast<uint32_t>(multiprocessors()) * 8;
    REGTOPK_LAUNCH((measure_kernel<T>), device.tiles() < most ? device.tiles() : most, kThreads, stream, device);
    return launch_error();
  });
}

}  // namespace regtopk
