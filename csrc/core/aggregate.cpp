#include "aggregate.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <memory>
#include <numeric>
#include <vector>

#include "plain.h"

namespace regtopk {
namespace {

template <typename T>
bool aggregate_values(const AggregateArguments& arguments, const ParallelFor& parallel_for) {
  using Accumulate = typename Traits<T>::Accumulate;
  const PayloadLayout& layout = arguments.layout;
  T* const gradient = static_cast<T*>(arguments.gradient);
  Accumulate* const feedback = static_cast<Accumulate*>(arguments.feedback);
  const Accumulate divisor = static_cast<Accumulate>(contributors(arguments));

  std::vector<PayloadView> payloads;
  for (int64_t worker = 0; worker < arguments.workers; ++worker) {
    payloads.emplace_back(arguments.payloads + worker * layout.bytes, layout);
  }

  std::atomic<bool> finite = true;
  // One range owns whole tiles: no two threads touch the same entry, and the sum needs no atomics.
  parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
    const auto sums = std::make_unique_for_overwrite<Accumulate[]>(std::min(kTileEntries, layout.numel));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t entries = layout.tile_entries(tile);
      std::fill_n(sums.get(), entries, Accumulate{0});
      for (const PayloadView& payload : payloads) {
        const T* const values = payload.values<T>();
        payload.for_each_entry(tile, [&](int64_t entry, int64_t offset) { sums[offset] += Traits<T>::load(values[entry]); });
      }
      for (int64_t row = 0; feedback != nullptr && row < arguments.feedback_workers; ++row) {
        const PayloadView& payload = payloads[arguments.first_feedback_worker + row];
        const T* const values = payload.values<T>();
        Accumulate* const kept = feedback + row * layout.k;
        payload.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          kept[entry] = feedback_of(sums[offset], Accumulate{Traits<T>::load(values[entry])}, arguments.distortion);
        });
      }
      T* const out = gradient + tile * kTileEntries;
      bool finite_here = true;
      for (int64_t offset = 0; offset < entries; ++offset) {
        const Accumulate average = sums[offset] / divisor;
        finite_here &= is_finite(average);
        // One NaN: the sign and payload of a computed one depend on the device.
        out[offset] = Traits<T>::store(average == average ? average : std::numeric_limits<Accumulate>::quiet_NaN());
      }
      if (!finite_here) finite = false;
    }
  });
  return finite;
}

template <typename T>
double squared_norm_of(const AggregateArguments& arguments, const ParallelFor& parallel_for) {
  constexpr int64_t kLanes = 256, kWord = 64;
  const PayloadLayout& layout = arguments.layout;
  std::vector<double> sums(layout.tiles);
  parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
    // An entry that several workers sent counts once, and whoever sent it in its place.
    std::vector<uint64_t> members((std::min(kTileEntries, layout.numel) + kWord - 1) / kWord);
    for (int64_t tile = begin; tile < end; ++tile) {
      std::fill(members.begin(), members.end(), 0);
      for (int64_t worker = 0; worker < arguments.workers; ++worker) {
        const PayloadView payload(arguments.payloads + worker * layout.bytes, layout);
        payload.for_each_entry(tile, [&](int64_t, int64_t offset) { members[offset / kWord] |= uint64_t{1} << offset % kWord; });
      }
      const T* const gradient = static_cast<const T*>(arguments.gradient) + tile * kTileEntries;
      std::array<double, kLanes> lanes{};
      for (size_t word = 0; word < members.size(); ++word) {
        for (uint64_t bits = members[word]; bits != 0; bits &= bits - 1) {
          const int64_t offset = static_cast<int64_t>(word) * kWord + std::countr_zero(bits);
          const double value = static_cast<double>(Traits<T>::load(gradient[offset]));
          lanes[offset % kLanes] += value * value;
        }
      }
      sums[tile] = std::accumulate(lanes.begin(), lanes.end(), 0.0);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

double squared_norm(const AggregateArguments& arguments, const ParallelFor& parallel_for) {
  return with_value_type(arguments.layout.type, [&]<typename T>(T) { return squared_norm_of<T>(arguments, parallel_for); });
}

bool aggregate_plain(const AggregateArguments& arguments, const ParallelFor& parallel_for) {
  return with_value_type(arguments.layout.type, [&]<typename T>(T) { return aggregate_values<T>(arguments, parallel_for); });
}

}  // namespace regtopk
