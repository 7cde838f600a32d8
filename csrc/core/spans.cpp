#include "spans.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

namespace regtopk {
namespace {

template <typename Bits>
bool all_zero(const Bits* bits, int64_t numel) {
  constexpr int64_t kBlock = 256;  // short enough to stop early, long enough for vectors
  for (int64_t begin = 0; begin < numel; begin += kBlock) {
    Bits any = 0;
    for (int64_t i = begin; i < std::min(begin + kBlock, numel); ++i) any |= static_cast<Bits>(bits[i] << 1);  // -0 is zero
    if (any != 0) return false;
  }
  return true;
}

}  // namespace

void find_zero_spans(const void* gradient, ValueType type, const Spans& spans, uint8_t* zero) {
  with_value_type(type, [&]<typename T>(T) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    const Bits* const bits = static_cast<const Bits*>(gradient);
    for (int64_t i = 0; i < spans.count; ++i) zero[i] = all_zero(bits + spans.begin(i), spans.end(i) - spans.begin(i)) ? 1 : 0;
  });
}

int64_t put_back_spans(
    const PayloadView& sent, void* residual, const Spans& spans, const std::function<bool(int64_t span)>& returns, void* to_clear) {
  int64_t count = 0;
  with_value_type(sent.layout().type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    Accumulate* const kept = static_cast<Accumulate*>(residual);
    const T* const values = sent.values<T>();
    for (int64_t span = 0; span < spans.count; ++span) {
      if (spans.begin(span) == spans.end(span) || !returns(span)) continue;
      const int64_t first = sent.entry_at(spans.begin(span)), last = sent.entry_at(spans.end(span));
      if (first == last) continue;
      for (int64_t tile = spans.begin(span) / kTileEntries; tile <= (spans.end(span) - 1) / kTileEntries; ++tile) {
        sent.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          const Accumulate value = Traits<T>::load(values[entry]);
          if (entry < first || entry >= last || !is_finite(value) || value == 0) return;
          kept[tile * kTileEntries + offset] += value;
          ++count;
        });
      }
      if (to_clear != nullptr) std::memset(static_cast<T*>(to_clear) + first, 0, static_cast<size_t>(last - first) * sizeof(T));
    }
  });
  return count;
}

ParkedSpans::ParkedSpans(void* residual, int64_t accumulate_bytes, const Spans& spans, const uint8_t* idle)
    : residual_(static_cast<uint8_t*>(residual)) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < spans.count; ++i) {
    if (idle[i] == 0) continue;
    parked_.emplace_back(spans.begin(i) * accumulate_bytes, (spans.end(i) - spans.begin(i)) * accumulate_bytes);
    bytes += parked_.back().second;
  }
  if (bytes == 0) return;
  kept_ = Scratch(bytes);
  uint8_t* to = kept_.array<uint8_t>();
  for (const auto& [begin, length] : parked_) {
    std::memcpy(to, residual_ + begin, static_cast<size_t>(length));
    std::memset(residual_ + begin, 0, static_cast<size_t>(length));
    to += length;
  }
}

ParkedSpans::~ParkedSpans() {
  const uint8_t* from = parked_.empty() ? nullptr : kept_.array<uint8_t>();
  for (const auto& [begin, length] : parked_) {
    std::memcpy(residual_ + begin, from, static_cast<size_t>(length));
    from += length;
  }
}

void clear_idle_spans(const AggregateArguments& arguments, const Spans& spans, const uint8_t* idle) {
  with_value_type(arguments.layout.type, [&]<typename T>(T) {
    for (int64_t span = 0; span < spans.count; ++span) {
      if (idle[span] == 0 || spans.begin(span) == spans.end(span)) continue;
      std::memset(
          static_cast<T*>(arguments.gradient) + spans.begin(span), 0, static_cast<size_t>(spans.end(span) - spans.begin(span)) * sizeof(T));
    }
  });
  clear_idle_feedback(arguments, spans, idle);
}

void clear_idle_feedback(const AggregateArguments& arguments, const Spans& spans, const uint8_t* idle) {
  const PayloadLayout& layout = arguments.layout;
  with_value_type(layout.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    for (int64_t span = 0; span < spans.count; ++span) {
      if (idle[span] == 0 || spans.begin(span) == spans.end(span)) continue;
      for (int64_t row = 0; arguments.feedback != nullptr && row < arguments.feedback_workers; ++row) {
        const PayloadView payload(arguments.payloads + (arguments.first_feedback_worker + row) * layout.bytes, layout);
        Accumulate* const kept = static_cast<Accumulate*>(arguments.feedback) + row * layout.k;
        std::fill(
            kept + payload.entry_at(spans.begin(span)), kept + payload.entry_at(spans.end(span)),
            std::numeric_limits<Accumulate>::infinity());
      }
    }
  });
}

bool all_finite(const void* values, int64_t numel, ValueType type, const ParallelFor& parallel_for) {
  return with_value_type(type, [&]<typename T>(T) {
    std::atomic<bool> finite = true;
    parallel_for((numel + kTileEntries - 1) / kTileEntries, [&](int64_t begin, int64_t end) {
      const T* const typed = static_cast<const T*>(values);
      bool finite_here = true;
      for (int64_t i = begin * kTileEntries; i < std::min(end * kTileEntries, numel); ++i)
        finite_here &= is_finite(Traits<T>::load(typed[i]));
      if (!finite_here) finite = false;
    });
    return finite.load();
  });
}

}  // namespace regtopk
