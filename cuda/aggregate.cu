// Aggregate: the payloads of all workers, checked, added in rank order and averaged into the bucket.
#include "check.cuh"
#include "launch.h"
#include "payload_reader.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kRanksAtOnce = kThreads / kWarpThreads;  // a warp to each
constexpr unsigned kAhead = 4;                              // entries of each lane that are loaded before the first is needed

template <typename T>
struct AggregateDevice : CheckDevice {
  using Accumulate = typename Traits<T>::Accumulate;
  explicit AggregateDevice(const PayloadLayout& bucket) : CheckDevice(bucket) {}

  uint32_t blocks;
  Global<T> gradient;
  Global<Accumulate> feedback;
  uint32_t first_feedback_worker, feedback_workers;
  Distortion distortion;
  Global<uint32_t> left;              // blocks
  Global<unsigned long long> worst_status;
  Global<uint8_t> idle;
  Global<int64_t> verdict;            // the entry of this round
  int64_t round;

  __device__ PayloadReader<T> reader(uint32_t rank) const {
    return PayloadReader<T>(payloads.offset(static_cast<size_t>(rank) * layout.bytes), layout);
  }
};

// A block owns one block tile of the bucket, 32 KiB of the accumulate type in shared memory.
// Writes the bucket once: 4 bytes per element in fp32, 2 in 16-bit types. Reads 2 bytes (of the bitmap 1 bit per element)
// and one value per entry of each payload, and a few to find the range of each; per entry fed back it reads them again and
// writes one accumulate value.
// Ranks are added in order, with a barrier between; within a rank every entry has an offset of its own. So each sum is the
// same left fold on every replica.
// What takes the time of a block is waiting for loads that depend on each other. So with offsets a warp takes one rank, and all
// ranks find their ranges and load their entries at the same time; only the additions take turns.
template <typename T>
class Aggregate {
  using Device = AggregateDevice<T>;
  using Accumulate = typename Device::Accumulate;
  using Reader = PayloadReader<T>;
  using Set = typename Reader::Set;
  static constexpr unsigned kEntries = Reader::kEntries;
  using Group = BlockGroup<kThreads>;

 public:
  struct Shared {
    alignas(16) Accumulate sums[kEntries];
    uint32_t begin[kRanksAtOnce], end[kRanksAtOnce];
    Set set;
    uint32_t smallest;
    uint32_t idle_words[Set::kWords];
    uint32_t first_span;
    typename Group::Scratch scratch;
  };

  __device__ Aggregate(const Device& device, Shared& shared, uint32_t block)
      : device_(device), shared_(shared), group_{shared.scratch}, block_(block) {}

