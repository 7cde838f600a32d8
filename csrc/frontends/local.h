// N workers in one process, on the same kernels and in the same order as N processes under DDP: for simulations, and as
// the twin that a distributed run must equal bit for bit. Its transport is a tensor: every worker's payload is a row.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "../exchange/scheme.h"

namespace regtopk {

class LocalExchange {
 public:
  LocalExchange(Options options, int64_t workers);

  // gradients[worker][parameter], of equal shapes for all workers; buckets[i] lists the parameters of bucket i in the
  // order in which their gradients lie in it; all gradients were multiplied by `scale`, and so are the averages. Returns the
  // average of every listed parameter, undefined for others.
  std::vector<at::Tensor> step(
      const std::vector<std::vector<at::Tensor>>& gradients, const std::vector<std::vector<int64_t>>& buckets, double scale);

  Worker& worker(int64_t rank);
  int64_t workers() const { return static_cast<int64_t>(workers_.size()); }
  void skipped();

 private:
  // One bucket of all workers: gradient_of(rank) is flat, in the bucket's order, and may be the caller's own memory.
  void exchange(const Bucket& bucket, const at::Tensor& average, const std::function<at::Tensor(int64_t rank)>& gradient_of);

  // Of each bucket the parameters that the user's rule calls dense, and the others.
  std::vector<std::vector<int64_t>> split_by_rule(
      const std::vector<std::vector<int64_t>>& buckets, const std::vector<at::Tensor>& gradients, std::vector<bool>& dense);

  // The rest of a bucket whose support is shared.
  void swap(const std::vector<Receiver>& receivers, const std::vector<at::Tensor>& messages, const at::Tensor& average);

  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace regtopk
