// Momentum correction and local clipping, before a compress. Its other half, masking, is settle's.
#include "launch.h"
#include "ordered_sum.cuh"
#include "span_marks.cuh"
#include "workspace.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;

template <typename T>
struct CorrectDevice {
  using Accumulate = typename Traits<T>::Accumulate;
  static constexpr uint32_t kEntries = kBlockEntries<Accumulate>;

  Global<const T> gradient;
  Global<T> given;  // may be the gradient
  Global<Accumulate> velocity;  // or null
  uint32_t numel = 0;
  DeviceSpans spans;
  Accumulate momentum = 0;
  bool nesterov = false;
  double largest_norm = 0;  // 0: any

  Global<uint32_t> counters, not_zero;  // zero before each call and after it
  Global<uint32_t> any_zero, zero_spans;  // a bit per span
  Global<double> factor, sums;            // of the gradient; of each payload tile's squares

  REGTOPK_HOST_DEVICE uint32_t blocks() const { return numel / kEntries + (numel % kEntries != 0); }
  REGTOPK_HOST_DEVICE uint32_t tiles() const { return numel / kTileEntries + (numel % kTileEntries != 0); }
  __device__ SpanMarks<T> marks() const { return {gradient, not_zero, numel}; }
};

// Cuts a workspace into its parts; with a null workspace, finds its size.
template <typename T>
int64_t place_workspace(CorrectDevice<T>& device, uint8_t* workspace) {
  Cutter place{workspace};
  place(device.counters, kCounters);
  place(device.not_zero, kMaxSpans / 32);
  static_assert(sizeof(uint32_t) * kCounters + kMaxSpans / 8 == kCorrectZeroedBytes);
  place(device.any_zero, 1);
  place(device.zero_spans, kMaxSpans / 32);
  place(device.factor, 1);
  place(device.sums, device.tiles());
  return place.bytes;
}

// Which spans' gradients are zero, for a velocity: momentum waits where a parameter was not used. A warp looks at a block tile.
template <typename T>
__global__ void __launch_bounds__(kThreads) find_zeros_kernel(const __grid_constant__ CorrectDevice<T> device) {
  REGTOPK_SHARED(uint32_t, last);
  constexpr uint32_t kEntries = CorrectDevice<T>::kEntries;
  const WarpGroup warp;
  const SpanMarks<T> marks = device.marks();
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kWarpThreads;
  if (block < device.blocks()) {
    const uint32_t begin = block * kEntries, end = device.numel - begin < kEntries ? device.numel : begin + kEntries;
    device.spans.for_each(device.spans.find(begin), begin, end, [&](uint32_t span, uint32_t from, uint32_t to, bool inside) {
      marks.look(warp, span, from, to, inside);
    });
  }
  if (!is_last_block(device.counters, kSettleDone, last)) return;
  bool any = false;
  for (uint32_t word = threadIdx.x; word < device.spans.words(); word += kThreads) {
    const uint32_t zero = marks.take_zero_spans(word, device.spans.count);
    device.zero_spans.store(word, zero);
    for (uint32_t bits = zero; bits != 0; bits &= bits - 1) {
      const uint32_t span = word * 32 + __ffs(bits) - 1;
      any |= device.spans.end(span) < device.spans.end(span + 1);
    }
  }
  any = __syncthreads_or(any);
  if (threadIdx.x != 0) return;
  device.any_zero.store(0, any);
  device.counters.store(kSettleDone, 0);
}

// The factor that brings the gradient's 2-norm down to the largest one. The sums are those of csrc/ops/momentum.cpp, in the same order.
// Reads g, 4 bytes per element in fp32.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ CorrectDevice<T> device) {
  REGTOPK_SHARED(double[kThreads], lanes);
  REGTOPK_SHARED(uint32_t, last);
  const OrderedSum<kThreads> ordered{lanes};
  for (uint32_t tile = blockIdx.x; tile < device.tiles(); tile += gridDim.x) {
    const uint32_t begin = tile * static_cast<uint32_t>(kTileEntries), rest = device.numel - begin;
    const uint32_t entries = rest < kTileEntries ? rest : static_cast<uint32_t>(kTileEntries);
    double sum = 0;
#pragma unroll 8
    for (uint32_t offset = threadIdx.x; offset < entries; offset += kThreads) {
      const double value = static_cast<double>(Traits<T>::load(device.gradient.load(begin + offset))), square = value * value;
      sum += is_finite(value) ? square : 0.0;
    }
    sum = ordered.of_tile(sum);
    if (threadIdx.x == 0) device.sums.store(tile, sum);
  }
  if (!is_last_block(device.counters, kSampleDone, last)) return;
  const double sum = ordered.of_tiles(device.sums, device.tiles());
  if (threadIdx.x != 0) return;
  const double factor = device.largest_norm / std::sqrt(sum);
  device.factor.store(0, factor < 1 ? factor : 1);
  device.counters.store(kSampleDone, 0);
}

