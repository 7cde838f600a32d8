#include "dense.h"

namespace regtopk::dense {

double send(const Worker& worker, Plan* plan, const at::Tensor& gradient) {
  if (plan != nullptr) {
    plan->settle(worker.report.counters());
    worker.report.counters().select(0, 2).add_(plan->forget());
  }
  gradient.div_(static_cast<double>(worker.ranks()));
  // Read now: while a sum is under way its values are somebody else's to write.
  const int64_t entries = gradient.is_sparse() ? gradient._values().numel() : gradient.numel();
  return static_cast<double>(entries) * static_cast<double>(gradient.element_size());
}

void receive(Worker& worker, const at::Tensor& sum, double bytes) {
  const at::Tensor values = sum.is_sparse() ? sum._values().contiguous() : sum;
  judge_(values, worker.steps.clock().verdict(values.device()), worker.steps.round());
  worker.steps.clock().note_end(values.device(), worker.steps.round());
  const double ring_bytes = 2.0 * static_cast<double>(worker.ranks() - 1) / static_cast<double>(worker.ranks()) * bytes;
  ++worker.statistics.dense_buckets;
  worker.statistics.entries += values.numel();
  worker.statistics.sent_entries += values.numel();
  worker.statistics.bytes_sent += ring_bytes;
  worker.statistics.bytes_dense += ring_bytes;
}

}  // namespace regtopk::dense
