// Compress: settle, sample, accumulate and finish, or settle and chunks or whole, one after the other on the stream.
#include <algorithm>
#include <cmath>

#include "selection.cuh"
#include "settle.cuh"

namespace regtopk {
namespace {

// Of a small bucket the sample takes longer than what a narrower bracket saves.
constexpr int64_t kSampledAtMost = 128;          // one entry in so many
constexpr int64_t kSampledAtLeast = 2048;        // one sector of eight entries in so many, but not more than kSectors
constexpr int64_t kSectors = 2048, kMostSectors = 8192;
constexpr uint32_t kItemsOfBlock = 8;             // of finish, at least, where it draws several block tiles at once
constexpr int64_t kListAtLeast = 65536;    // entries; buckets up to that size need no bracket

}  // namespace

Sampling sampling_of(int64_t numel, int64_t k) {
  Sampling sampling;
  if (numel <= kListAtLeast) {
    sampling.list_capacity = numel;
    return sampling;
  }
  const int64_t wanted = std::clamp(numel / (8 * kSampledAtLeast), kSectors, kMostSectors);
  sampling.sectors = std::min(wanted, numel / (8 * kSampledAtMost));
  const double samples = static_cast<double>(sampling.sectors * 8), density = static_cast<double>(k) / static_cast<double>(numel);
  const double expected = samples * density, margin = 5.0 * std::sqrt(expected * (1.0 - density)) + 2.0;
  // A high end that is too low costs another look at the list, not at the residual; so there is always one.
  sampling.rank_high = std::max<int64_t>(1, static_cast<int64_t>(expected - margin));
  const int64_t rank_low = static_cast<int64_t>(std::ceil(expected + margin));
  sampling.rank_low = rank_low <= sampling.sectors * 8 ? rank_low : 0;
  // Twice the width of the bracket leaves room for the error of the sample and for entries that RegTop-k holds back.
  const double in_bracket = 2.0 * margin / samples * static_cast<double>(numel);
  sampling.list_capacity = std::min(numel, k + std::max(kListAtLeast, k + static_cast<int64_t>(2.0 * in_bracket)));
  return sampling;
}

int64_t compress_workspace_bytes(const PayloadLayout& layout, bool has_feedback, const Sampling& sampling) {
  return with_value_type(layout.type, [&]<typename T>(T) {
    CompressDevice<T> device(layout);
    device.sampling = sampling;
    return place_workspace(device, nullptr, has_feedback);
  });
}

cudaError_t launch_compress(const CompressLaunch& arguments, cudaStream_t stream) {
  if (arguments.layout.numel > kMaxEntries || arguments.chunks.entries > kLargestChunkOfDevice || arguments.layout.spans > kMaxSpans ||
      is_misaligned(arguments.gradient) || is_misaligned(arguments.residual) || is_misaligned(arguments.payload) ||
      is_misaligned(arguments.sent) || is_misaligned(arguments.workspace)) {
    return cudaErrorInvalidValue;
  }
  return with_value_type(arguments.layout.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    const bool has_feedback = arguments.feedback != nullptr;
    CompressDevice<T> device(arguments.layout);
    device.sampling = arguments.sampling;
    device.gradient = Global(static_cast<const T*>(arguments.gradient));
    device.residual = Global(static_cast<Accumulate*>(arguments.residual));
    device.payload = Global(arguments.payload);
    device.step = arguments.step;
    device.plan = arguments.plan;
    device.sent.bytes = Global(arguments.sent);
    device.sent.feedback = Global(static_cast<const Accumulate*>(arguments.feedback));
    device.sent.numel = arguments.layout.numel;
    device.sent.size = arguments.sent_bytes;
    device.sent.feedback_entries = arguments.feedback_entries;
    device.distortion = arguments.distortion;
    device.mu = arguments.mu;
    device.decay = static_cast<Accumulate>(arguments.decay);
    device.chunks = arguments.chunks;
    // Drawing an item costs about what a block tile does: of a large bucket every draw brings several.
    const uint32_t warps = kFinishWarps * kFinishBlocks * static_cast<uint32_t>(multiprocessors());
    device.tiles_of_warp = std::clamp<uint32_t>(device.blocks / (kItemsOfBlock * warps), 1, 16);
    place_workspace(device, static_cast<uint8_t*>(arguments.workspace), has_feedback);
    if (arguments.layout.spans > 0) {
      SettleDevice<T> settle(arguments.layout);
      settle.sent = device.sent;
      settle.set_spans(arguments.spans);
      settle.residual = device.residual;
      settle.marks = {device.gradient, device.not_zero, static_cast<uint64_t>(arguments.layout.numel)};
      settle.payload = device.payload;
      settle.scale = arguments.scale;
      settle.deed = arguments.deed;
      settle.done = device.counters;
      settle.idle_now = device.idle_spans;
      settle.any_idle = device.any_idle;
      settle.first_span = device.first_span;
      launch_settle(settle, stream);
      if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
      device.sent = settle.sent;
      device.spans = settle.spans;
      device.totals = settle.counters;
    }
    if (arguments.is_whole()) {
      launch_whole(device, arguments.choose, stream);
      return launch_error();
    }
    if (arguments.chunks) {
      launch_chunks(device, has_feedback, stream);
      return launch_error();
    }
    launch_sample(device, has_feedback, stream);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
    launch_accumulate(device, has_feedback, stream);
    if (const cudaError_t error = launch_error(); error != cudaSuccess) return error;
    launch_finish(device, has_feedback, stream);
    return launch_error();
  });
}

}  // namespace regtopk
