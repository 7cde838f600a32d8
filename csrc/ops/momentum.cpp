// Momentum correction and local clipping on the CPU: regtopk::correct_ and regtopk::mask_.
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

constexpr int64_t kBlock = 256;  // divides a tile

// The squared 2-norm of what is finite, the same bits for any number of threads: of a tile entry i goes to lane i % kBlock, then the
// lanes are added up in order, and then the tiles.
template <typename T>
double squared_norm_of(const T* gradient, int64_t numel) {
  std::vector<double> sums((numel + kTileEntries - 1) / kTileEntries);
  torch_parallel_for()(static_cast<int64_t>(sums.size()), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      std::array<double, kBlock> lanes{};
      const int64_t tile_end = std::min((tile + 1) * kTileEntries, numel);
      for (int64_t from = tile * kTileEntries; from < tile_end; from += kBlock) {
        for (int64_t i = 0; i < std::min(kBlock, tile_end - from); ++i) {
          const double value = static_cast<double>(Traits<T>::load(gradient[from + i])), square = value * value;
          lanes[i] += is_finite(value) ? square : 0.0;
        }
      }
      sums[tile] = std::accumulate(lanes.begin(), lanes.end(), 0.0);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template <typename T>
struct Corrector {
  using Accumulate = typename Traits<T>::Accumulate;
  const T* gradient;
  T* given;
  Accumulate* velocity;  // null: none
  const Accumulate factor, decay;
  const bool nesterov;

  void correct(int64_t begin, int64_t end) const {
    // What is larger than this, or no number, can't be given: it makes the step void, as it would have without momentum.
    const Accumulate largest = Traits<T>::load(Traits<T>::store(std::numeric_limits<Accumulate>::max()));
    for (int64_t from = begin; from < end; from += kBlock) {
      // `given` may be the gradient: a block in between lets the compiler make vectors all the same.
      std::array<Accumulate, kBlock> values;
      const int64_t entries = std::min(kBlock, end - from);
      for (int64_t i = 0; i < entries; ++i) values[i] = Traits<T>::load(gradient[from + i]) * factor;
      for (int64_t i = 0; velocity != nullptr && i < entries; ++i) {
        const Accumulate before = velocity[from + i], now = before * decay + values[i];
        const Accumulate wanted = nesterov ? values[i] + now * decay : now;
        const bool fits = std::abs(wanted) <= largest;
        velocity[from + i] = fits ? now : before;
        values[i] = fits ? wanted : wanted * std::numeric_limits<Accumulate>::infinity();
      }
      for (int64_t i = 0; i < entries; ++i) given[from + i] = Traits<T>::store(values[i]);
    }
  }
};

void correct_cpu(
    const at::Tensor& gradient, const at::Tensor& given, const std::optional<at::Tensor>& velocity, const at::Tensor& spans_tensor,
    double momentum, bool nesterov, double largest_norm) {
  constexpr const char* who = "correct_";
  const ValueType type = value_type_of(who, gradient.scalar_type());
  const int64_t numel = gradient.numel(), span_count = check_spans(who, spans_tensor, numel);
  check_vector(who, "gradient", gradient, gradient.scalar_type(), numel);
  check_vector(who, "given", given, gradient.scalar_type(), numel);
  if (velocity) check_vector(who, "velocity", *velocity, accumulate_dtype(gradient.scalar_type()), numel);
  with_value_type(type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    const T* const from = static_cast<const T*>(gradient.const_data_ptr());
    T* const to = static_cast<T*>(given.mutable_data_ptr());
    double factor = 1;
    if (largest_norm > 0) factor = std::min(1.0, largest_norm / std::sqrt(squared_norm_of(from, numel)));
    const Corrector<T> corrector{
        from,
        to,
        velocity ? static_cast<Accumulate*>(velocity->mutable_data_ptr()) : nullptr,
        static_cast<Accumulate>(factor),
        static_cast<Accumulate>(momentum),
        nesterov};
    const Spans spans = spans_of(spans_tensor);
    c10::SmallVector<uint8_t, 256> zero(span_count);
    find_zero_spans(from, type, spans, zero.data());
    for (int64_t span = 0; span < span_count; ++span) {
      const int64_t first = spans.begin(span), last = spans.end(span);
      if (zero[span] != 0) {
        if (to != from) std::copy(from + first, from + last, to + first);
        continue;
      }
      torch_parallel_for()((last - first + kTileEntries - 1) / kTileEntries, [&](int64_t begin, int64_t end) {
        corrector.correct(first + begin * kTileEntries, std::min(first + end * kTileEntries, last));
      });
    }
  });
}

void mask_cpu(
    const at::Tensor& velocity, const at::Tensor& sent, const at::Tensor& spans_tensor, const at::Tensor& idle_tensor,
    const at::Tensor& verdict, const std::optional<at::Tensor>& applied, at::ScalarType dtype, int64_t sent_round) {
  constexpr const char* who = "mask_";
  const int64_t span_count = check_spans(who, spans_tensor, velocity.numel());
  check_vector(who, "velocity", velocity, accumulate_dtype(dtype), velocity.numel());
  check_flags(who, "idle", idle_tensor, span_count);
  if (applied) check_flags(who, "applied", *applied, span_count);
  const ValueType type = value_type_of(who, dtype);
  const PayloadView view(sent.const_data_ptr<uint8_t>(), check_own_payload(who, "sent", sent, velocity.numel(), type));
  const Spans spans = spans_of(spans_tensor);
  const bool is_void = regtopk::is_void(verdict, sent_round);
  const uint8_t* const idle = idle_tensor.const_data_ptr<uint8_t>();
  const uint8_t* const has_applied = applied ? applied->const_data_ptr<uint8_t>() : nullptr;
  if (is_void && !applied) return;
  with_value_type(type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    Accumulate* const kept = static_cast<Accumulate*>(velocity.mutable_data_ptr());
    torch_parallel_for()(view.layout().tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t base = tile * kTileEntries;
        int64_t span = std::upper_bound(spans.offsets, spans.offsets + span_count, base) - spans.offsets - 1;
        view.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          while (base + offset >= spans.end(span)) ++span;
          const Accumulate value = Traits<T>::load(view.values<T>()[entry]);
          const bool was_applied = idle[span] == 0 && (!is_void || has_applied[span] != 0);
          if (was_applied && is_finite(value) && value != 0) kept[base + offset] = 0;
        });
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("correct_", &correct_cpu);
  library.impl("mask_", &mask_cpu);
}

}  // namespace regtopk
