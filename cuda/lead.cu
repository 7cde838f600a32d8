// A support that a leader has chosen: take, which fills a follower's payload at it, and feedback. A warp owns a block tile, as in settle.
#include <limits>

#include "averages.cuh"
#include "check.cuh"
#include "payload_reader.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;

// The entries of a payload, block tile by block tile; by one warp.
template <typename T>
class TileWalk {
 public:
  using Reader = PayloadReader<T>;
  using Set = typename Reader::Set;
  static constexpr uint32_t kEntries = Reader::kEntries;

  __device__ TileWalk(const Reader& reader, const DeviceSpans& spans, Set& set, uint32_t& smallest)
      : reader_(reader), spans_(spans), set_(set), smallest_(smallest) {}

  // Calls function(entry, index in the bucket, whether its span is idle).
  template <typename IsIdle, typename Function>
  __device__ void each_entry(uint32_t block, const IsIdle& is_idle, const Function& function) {
    const WarpGroup warp;
    const uint32_t first = block * kEntries, numel = static_cast<uint32_t>(reader_.layout().numel);
    const uint32_t entries = numel - first < kEntries ? numel - first : kEntries;
    const uint32_t first_entry = reader_.load_block(warp, block, set_, smallest_);
    const uint32_t first_span = spans_ ? spans_.find(first) : 0;
    const bool any_idle = spans_ && spans_.has_any(is_idle, first_span, first, entries);
    for (uint32_t word = warp.rank(); word < Set::kWords; word += kWarpThreads) {
      const uint32_t idle = any_idle ? spans_.entries_of(is_idle, first_span, first, entries, word) : 0;
      for (uint32_t bits = set_.words[word]; bits != 0; bits &= bits - 1) {
        const uint32_t bit = __ffs(bits) - 1, offset = word * 32 + bit, entry = first_entry + set_.rank_of(offset);
        if (entry < reader_.layout().k) function(entry, first + offset, ((idle >> bit) & 1) != 0);
      }
    }
  }

 private:
  const Reader reader_;
  const DeviceSpans spans_;
  Set& set_;
  uint32_t& smallest_;
};

template <typename T>
unsigned blocks_of_tiles(const PayloadLayout& layout) {
  constexpr int64_t kEntries = int64_t{PayloadReader<T>::kEntries} * kWarps;
  return static_cast<unsigned>((layout.numel + kEntries - 1) / kEntries);
}

template <typename T>
struct TakeDevice {
  using Accumulate = typename Traits<T>::Accumulate;

  PayloadLayout layout;
  Global<const uint8_t> support;  // a payload up to its values
  Global<uint8_t> payload;
  Global<Accumulate> residual;
  DeviceSpans spans;
  Global<const uint8_t> idle;
  unsigned long long leader;      // as a status has it
  Global<unsigned long long> status, worst_status;
  Global<uint32_t> left, absent;

  // Idle in the last step, and its own gradient is still zero: what another rank gave of it waits.
  __device__ bool is_idle(uint32_t span) const {
    return idle.load(span) != 0 && ((payload.load(layout.zero_bits_at + span / 8) >> (span % 8)) & 1) != 0;
  }
};

// Per entry 4 bytes of the residual read and written, its value written, its offset copied; of each block tile the offsets of its
// payload tile, as in settle.
template <typename T>
__global__ void __launch_bounds__(kThreads) take_kernel(const __grid_constant__ TakeDevice<T> device) {
  using Walk = TileWalk<T>;
  REGTOPK_SHARED(typename Walk::Set[kWarps], sets);
  REGTOPK_SHARED(uint32_t[kWarps], smallest);
  const PayloadLayout& layout = device.layout;
  const unsigned w = threadIdx.x / kWarpThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, threads = int64_t{gridDim.x} * kThreads;
  const unsigned long long status = ~device.status.load_uniform(0);
  const bool valid = !__syncthreads_or(status != kPayloadsValid);  // a barrier too: the whole block has read the status
  const Global<uint64_t> words = device.payload.template at_byte<uint64_t>(layout.tile_starts_at);
  const Global<const uint64_t> led = device.support.template at_byte<const uint64_t>(layout.tile_starts_at);
  for (int64_t word = thread; word < (layout.values_at - layout.tile_starts_at) / 8; word += threads) {
    words.store(word, valid ? led.load(word) : 0);
  }
  const Global<T> values = device.payload.template at_byte<T>(layout.values_at);
  if (valid) {
    const uint32_t block = blockIdx.x * kWarps + w;
    Walk walk(PayloadReader<T>(device.support, layout), device.spans, sets[w], smallest[w]);
    if (uint64_t{block} * Walk::kEntries < static_cast<uint64_t>(layout.numel)) {
      const auto is_idle = [&](uint32_t span) { return device.is_idle(span); };
      walk.each_entry(block, is_idle, [&](uint32_t entry, uint32_t index, bool idle) {
        if (idle) return values.store(entry, T{});
        const auto kept = device.residual.load(index);
        const T value = Traits<T>::store(kept);
        values.store(entry, value);
        device.residual.store(index, kept - Traits<T>::load(value));
      });
    }
  } else {
    for (int64_t entry = thread; entry < layout.k; entry += threads) values.store(entry, T{});
    if (thread == 0) {
      const Global<uint32_t> flags = device.payload.template at_byte<uint32_t>(offsetof(PayloadHeader, flags));
      flags.store(0, flags.load(0) | kFlagUnfilled);
      if (device.worst_status) device.worst_status.take_minimum(0, status + device.leader);
    }
  }
  // The last block zeroes the workspace for the next call.
  if (threadIdx.x == 0 && device.left.add(0, 1) == gridDim.x - 1) {
    device.status.store(0, 0);
    device.left.store(0, 0);
    device.absent.store(0, 0);
  }
}

