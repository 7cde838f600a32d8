// Averages of what the workers hold at a support that they share: a leader's, or all entries.
//
//   average_slice  average                       a thread owns entries of a slice
//   spread         join · aggregate              the averages to one payload, which is aggregated as that of one worker
//                  join · lay                    of all entries; a block owns a block tile
#include "averages.cuh"

#include <algorithm>
#include <limits>

#include "check.cuh"
#include "tile_set.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;

struct AverageDevice {
  PayloadLayout layout;
  WireLayout wire;
  Global<const uint8_t> rows;
  uint32_t workers;
  uint64_t row_bytes, entries;
  uint64_t step, plan;
  Global<uint8_t> averages;
  Global<unsigned long long> worst_status;

  __device__ Global<const uint8_t> row(uint32_t rank) const { return rows.offset(rank * row_bytes); }
};

// What the heads of all ranks say, to each block by itself: they are few bytes beside the slices.
struct Heads {
  unsigned long long status = kPayloadsValid;  // of those that this thread has read
  uint32_t contributing = 0;
  bool finite = true;

  __device__ Heads(const AverageDevice& device) {
    for (uint32_t rank = threadIdx.x; rank < device.workers; rank += kThreads) {
      const auto report = [&](PayloadField field, uint32_t stage = 0) {
        const unsigned long long found = status_of(stage, rank, field);
        if (found < status) status = found;
      };
      const Global<const uint8_t> row = device.row(rank);
      const PayloadHeader header = load_header(row);
      // What made a rank unfilled says more than that it is.
      const uint32_t stage = (header.flags & kFlagUnfilled) != 0 ? kStageOfConsequences : 0;
      if (!is_header_of(header, device.layout, device.wire.type, device.wire.support)) report(PayloadField::kHeader, stage);
      if (device.layout.spans > 0 && rank > 0) compare_exchange_parts(device.row(0), row, report);
      if (header.step != device.step) report(PayloadField::kStep, 2);
      else if (header.plan != device.plan) report(PayloadField::kPlan, 2);
      contributing += (header.flags & kFlagAbsent) == 0;
      finite &= (header.flags & kFlagNonFinite) == 0;
    }
  }
};

// Per entry of the slice a value of each rank read, and one written.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 4) average_kernel(const __grid_constant__ AverageDevice device) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr int kAtOnce = 4;
  constexpr Accumulate kNan = std::numeric_limits<Accumulate>::quiet_NaN();
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  const BlockGroup<kThreads> group{scratch};
  const Heads heads(device);
  const bool valid = !__syncthreads_or(heads.status != kPayloadsValid), finite = !__syncthreads_or(!heads.finite);
  const uint32_t contributing = group.sum(heads.contributing);
  if (blockIdx.x == 0) {
    if (heads.status != kPayloadsValid && device.worst_status) device.worst_status.take_minimum(0, heads.status);
    const Global<int64_t> mark = device.averages.at_byte<int64_t>(0);
    if (threadIdx.x < kMarkBytes / 8) mark.store(threadIdx.x, valid && threadIdx.x == 0 ? static_cast<int64_t>(device.step) + 1 : 0);
  }
  const Accumulate divisor = static_cast<Accumulate>(contributing > 0 ? contributing : 1);
  const Global<T> averages = device.averages.at_byte<T>(kMarkBytes);
  for (uint64_t first = uint64_t{blockIdx.x} * kThreads * kAtOnce + threadIdx.x; first < device.entries;
       first += uint64_t{gridDim.x} * kThreads * kAtOnce) {
    Accumulate sums[kAtOnce]{};
#pragma unroll 2
    for (uint32_t rank = 0; rank < (valid ? device.workers : 0); ++rank) {
      const Global<const W> slice = device.row(rank).at_byte<const W>(device.wire.index_at);
      W values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) values[i] = first + i * kThreads < device.entries ? slice.load(first + i * kThreads) : W{};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] += static_cast<Accumulate>(Traits<W>::load(values[i]));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads >= device.entries) break;
      const Accumulate average = sums[i] / divisor;
      averages.store(first + i * kThreads, Traits<T>::store(valid && finite && average == average ? average : kNan));
    }
  }
}

// To one payload, whose header is that of a payload only where every mark is of the step: whoever reads it finds it valid or not.
template <typename T>
struct JoinDevice {
  PayloadLayout layout;
  Averages<T> received;
  Global<const uint8_t> own;  // its support
  Global<uint8_t> payload;    // out
  bool has_entries;           // or the header and the exchange part alone
  Global<unsigned long long> worst_status;
};

