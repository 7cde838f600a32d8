// DistributedDataParallel's way in: one bucket in, a future of the averaged bucket out. The only file that knows a GradBucket.
#pragma once

#include <torch/csrc/distributed/c10d/comm.hpp>

#include <functional>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "../exchange/own_support.h"
#include "../transport/transport.h"

namespace regtopk {

class DdpExchange {
 public:
  using FuturePtr = Transport::FuturePtr;
  // What its owner, in another language, supplies; each may take that language's lock.
  struct Owner {
    std::function<std::shared_ptr<Transport>(std::function<std::string()> own_calls)> open;  // at the first use
    std::function<double()> scale;        // what the gradients of the step under way were multiplied by; may be empty
    Worker::AppliedKeys applied;
  };

  DdpExchange(Options options, std::shared_ptr<Clock> clock, Owner owner);
  // Closes; the GIL must not be held.
  ~DdpExchange();

  // Exchanges one bucket. The future holds the bucket's own buffer, filled with the average in place.
  FuturePtr run(c10d::GradBucket& bucket);

  // Dense all-reduce instead of payloads, and back; residuals stay. Takes effect at the next bucket, on all ranks or none.
  void set_dense(bool dense);
  // Says that the last step was not applied: what was sent in it returns.
  void skipped();
  void did(Deed deed) { worker_->did(deed); }

  // The open transport, once nothing is pending on it.
  Transport& transport();
  // The worker, once no bucket is pending.
  Worker& idle_worker();
  Worker& worker() const { return *worker_; }
  bool is_open() const { return transport_ != nullptr; }

  // Fails what is pending, gives the groups back and refuses further buckets. The GIL must not be held. Idempotent.
  void close();

 private:
  Bucket bucket_of(const c10d::GradBucket& ddp_bucket);
  // The plan for the bucket, on which all ranks have agreed; null where it keeps nothing.
  std::shared_ptr<Plan> enter(const Bucket& bucket, const c10d::GradBucket& ddp_bucket);
  void forget_agreements();
  void agree_on(const Bucket& bucket, int64_t hash, bool last);
  bool is_dense() const { return dense_ || worker_->is_dense_step(); }

  // Shared with pending buckets, which may outlive this object by a moment.
  const std::shared_ptr<Worker> worker_;
  std::shared_ptr<Transport> transport_;  // null before the first use, and after close()
  std::mutex open_mutex_;
  Owner owner_;
  bool closed_ = false, dense_ = false;  // paused
  bool dense_step_ = false;              // of the last bucket
  double agreed_density_;                // NaN before the first step of a schedule
  int64_t options_version_ = 0;
  std::unordered_set<int64_t> agreed_;  // layouts and kinds of bucket, hashed, that were agreed on under these options
};

}  // namespace regtopk