template <typename T>
struct FeedbackDevice {
  using Accumulate = typename Traits<T>::Accumulate;

  PayloadLayout layout;
  Averages<T> received;
  Global<const uint8_t> payload;
  DeviceSpans spans;
  Global<const uint8_t> idle;
  Distortion distortion;
  Global<Accumulate> feedback;
};

// Per entry the value and the average read and the feedback written; of each block tile the offsets of its payload tile.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) feedback_kernel(const __grid_constant__ FeedbackDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  using Walk = TileWalk<T>;
  REGTOPK_SHARED(typename Walk::Set[kWarps], sets);
  REGTOPK_SHARED(uint32_t[kWarps], smallest);
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  const Averages<T>& received = device.received;
  bool valid = true;
  uint32_t contributing = 0;
  for (uint32_t rank = threadIdx.x; rank < received.workers; rank += kThreads) {
    valid &= received.is_of_step(rank);
    contributing += (received.head(rank).template at_byte<const uint32_t>(offsetof(PayloadHeader, flags)).load(0) & kFlagAbsent) == 0;
  }
  valid = !__syncthreads_or(!valid);
  contributing = BlockGroup<kThreads>{scratch}.sum(contributing);
  if (!valid) {
    const Accumulate nan = std::numeric_limits<Accumulate>::quiet_NaN();
    for (int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x; entry < device.layout.k; entry += int64_t{gridDim.x} * kThreads) {
      device.feedback.store(static_cast<size_t>(entry), nan);
    }
    return;
  }
  const unsigned w = threadIdx.x / kWarpThreads;
  const uint32_t block = blockIdx.x * kWarps + w;
  if (uint64_t{block} * Walk::kEntries >= static_cast<uint64_t>(device.layout.numel)) return;
  const PayloadReader<T> reader(device.payload, device.layout);
  Walk walk(reader, device.spans, sets[w], smallest[w]);
  const Accumulate workers = static_cast<Accumulate>(contributing > 0 ? contributing : 1);
  const auto is_idle = [&](uint32_t span) { return device.idle.load(span) != 0; };
  walk.each_entry(block, is_idle, [&](uint32_t entry, uint32_t, bool idle) {
    const Accumulate sum = workers * Traits<T>::load(received.load(entry)), sent = Traits<T>::load(reader.value(entry));
    device.feedback.store(entry, idle ? std::numeric_limits<Accumulate>::infinity() : feedback_of(sum, sent, device.distortion));
  });
}

}  // namespace

int64_t take_room_bytes(const PayloadLayout& layout, const WireLayout& wire) {
  return rounded(layout.values_at) + from_wire_workspace_bytes(layout, wire, 1);
}

cudaError_t launch_take(const TakeLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  if (is_too_large(layout) || is_misaligned(arguments.lead) || is_misaligned(arguments.payload) || is_misaligned(arguments.workspace) ||
      is_misaligned(arguments.room)) {
    return cudaErrorInvalidValue;
  }
  uint8_t* const support = static_cast<uint8_t*>(arguments.room);
  const cudaError_t error = launch_from_wire(
      {.layout = layout,
       .wire = arguments.wire,
       .bytes = arguments.lead,
       .workers = 1,
       .payloads = support,
       .has_values = false,
       .workspace = support + rounded(layout.values_at)},
      stream);
  if (error != cudaSuccess) return error;
  return with_value_type(layout.type, [&]<typename T>(T) {
    const Global<uint32_t> words(static_cast<uint32_t*>(arguments.workspace));
    CheckDevice check(layout);
    check.payloads = Global<const uint8_t>(support);
    check.workers = 1;
    check.step = arguments.step;
    check.plan = arguments.plan;
    check.status = Global(static_cast<unsigned long long*>(arguments.workspace));
    check.absent = words.offset(4);
    launch_check<T>(check, stream);
    if (const cudaError_t failed = launch_error(); failed != cudaSuccess) return failed;
    const TakeDevice<T> device{
        .layout = layout,
        .support = check.payloads,
        .payload = Global(arguments.payload),
        .residual = Global(static_cast<typename Traits<T>::Accumulate*>(arguments.residual)),
        .spans = spans_of(arguments.span_ends, layout),
        .idle = Global(arguments.idle),
        .leader = static_cast<unsigned long long>(arguments.leader) << 8,
        .status = check.status,
        .worst_status = Global(arguments.worst_status),
        .left = words.offset(2),
        .absent = check.absent};
    REGTOPK_LAUNCH((take_kernel<T>), blocks_of_tiles<T>(layout), kThreads, stream, device);
    return launch_error();
  });
}

cudaError_t launch_feedback(const FeedbackLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  if (is_too_large(layout) || !fit(arguments.received, layout) || is_misaligned(arguments.payload)) return cudaErrorInvalidValue;
  return with_value_type(layout.type, [&]<typename T>(T) {
    const FeedbackDevice<T> device{
        .layout = layout,
        .received = Averages<T>(arguments.received),
        .payload = Global(arguments.payload),
        .spans = spans_of(arguments.span_ends, layout),
        .idle = Global(arguments.idle),
        .distortion = arguments.distortion,
        .feedback = Global(static_cast<typename Traits<T>::Accumulate*>(arguments.feedback))};
    REGTOPK_LAUNCH((feedback_kernel<T>), blocks_of_tiles<T>(layout), kThreads, stream, device);
    return launch_error();
  });
}

}  // namespace regtopk
