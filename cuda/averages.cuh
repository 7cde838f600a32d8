// The averages of slices as all workers have sent them, and what the launchers that know them ask of their arguments.
#pragma once

#include "../csrc/core/lead.h"
#include "bucket_spans.cuh"
#include "launch.h"

namespace regtopk {

// The averages of all slices.
template <typename T>
struct Averages {
  Global<const uint8_t> rows, averages;
  uint32_t workers, entries;  // of a slice
  uint64_t row_bytes, averages_bytes;
  int64_t step;

  explicit Averages(const AveragesLaunch& launch)
      : rows(launch.rows),
        averages(launch.averages),
        workers(static_cast<uint32_t>(launch.workers)),
        entries(static_cast<uint32_t>((launch.averages_bytes - kMarkBytes) / static_cast<int64_t>(sizeof(T)))),
        row_bytes(static_cast<uint64_t>(launch.row_bytes)),
        averages_bytes(static_cast<uint64_t>(launch.averages_bytes)),
        step(static_cast<int64_t>(launch.step)) {}

  __device__ Global<const uint8_t> head(uint32_t rank) const { return rows.offset(rank * row_bytes); }
  __device__ Global<const T> slice(uint32_t rank) const {
    return averages.offset(rank * averages_bytes).template at_byte<const T>(kMarkBytes);
  }
  __device__ T load(uint32_t entry) const { return slice(entry / entries).load(entry % entries); }
  __device__ Vector<T> load_vector(uint32_t entry) const { return slice(entry / entries).load_vector(entry % entries); }
  __device__ bool is_of_step(uint32_t rank) const {
    return averages.offset(rank * averages_bytes).template at_byte<const int64_t>(0).load(0) == step + 1;
  }
};

inline bool is_too_large(const PayloadLayout& layout) { return layout.numel > kMaxEntries || layout.spans > kMaxSpans; }

// A multiple of kAlignment.
inline int64_t rounded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

inline DeviceSpans spans_of(const int64_t* ends, const PayloadLayout& layout) {
  return {Global(ends), ends == nullptr ? 0 : static_cast<uint32_t>(layout.spans), static_cast<uint32_t>(layout.numel)};
}

// Of slices that hold k entries together, and whose vectors lie where they can be loaded.
inline bool fit(const AveragesLaunch& received, const PayloadLayout& layout) {
  const int64_t entries = (received.averages_bytes - kMarkBytes) / value_bytes(layout.type);
  return received.workers > 0 && received.workers <= kMaxEntries && entries > 0 && entries <= kMaxEntries &&
         entries % kVectorEntries == 0 && kMarkBytes + entries * value_bytes(layout.type) == received.averages_bytes &&
         entries * received.workers >= layout.k && received.row_bytes % 8 == 0 && !is_misaligned(received.rows) &&
         !is_misaligned(received.averages);
}

}  // namespace regtopk
