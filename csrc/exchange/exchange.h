// The DDP side: one bucket in, a future of the averaged bucket out.
//
//   hook call, autograd's thread:  layout -> plan -> (first use: agreement) -> compress -> issue the all-gather
//   completer's thread:            payloads arrived -> aggregate in rank order into the bucket -> complete the future
//
// Collectives are issued by the hook call alone, so every rank issues them in bucket order.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include <chrono>
#include <functional>
#include <memory>

#include "completer.h"
#include "worker.h"

namespace regtopk {

class Exchange {
 public:
  using FuturePtr = c10::intrusive_ptr<c10::ivalue::Future>;
  // What the gradients of the step under way were multiplied by; may take a lock of its caller's language.
  using Scale = std::function<double()>;

  // `payload_group` carries payloads and dense all-reduces, `control_group` the fingerprints. Both belong to this
  // exchange: gloo matches collectives by the order in which they are issued, and messages of unequal size on one group,
  // as when ranks disagree, abort the process. Without `scale` the gradients are not scaled.
  Exchange(
      c10::intrusive_ptr<c10d::ProcessGroup> payload_group, c10::intrusive_ptr<c10d::ProcessGroup> control_group, Options options,
      std::chrono::milliseconds timeout, Scale scale);
  // Stops; the GIL must not be held.
  ~Exchange();

  // Exchanges one bucket. The future holds the bucket's own buffer, filled with the average in place.
  FuturePtr run(c10d::GradBucket& bucket);

  // Dense all-reduce instead of payloads, and back; residuals stay. Takes effect at the next bucket, on all ranks or none.
  void set_dense(bool dense);
  bool dense() const { return dense_; }

  // The worker, once no exchange is pending; raises DistBackendError if one still is after the timeout.
  Worker& idle_worker();
  Statistics statistics() const { return worker_->statistics(); }

  // Fails what is pending and refuses further buckets. The GIL must not be held. Idempotent.
  void shutdown();

 private:

  void agree_on(int64_t plan_hash, const Layout& layout, bool last, bool sparse_tensor);
  FuturePtr all_reduce(const at::Tensor& buffer, std::shared_ptr<Plan> plan);
  FuturePtr submit(const c10::intrusive_ptr<c10d::Work>& work, const at::Tensor& buffer, std::function<void()> finish, std::function<void()> fail);

  c10::intrusive_ptr<c10d::ProcessGroup> payload_group_, control_group_;
  const std::chrono::milliseconds timeout_;
  // Shared with pending tasks, which may outlive this object by a moment.
  const std::shared_ptr<Worker> worker_;
  Scale scale_;
  bool dense_ = false;
  int64_t options_version_ = 0;
  std::unordered_set<int64_t> agreed_sparse_tensors_;  // layouts of sparse-tensor buckets that were agreed on
  Completer completer_;
};

}  // namespace regtopk