  __device__ void clear() {
    for (unsigned i = threadIdx.x * kVectorEntries; i < kEntries; i += kThreads * kVectorEntries) vector_of_sums(i) = {};
  }
  // Behind a barrier after clear(). Both are the same for all threads of all blocks; contributing as contributors() in csrc/core/aggregate.h.
  __device__ void run(bool has_idle, uint32_t contributing) {
    has_idle_ = has_idle;
    if (has_idle_) load_idle_words();
    const auto feed_back = [&](uint32_t row, uint32_t offset, T value, uint32_t entry) {
      const Accumulate sent = Traits<T>::load(value);
      device_.feedback.store(
          row * static_cast<size_t>(device_.layout.k) + entry,
          is_idle(offset) ? std::numeric_limits<Accumulate>::infinity() : feedback_of(shared_.sums[offset], sent, device_.distortion));
    };
    // Of few ranks with few entries the sums are whole while the warps still have these in hand.
    const bool at_once = device_.feedback && device_.layout.support == Support::kOffsets && device_.workers <= kRanksAtOnce;
    const bool fed_back = each_rank<true>(
        0, device_.workers, [&](uint32_t, uint32_t offset, T value, uint32_t) { shared_.sums[offset] += Traits<T>::load(value); },
        [&](uint32_t rank, uint32_t offset, T value, uint32_t entry) {
          const uint32_t row = rank - device_.first_feedback_worker;
          if (at_once && row < device_.feedback_workers) feed_back(row, offset, value, entry);
        });
    if (device_.feedback && !(at_once && fed_back)) {
      each_rank<false>(device_.first_feedback_worker, device_.feedback_workers, feed_back, [](uint32_t, uint32_t, T, uint32_t) {});
    }
    const Accumulate divisor = static_cast<Accumulate>(contributing), reciprocal = Accumulate{1} / divisor;
    if ((contributing & (contributing - 1)) == 0) {
      // The reciprocal of a power of two is exact, and the product with it has the bits of the quotient.
      write([&](uint32_t offset) {
        const Vector<Accumulate> sums = vector_of_sums(offset);
        Vector<T> averages;
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) averages.entry[i] = stored(sums.entry[i] * reciprocal);
        return averages;
      });
      judge();
      return;
    }
    // Nearly all sums are 0, and 0 takes the slow path of a division: one test passes over four of them, and one over each
    // of the others. No sum is -0, because it began at 0.
    write([&](uint32_t offset) {
      const Vector<Accumulate> sums = vector_of_sums(offset);
      Vector<T> averages{};
      if (sums.entry[0] == 0 && sums.entry[1] == 0 && sums.entry[2] == 0 && sums.entry[3] == 0) return averages;
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) {
        if (sums.entry[i] != 0) averages.entry[i] = stored(sums.entry[i] / divisor);
      }
      return averages;
    });
    judge();
  }

  // A payload is not valid: NaN for everyone, and nothing of the payloads is used.
  __device__ void refuse() {
    const Accumulate nan = std::numeric_limits<Accumulate>::quiet_NaN();
    const T nan_of_bucket = Traits<T>::store(nan);
    write([&](uint32_t) { return Vector<T>{nan_of_bucket, nan_of_bucket, nan_of_bucket, nan_of_bucket}; });
    const size_t entries = static_cast<size_t>(device_.feedback_workers) * device_.layout.k, step = size_t{gridDim.x} * kThreads;
    for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; device_.feedback && i < entries; i += step) device_.feedback.store(i, nan);
    all_finite_ = false;
    judge();
  }

 private:
  // Calls function(rank - first, offset in the block tile, value, entry), of kInTurn one rank after the other, with a barrier between;
  // and then, where there are offsets and few of them, so many ranks at a time, `then` with the same: returns whether of all.
  template <bool kInTurn, typename Function, typename Then>
  __device__ bool each_rank(uint32_t first, uint32_t count, const Function& function, const Then& then) {
    bool had_then = true;
    for (uint32_t chunk = 0; chunk < count; chunk += kRanksAtOnce) {
      const uint32_t ranks = count - chunk < kRanksAtOnce ? count - chunk : kRanksAtOnce;
      if (device_.layout.support == Support::kOffsets) {
        had_then &= each_offset<kInTurn>(
            first + chunk, ranks,
            [&](uint32_t turn, uint32_t offset, T value, uint32_t entry) { function(chunk + turn, offset, value, entry); },
            [&](uint32_t turn, uint32_t offset, T value, uint32_t entry) { then(chunk + turn, offset, value, entry); });
      } else {
        for (uint32_t turn = 0; turn < ranks; ++turn) {
          const Reader reader = device_.reader(first + chunk + turn);
          visit_bitmap(reader, [&](uint32_t offset, uint32_t entry) { function(chunk + turn, offset, reader.value(entry), entry); });
        }
      }
    }
    __syncthreads();
    return had_then;
  }

  // Of at most kRanksAtOnce ranks.
  template <bool kInTurn, typename Function, typename Then>
  __device__ bool each_offset(uint32_t first_rank, uint32_t ranks, const Function& function, const Then& then) {
    const WarpGroup warp;
    const uint32_t own = threadIdx.x / kWarpThreads, base = block_ % Reader::kBlocksPerTile * kEntries;
    const Reader reader = device_.reader(first_rank + (own < ranks ? own : 0));
    uint32_t begin = 0, end = 0, offset[kAhead];
    T value[kAhead];
    if (own < ranks) {
      reader.range_of_block(warp, block_, begin, end);
#pragma unroll
      for (unsigned i = 0; i < kAhead; ++i) {
        const uint32_t entry = begin + i * kWarpThreads + warp.rank();
        if (entry >= end) continue;
        offset[i] = reader.offset_in_tile(entry) - base;
        value[i] = reader.value(entry);
      }
    }
    const auto visit_own = [&](const auto& visit) {
#pragma unroll
      for (unsigned i = 0; i < kAhead; ++i) {
        const uint32_t entry = begin + i * kWarpThreads + warp.rank();
        if (entry < end) visit(own, offset[i], value[i], entry);
      }
    };
    if (__syncthreads_or(end - begin > kAhead * kWarpThreads)) {  // dense: all threads to one rank after the other
      if (warp.rank() == 0) shared_.begin[own] = begin, shared_.end[own] = end;
      for (uint32_t turn = 0; turn < ranks; ++turn) {
        __syncthreads();
        const Reader of_turn = device_.reader(first_rank + turn);
        for (uint32_t entry = shared_.begin[turn] + threadIdx.x; entry < shared_.end[turn]; entry += kThreads) {
          function(turn, of_turn.offset_in_tile(entry) - base, of_turn.value(entry), entry);
        }
      }
      __syncthreads();
      return false;
    }
    if constexpr (!kInTurn) {
      visit_own(function);
    } else {
      for (uint32_t turn = 0; turn < ranks; ++turn) {
        if (turn == own) visit_own(function);
        __syncthreads();
      }
      visit_own(then);
    }
    return true;
  }

  template <typename Visit>
  __device__ void visit_bitmap(const Reader& reader, const Visit& visit) {
    const uint32_t first = reader.load_block(group_, block_, shared_.set, shared_.smallest);
    for (unsigned word = threadIdx.x; word < Set::kWords; word += kThreads) {
      uint32_t entry = first + shared_.set.members_before[word];
      for (uint32_t bits = shared_.set.words[word]; bits != 0; bits &= bits - 1, ++entry) visit(word * 32 + __ffs(bits) - 1, entry);
    }
    __syncthreads();
  }

  __device__ Vector<Accumulate>& vector_of_sums(uint32_t offset) {
    return reinterpret_cast<Vector<Accumulate>*>(shared_.sums)[offset / kVectorEntries];
  }
  // An average of this block tile. One NaN: the sign and payload of a computed one depend on the device.
  __device__ T stored(Accumulate average) {
    all_finite_ &= is_finite(average);
    return Traits<T>::store(average == average ? average : std::numeric_limits<Accumulate>::quiet_NaN());
  }

  // Every average counts, those of idle spans too: as on the CPU, where they are cleared after the judgement.
  __device__ void judge() {
    if (device_.verdict && __syncthreads_or(!all_finite_) && threadIdx.x == 0) device_.verdict.store(0, device_.round);
  }

  // Nobody sent anything of what the entries of idle spans are now: their average is 0 and their feedback infinite.
  __device__ void load_idle_words() {
    const uint32_t first = block_ * kEntries, rest = static_cast<uint32_t>(device_.layout.numel) - first;
    if (threadIdx.x < kWarpThreads) {
      const uint32_t first_span = device_.spans.find(first);
      if (threadIdx.x == 0) shared_.first_span = first_span;
    }
    __syncthreads();
    if (threadIdx.x < Set::kWords) {
      shared_.idle_words[threadIdx.x] =
          device_.spans.entries_in(device_.idle_now, shared_.first_span, first, rest < kEntries ? rest : kEntries, threadIdx.x);
    }
    __syncthreads();
  }
  __device__ bool is_idle(uint32_t offset) const { return has_idle_ && ((shared_.idle_words[offset / 32] >> (offset % 32)) & 1) != 0; }

  // values_of(offset) gives the four entries from a multiple of four on; past the bucket's end they go unused.
  template <typename Values>
  __device__ void write(const Values& values_of) {
    const auto vector_of = [&](uint32_t offset) {
      Vector<T> values = values_of(offset);
      for (uint32_t i = 0; has_idle_ && i < kVectorEntries; ++i) {
        if (is_idle(offset + i)) values.entry[i] = T{};
      }
      return values;
    };
    const uint32_t first = block_ * kEntries, rest = static_cast<uint32_t>(device_.layout.numel) - first;
    const uint32_t entries = rest < kEntries ? rest : kEntries, whole = entries / kVectorEntries * kVectorEntries;
    for (uint32_t offset = threadIdx.x * kVectorEntries; offset < whole; offset += kThreads * kVectorEntries) {
      device_.gradient.store_vector(first + offset, vector_of(offset));
    }
    if (threadIdx.x == 0 && whole < entries) {
      const Vector<T> vector = vector_of(whole);
      for (uint32_t i = 0; i < kVectorEntries; ++i) {
        if (whole + i < entries) device_.gradient.store(first + whole + i, vector.entry[i]);
      }
    }
  }

  const Device& device_;
  Shared& shared_;
  Group group_;
  uint32_t block_;
  bool has_idle_ = false, all_finite_ = true;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(typename Traits<T>::Accumulate) == 8 ? 4 : 5)
    aggregate_kernel(const __grid_constant__ AggregateDevice<T> device) {
  REGTOPK_SHARED(typename Aggregate<T>::Shared, shared);
  Aggregate<T> work(device, shared, blockIdx.x);
  work.clear();
  wait_for_stream();
  const unsigned long long status = ~device.status.load_uniform(0);
  const uint32_t contributing = device.workers - device.absent.load_uniform(0);
  const bool has_idle = device.spans && device.any_idle.load_uniform(0) != 0;
  if (!__syncthreads_or(status != kPayloadsValid)) {  // a barrier too: the whole block has read the status
    work.run(has_idle, contributing > 0 ? contributing : 1);
    const uint32_t step = gridDim.x * kThreads;
    for (uint32_t span = blockIdx.x * kThreads + threadIdx.x; span < device.spans.count; span += step) {
      device.idle.store(span, (device.idle_now.load(span / 32) >> (span % 32)) & 1);
    }
  } else {
    if (blockIdx.x == 0 && threadIdx.x == 0 && device.worst_status) device.worst_status.take_minimum(0, status);
    work.refuse();
  }
  // The last block zeroes the workspace for the next call.
  if (threadIdx.x == 0 && device.left.add(0, 1) == gridDim.x - 1) {
    device.status.store(0, 0);
    device.left.store(0, 0);
    device.absent.store(0, 0);
    if (device.spans) device.any_idle.store(0, 0);
  }
}

}  // namespace

