// Sums since construction, of one worker. Bytes are what it puts on the network: (N - 1) payloads per all-gather,
// 2 (N - 1) / N buckets per ring all-reduce. Any thread may read them at any time, without a lock.
#pragma once

#include <atomic>
#include <cstdint>

namespace regtopk {

struct Statistics {
  std::atomic<int64_t> steps = 0, void_steps = 0, rebuilds = 0, history_dropped = 0, residual_dropped = 0;
  std::atomic<int64_t> dense_buckets = 0;  // paused, sparse tensors, or all entries of a bucket
  std::atomic<int64_t> entries = 0, sent_entries = 0;
  std::atomic<double> bytes_sent = 0, bytes_dense = 0, bytes_local = 0;  // the last inside a host, where `bytes_sent` is between hosts
  std::atomic<double> compress_seconds = 0, exchange_seconds = 0, aggregate_seconds = 0;
};

}  // namespace regtopk
