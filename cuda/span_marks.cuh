// Which parameters' gradients hold more than zeros: found out by all warps, a bit per span.
#pragma once

#include <cstdint>

#include "bucket_spans.cuh"

namespace regtopk {

// A gradient is read up to a first entry that is not zero: of most spans one entry for each block tile that they lie in.
template <typename T>
struct SpanMarks {
  Global<const T> gradient;   // null: there are no marks
  Global<uint32_t> not_zero;  // zero before the first look, and when all words were taken
  uint64_t numel = 0;

  explicit REGTOPK_HOST_DEVICE operator bool() const { return static_cast<bool>(gradient); }

  // As DeviceSpans::for_each calls it.
  __device__ void look(const WarpGroup& warp, uint32_t span, uint32_t from, uint32_t to, bool inside) const {
    bool unknown = inside && !is_known(span);
    if (unknown && !(Traits<T>::load(gradient.load(from)) == 0)) {
      mark(span);
      unknown = false;
    }
    warp.each_lane(unknown, [&](unsigned lane) {
      const bool found = holds_more_than_zero(warp, __shfl_sync(kAllLanes, from, lane), __shfl_sync(kAllLanes, to, lane));
      if (found && warp.rank() == lane) mark(span);
    });
  }

  // Of the spans 32 word ... 32 word + 31, those whose gradient is zero; when all blocks have looked, once.
  __device__ uint32_t take_zero_spans(uint32_t word, uint32_t count) const {
    const uint32_t zero = ~not_zero.load_fresh(word) & bits_between(0, 0, count - word * 32);
    not_zero.store(word, 0);
    return zero;
  }

 private:
  // Another warp may have seen it meanwhile, which spares this one the work.
  __device__ bool is_known(uint32_t span) const { return ((not_zero.load_fresh(span / 32) >> (span % 32)) & 1) != 0; }
  __device__ void mark(uint32_t span) const { not_zero.set_bits(span / 32, 1u << (span % 32)); }

  // Of the gradient's entries [begin, end).
  __device__ bool holds_more_than_zero(const WarpGroup& warp, uint32_t begin, uint32_t end) const {
    constexpr int kLoads = sizeof(T) == 8 ? 2 : 4;
    for (uint64_t first = begin / kVectorEntries * kVectorEntries; first < end; first += kLoads * kWarpThreads * kVectorEntries) {
      Vector<T> vectors[kLoads];
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        const uint64_t at = first + (v * kWarpThreads + warp.rank()) * kVectorEntries;
        if (at + kVectorEntries <= numel && at < end) {
          vectors[v] = gradient.load_vector(at);
        } else {
#pragma unroll
          for (int i = 0; i < kVectorEntries; ++i) vectors[v].entry[i] = at + i < end ? gradient.load(at + i) : T{};
        }
      }
      bool found = false;
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        const uint64_t at = first + (v * kWarpThreads + warp.rank()) * kVectorEntries;
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          found |= at + i >= begin && at + i < end && !(Traits<T>::load(vectors[v].entry[i]) == 0);
        }
      }
      if (__ballot_sync(kAllLanes, found) != 0) return true;
    }
    return false;
  }
};

}  // namespace regtopk
