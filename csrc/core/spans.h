// What is done span by span: a span is a parameter's part of a bucket. The selection itself knows no spans.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "aggregate.h"
#include "compress.h"
#include "simd/scratch.h"

namespace regtopk {

// offsets [count + 1], ascending from 0 to J: span i holds the entries [offsets[i], offsets[i + 1]).
struct Spans {
  const int64_t* offsets = nullptr;
  int64_t count = 0;

  int64_t begin(int64_t span) const { return offsets[span]; }
  int64_t end(int64_t span) const { return offsets[span + 1]; }
};

// zero[i] = 1 where the gradient is zero, of either sign, in all entries of span i, else 0. Reads a span up to its first
// entry that is not zero.
void find_zero_spans(const void* gradient, ValueType type, const Spans& spans, uint8_t* zero);

// Undoes an own payload for the spans that `returns` names, as put_back() does for all. Returns the entries put back. Where
// `values` are given, the payload's own, it sets those to 0: they can't return twice.
int64_t put_back_spans(
    const PayloadView& sent, void* residual, const Spans& spans, const std::function<bool(int64_t span)>& returns, void* values = nullptr);

// Keeps idle spans out of a selection: while this lives their residual reads 0, so that they score 0 and are sent as 0 if
// at all; at its end it has every bit that it had.
class ParkedSpans {
 public:
  ParkedSpans(void* residual, int64_t accumulate_bytes, const Spans& spans, const uint8_t* idle);
  ~ParkedSpans();
  ParkedSpans(const ParkedSpans&) = delete;
  ParkedSpans& operator=(const ParkedSpans&) = delete;

 private:
  uint8_t* const residual_;
  std::vector<std::pair<int64_t, int64_t>> parked_;  // begin and length in bytes
  Scratch kept_;
};

// The end of an aggregate for idle spans: their average is 0, and their feedback infinite, so that what was sent of them,
// and is about to return, is not regularised.
void clear_idle_spans(const AggregateArguments& arguments, const Spans& spans, const uint8_t* idle);
void clear_idle_feedback(const AggregateArguments& arguments, const Spans& spans, const uint8_t* idle);  // of the two, this alone

// Whether all values are finite.
bool all_finite(const void* values, int64_t numel, ValueType type, const ParallelFor& parallel_for);

}  // namespace regtopk
