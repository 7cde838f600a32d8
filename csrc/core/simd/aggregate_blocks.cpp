// Aggregate in blocks that fit the first-level cache: the sums of a block never reach memory, the gradient is written once
// (4 bytes per fp32 entry) and the payloads are read once. A range owns whole blocks and adds rank by rank, so that the
// bits depend neither on the threads nor on the block size.
#include "aggregate_blocks.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "block_cursor.h"

namespace regtopk {
namespace {

// Buckets from this size on are written around the caches: they would not stay there until the optimizer reads them.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// The sums of one block: all zero, untouched, between blocks.
struct alignas(64) Sums {
  float values[kBlockEntries] = {};
  uint8_t touched[kBlockEntries / kAverageBlock] = {};
};

// Returns whether all that it wrote is finite.
template <typename T>
bool aggregate_range(const AggregateArguments& arguments, const Kernels& kernels, int64_t begin, int64_t end) {
  const PayloadLayout& layout = arguments.layout;
  T* const gradient = static_cast<T*>(arguments.gradient);
  float* const feedback = static_cast<float*>(arguments.feedback);
  const float divisor = static_cast<float>(contributors(arguments));
  const bool streaming = layout.numel * static_cast<int64_t>(sizeof(T)) >= kStreamingBytes;

  std::vector<PayloadView> payloads;
  payloads.reserve(arguments.workers);
  for (int64_t worker = 0; worker < arguments.workers; ++worker) payloads.emplace_back(arguments.payloads + worker * layout.bytes, layout);
  std::vector<BlockCursor> cursors, fed_back;
  const Block first(begin, layout.numel);
  for (const PayloadView& payload : payloads) cursors.emplace_back(payload, first);
  for (int64_t row = 0; feedback != nullptr && row < arguments.feedback_workers; ++row) {
    fed_back.emplace_back(payloads[arguments.first_feedback_worker + row], first);
  }

  const auto sums = std::make_unique<Sums>();
  const bool bitmap = layout.support == Support::kBitmap;
  // At such densities next to nothing stays untouched.
  if (bitmap) std::fill(std::begin(sums->touched), std::end(sums->touched), uint8_t{1});
  bool non_finite = false;
  for (int64_t number = begin; number < end; ++number) {
    const Block block(number, layout.numel);
    for (int64_t worker = 0; worker < arguments.workers; ++worker) {
      const T* const values = payloads[worker].values<T>();
      if (bitmap) {
        const uint8_t* const bits = payloads[worker].bitmap(block.tile) + block.first_offset / 8;
        cursors[worker].skip(kernels.add_values({bits, block.entries, values + cursors[worker].entry(), sums->values, nullptr}));
        continue;
      }
      cursors[worker].visit(block, [&](int64_t entry, int64_t offset) {
        const int64_t at = offset - block.first_offset;
        sums->values[at] += Traits<T>::load(values[entry]);
        sums->touched[at / kAverageBlock] = 1;
      });
    }
    for (size_t row = 0; row < fed_back.size(); ++row) {
      const PayloadView& payload = payloads[arguments.first_feedback_worker + row];
      const T* const values = payload.values<T>();
      float* const kept = feedback + static_cast<int64_t>(row) * layout.k;
      // First the sums, one after the other, so that the divisions are not bound to the walk.
      const int64_t first_entry = fed_back[row].entry();
      if (bitmap) {
        const uint8_t* const bits = payload.bitmap(block.tile) + block.first_offset / 8;
        fed_back[row].skip(kernels.take_sums({bits, block.entries, nullptr, sums->values, kept + first_entry}));
      } else {
        fed_back[row].visit(block, [&](int64_t entry, int64_t offset) { kept[entry] = sums->values[offset - block.first_offset]; });
      }
      for (int64_t entry = first_entry; entry < fed_back[row].entry(); ++entry) {
        kept[entry] = feedback_of(kept[entry], Traits<T>::load(values[entry]), arguments.distortion);
      }
    }
    kernels.write_average(
        {.sums = sums->values,
         .touched = sums->touched,
         .gradient = gradient + block.index,
         .entries = block.entries,
         .divisor = divisor,
         .streaming = streaming,
         .non_finite = &non_finite});
    if (!bitmap) std::fill(std::begin(sums->touched), std::end(sums->touched), uint8_t{0});
  }
  return !non_finite;
}

}  // namespace

bool aggregate_blocks(const AggregateArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for) {
  std::atomic<bool> finite = true;
  with_value_type(arguments.layout.type, [&]<typename T>(T) {
    if constexpr (sizeof(typename Traits<T>::Accumulate) == sizeof(float)) {
      parallel_for(Block::count(arguments.layout.numel), [&](int64_t begin, int64_t end) {
        if (!aggregate_range<T>(arguments, kernels, begin, end)) finite = false;
      });
    }
  });
  return finite;
}

}  // namespace regtopk