// A zero bit where all ranks have one. Per entry the support and the average, read and written.
template <typename T>
__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ JoinDevice<T> device) {
  const PayloadLayout& layout = device.layout;
  const Averages<T>& received = device.received;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, threads = int64_t{gridDim.x} * kThreads;
  if (blockIdx.x == 0) {
    bool valid = true;
    for (uint32_t rank = threadIdx.x; rank < received.workers; rank += kThreads) {
      if (received.is_of_step(rank)) continue;
      valid = false;
      if (device.worst_status) device.worst_status.take_minimum(0, status_of(4, rank, PayloadField::kAverages));
    }
    valid = !__syncthreads_or(!valid);
    if (threadIdx.x == 0) {
      PayloadHeader header = make_header(layout, static_cast<uint64_t>(received.step), 0);
      if (!valid) header.magic = 0;
      device.payload.template at_byte<PayloadHeader>(0).store(0, header);
      if (layout.spans > 0) device.payload.template at_byte<ExchangePart>(sizeof(PayloadHeader)).store(0, {});
    }
  }
  for (int64_t word = thread; layout.spans > 0 && word < (layout.tile_starts_at - layout.zero_bits_at) / 4; word += threads) {
    uint32_t zero = ~0u;
    for (uint32_t rank = 0; rank < received.workers; ++rank) {
      zero &= received.head(rank).template at_byte<const uint32_t>(layout.zero_bits_at).load(word);
    }
    device.payload.template at_byte<uint32_t>(layout.zero_bits_at).store(word, zero);
  }
  if (!device.has_entries) return;
  const Global<const uint64_t> own = device.own.template at_byte<const uint64_t>(layout.tile_starts_at);
  const Global<uint64_t> words = device.payload.template at_byte<uint64_t>(layout.tile_starts_at);
  for (int64_t word = thread; word < (layout.values_at - layout.tile_starts_at) / 8; word += threads) words.store(word, own.load(word));
  const Global<T> values = device.payload.template at_byte<T>(layout.values_at);
#pragma unroll 4
  for (int64_t entry = thread; entry < layout.k; entry += threads) {
    values.store(static_cast<size_t>(entry), received.load(static_cast<uint32_t>(entry)));
  }
}

// Of all entries the averages are the bucket.
template <typename T>
struct LayDevice {
  PayloadLayout layout;
  Averages<T> received;
  Global<const uint8_t> payload;  // as join has written it
  Global<T> gradient;
  DeviceSpans spans;
  Global<uint8_t> idle;
  Global<int64_t> verdict;
  int64_t round;
};

// Reads the averages once and writes the bucket once.
template <typename T>
__global__ void __launch_bounds__(kThreads) lay_kernel(const __grid_constant__ LayDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr uint32_t kEntries = kBlockEntries<Accumulate>, kWords = kEntries / 32;
  static_assert(kWords <= kThreads);
  REGTOPK_SHARED(uint32_t[kWords], idle_words);
  const uint32_t first = blockIdx.x * kEntries, rest = static_cast<uint32_t>(device.layout.numel) - first;
  const uint32_t entries = rest < kEntries ? rest : kEntries;
  const bool valid = device.payload.template at_byte<const uint32_t>(0).load_uniform(0) == kPayloadMagic;
  const Global<const uint32_t> zero = device.payload.template at_byte<const uint32_t>(device.layout.zero_bits_at);
  bool has_idle = false;
  if (valid && device.spans) {
    uint32_t word = 0;
    const uint32_t first_span = device.spans.find(first);
    if (threadIdx.x < kWords) idle_words[threadIdx.x] = word = device.spans.entries_in(zero, first_span, first, entries, threadIdx.x);
    has_idle = __syncthreads_or(word != 0);
    for (uint32_t span = blockIdx.x * kThreads + threadIdx.x; span < device.spans.count; span += gridDim.x * kThreads) {
      device.idle.store(span, (zero.load(span / 32) >> (span % 32)) & 1);
    }
  }
  bool finite = true;
#pragma unroll 4
  for (uint32_t offset = threadIdx.x * kVectorEntries; offset < entries; offset += kThreads * kVectorEntries) {
    Vector<T> vector = device.received.load_vector(first + offset);
    const uint32_t idle = has_idle ? idle_words[offset / 32] >> (offset % 32) : 0;
#pragma unroll
    for (int i = 0; i < kVectorEntries; ++i) {
      // As aggregate has it of one worker: every average counts, one that waits too, and of zeros and NaN there is one each.
      const Accumulate sum = Accumulate{0} + Traits<T>::load(vector.entry[i]), nan = std::numeric_limits<Accumulate>::quiet_NaN();
      if (offset + i < entries) finite &= valid && is_finite(sum);
      vector.entry[i] = valid && ((idle >> i) & 1) != 0 ? T{} : Traits<T>::store(valid && sum == sum ? sum : nan);
    }
    if (offset + kVectorEntries <= entries) {
      device.gradient.store_vector(first + offset, vector);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kVectorEntries; ++i) {
        if (offset + i < entries) device.gradient.store(first + offset + i, vector.entry[i]);
      }
    }
  }
  if (device.verdict && __syncthreads_or(!finite) && threadIdx.x == 0) device.verdict.store(0, device.round);
}