int64_t aggregate_workspace_bytes(const PayloadLayout& layout) {
  return kAggregateZeroedBytes + (layout.spans + 31) / 32 * static_cast<int64_t>(sizeof(uint32_t));
}

cudaError_t launch_aggregate(const AggregateLaunch& arguments, cudaStream_t stream) {
  if (arguments.layout.numel > kMaxEntries || arguments.layout.spans > kMaxSpans || arguments.workers > kMaxEntries ||
      is_misaligned(arguments.payloads) || is_misaligned(arguments.gradient) || is_misaligned(arguments.workspace)) {
    return cudaErrorInvalidValue;
  }
  return with_value_type(arguments.layout.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    AggregateDevice<T> device(arguments.layout);
    device.payloads = Global(arguments.payloads);
    device.workers = static_cast<uint32_t>(arguments.workers);
    device.blocks = static_cast<uint32_t>((arguments.layout.numel + kBlockEntries<Accumulate> - 1) / kBlockEntries<Accumulate>);
    device.gradient = Global(static_cast<T*>(arguments.gradient));
    device.feedback = Global(static_cast<Accumulate*>(arguments.feedback));
    device.first_feedback_worker = static_cast<uint32_t>(arguments.first_feedback_worker);
    device.feedback_workers = static_cast<uint32_t>(arguments.feedback_workers);
    device.distortion = arguments.distortion;
    device.step = arguments.step;
    device.plan = arguments.plan;
    device.status = Global(static_cast<unsigned long long*>(arguments.workspace));
    const Global<uint32_t> words(static_cast<uint32_t*>(arguments.workspace));
    device.left = words.offset(2);
    device.any_idle = words.offset(3);
    device.absent = words.offset(4);
    device.idle_now = words.offset(kAggregateZeroedBytes / sizeof(uint32_t));
    device.spans = {
        Global(arguments.span_ends), static_cast<uint32_t>(arguments.layout.spans), static_cast<uint32_t>(arguments.layout.numel)};
    device.idle = Global(arguments.idle);
    device.verdict = Global(arguments.verdict);
    device.round = arguments.round;
    device.worst_status = Global(arguments.worst_status);
    launch_check<T>(device, stream);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
    REGTOPK_LAUNCH_EARLY((aggregate_kernel<T>), device.blocks, kThreads, stream, device);
    return launch_error();
  });
}

}  // namespace regtopk