// Reads g and u, writes u and what is given: 16 bytes per element in fp32, 8 without a velocity.
template <typename T>
__global__ void __launch_bounds__(kThreads) correct_kernel(const __grid_constant__ CorrectDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr uint32_t kEntries = CorrectDevice<T>::kEntries, kRow = kThreads * kVectorEntries;
  constexpr int kRows = kEntries / kRow, kAtOnce = 4;
  static_assert(kRows % kAtOnce == 0 && kRow % kWarpThreads == 0);
  const Accumulate factor = device.largest_norm > 0 ? static_cast<Accumulate>(device.factor.load_uniform(0)) : Accumulate{1};
  const bool has_zero = device.velocity && device.any_zero.load_uniform(0) != 0;
  // What is larger than this, or no number, can't be given: it makes the step void, as it would have without momentum.
  const Accumulate largest = Traits<T>::load(Traits<T>::store(std::numeric_limits<Accumulate>::max()));
  const auto correct = [&](Accumulate value, Accumulate& velocity) {
    value *= factor;
    if (!device.velocity) return value;
    const Accumulate now = velocity * device.momentum + value, wanted = device.nesterov ? value + now * device.momentum : now;
    const bool fits = std::abs(wanted) <= largest;
    velocity = fits ? now : velocity;
    return fits ? wanted : wanted * std::numeric_limits<Accumulate>::infinity();
  };

  for (uint32_t block = blockIdx.x; block < device.blocks(); block += gridDim.x) {
    const uint32_t first = block * kEntries, rest = device.numel - first, entries = rest < kEntries ? rest : kEntries;
    const uint32_t first_span = has_zero ? device.spans.find(first) : 0;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kAtOnce) {
      Vector<T> gradient[kAtOnce];
      Vector<Accumulate> velocity[kAtOnce];
      const auto offset_of = [&](int v) { return (row + v) * kRow + threadIdx.x * kVectorEntries; };
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint32_t offset = offset_of(v);
        gradient[v] = {};
        velocity[v] = {};
        if (offset + kVectorEntries <= entries) {
          gradient[v] = device.gradient.load_vector(first + offset);
          if (device.velocity) velocity[v] = device.velocity.load_vector(first + offset);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          if (offset + i >= entries) continue;
          gradient[v].entry[i] = device.gradient.load(first + offset + i);
          if (device.velocity) velocity[v].entry[i] = device.velocity.load(first + offset + i);
        }
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint32_t offset = offset_of(v);
        const uint32_t zero =
            has_zero ? device.spans.entries_in(device.zero_spans, first_span, first, entries, offset / 32) >> offset % 32 : 0;
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          if ((zero >> i & 1) != 0) continue;  // given as it is
          gradient[v].entry[i] = Traits<T>::store(correct(Traits<T>::load(gradient[v].entry[i]), velocity[v].entry[i]));
        }
        if (offset + kVectorEntries <= entries) {
          device.given.store_vector(first + offset, gradient[v]);
          if (device.velocity) device.velocity.store_vector(first + offset, velocity[v]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          if (offset + i >= entries) continue;
          device.given.store(first + offset + i, gradient[v].entry[i]);
          if (device.velocity) device.velocity.store(first + offset + i, velocity[v].entry[i]);
        }
      }
    }
  }
}

template <typename T>
cudaError_t launch(const CorrectDevice<T>& device, cudaStream_t stream) {
  const auto at_most = [](uint32_t blocks, uint32_t for_each) {
    const uint32_t most = static_cast<uint32_t>(multiprocessors()) * for_each;
    return blocks < most ? blocks : most;
  };
  if (device.velocity) {
    REGTOPK_LAUNCH((find_zeros_kernel<T>), (device.blocks() + kWarps - 1) / kWarps, kThreads, stream, device);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
  }
  if (device.largest_norm > 0) {
    REGTOPK_LAUNCH((norm_kernel<T>), at_most(device.tiles(), 8), kThreads, stream, device);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
  }
  REGTOPK_LAUNCH((correct_kernel<T>), at_most(device.blocks(), 8), kThreads, stream, device);
  return launch_error();
}

}  // namespace

int64_t correct_workspace_bytes(int64_t numel) {
  CorrectDevice<float> device{.numel = static_cast<uint32_t>(numel), .spans = {}};
  return place_workspace(device, nullptr);
}

cudaError_t launch_correct(const CorrectLaunch& arguments, cudaStream_t stream) {
  if (arguments.numel > kMaxEntries || arguments.spans > kMaxSpans || is_misaligned(arguments.gradient) || is_misaligned(arguments.given) ||
      is_misaligned(arguments.velocity) || is_misaligned(arguments.workspace)) {
    return cudaErrorInvalidValue;
  }
  return with_value_type(arguments.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    const uint32_t numel = static_cast<uint32_t>(arguments.numel);
    CorrectDevice<T> device{
        .gradient = Global(static_cast<const T*>(arguments.gradient)),
        .given = Global(static_cast<T*>(arguments.given)),
        .velocity = Global(static_cast<Accumulate*>(arguments.velocity)),
        .numel = numel,
        .spans = {Global(arguments.span_ends), static_cast<uint32_t>(arguments.spans), numel},
        .momentum = static_cast<Accumulate>(arguments.momentum),
        .nesterov = arguments.nesterov,
        .largest_norm = arguments.largest_norm};
    place_workspace(device, static_cast<uint8_t*>(arguments.workspace));
    return launch(device, stream);
  });
}

}  // namespace regtopk