// Blocks whose threads have `items` to do, some each.
unsigned blocks_of(int64_t items, int64_t of_thread) {
  const int64_t of_block = of_thread * kThreads, most = int64_t{multiprocessors()} * 8;
  return static_cast<unsigned>(std::clamp<int64_t>((items + of_block - 1) / of_block, 1, most));
}

}  // namespace

cudaError_t launch_average_slice(const AverageSliceLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  const WireLayout& wire = arguments.wire;
  if (is_too_large(layout) || wire.has_levels() || arguments.row_bytes < wire.index_at || arguments.row_bytes % 8 != 0 ||
      arguments.workers > kMaxEntries || is_misaligned(arguments.rows) || is_misaligned(arguments.averages)) {
    return cudaErrorInvalidValue;
  }
  return with_wire_types(layout.type, wire.type, [&]<typename T, typename W>(T, W) {
    const AverageDevice device{
        .layout = layout,
        .wire = wire,
        .rows = Global(arguments.rows),
        .workers = static_cast<uint32_t>(arguments.workers),
        .row_bytes = static_cast<uint64_t>(arguments.row_bytes),
        .entries = static_cast<uint64_t>(arguments.row_bytes - wire.index_at) / sizeof(W),
        .step = arguments.step,
        .plan = arguments.plan,
        .averages = Global(arguments.averages),
        .worst_status = Global(arguments.worst_status)};
    REGTOPK_LAUNCH((average_kernel<T, W>), blocks_of(static_cast<int64_t>(device.entries), 4), kThreads, stream, device);
    return launch_error();
  });
}

int64_t spread_room_bytes(const PayloadLayout& layout) { return layout.k == layout.numel ? rounded(layout.tile_starts_at) : layout.bytes; }

cudaError_t launch_spread(const SpreadLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  if (is_too_large(layout) || !fit(arguments.received, layout) || is_misaligned(arguments.payload) || is_misaligned(arguments.gradient) ||
      is_misaligned(arguments.workspace) || is_misaligned(arguments.room)) {
    return cudaErrorInvalidValue;
  }
  const bool is_whole = layout.k == layout.numel;
  return with_value_type(layout.type, [&]<typename T>(T) {
    const Averages<T> received(arguments.received);
    const JoinDevice<T> join{
        .layout = layout,
        .received = received,
        .own = Global(arguments.payload),
        .payload = Global(static_cast<uint8_t*>(arguments.room)),
        .has_entries = !is_whole,
        .worst_status = Global(arguments.worst_status)};
    REGTOPK_LAUNCH((join_kernel<T>), blocks_of(is_whole ? layout.spans / 32 : layout.k, 4), kThreads, stream, join);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
    if (is_whole) {
      constexpr int64_t kEntries = kBlockEntries<typename Traits<T>::Accumulate>;
      const LayDevice<T> lay{
          .layout = layout,
          .received = received,
          .payload = join.payload,
          .gradient = Global(static_cast<T*>(arguments.gradient)),
          .spans = spans_of(arguments.span_ends, layout),
          .idle = Global(arguments.idle),
          .verdict = Global(arguments.verdict),
          .round = arguments.round};
      REGTOPK_LAUNCH((lay_kernel<T>), static_cast<unsigned>((layout.numel + kEntries - 1) / kEntries), kThreads, stream, lay);
      return launch_error();
    }
    return launch_aggregate(
        {.layout = layout,
         .payloads = static_cast<const uint8_t*>(arguments.room),
         .workers = 1,
         .gradient = arguments.gradient,
         .step = arguments.received.step,
         .span_ends = arguments.span_ends,
         .idle = arguments.idle,
         .verdict = arguments.verdict,
         .round = arguments.round,
         .workspace = arguments.workspace},
        stream);
  });
}

}  // namespace regtopk
