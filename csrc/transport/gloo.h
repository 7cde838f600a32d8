// Collectives on gloo, on process groups of the exchange's own.
//
//   hook call, autograd's thread:   issues the collective; the future of its result
//   completer's thread:             it has arrived -> finish -> the future is complete
//
// gloo matches collectives by the order in which they are issued, and messages of unequal size on one group, as when ranks
// disagree, end the process: so payloads and dense sums have a group that nobody else uses, what ranks compare beforehand has
// another, and collectives are issued by the hook call alone, in bucket order, never by a callback.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include "completer.h"
#include "transport.h"
#include "watch.h"

namespace regtopk {

// The rows of `output`, the inputs of all ranks.
c10::intrusive_ptr<c10d::Work> all_gather(c10d::Backend& group, const at::Tensor& output, const at::Tensor& input);

class GlooTransport final : public Transport {
 public:
  struct Groups {
    c10::intrusive_ptr<c10d::Backend> payloads, control;
    c10::intrusive_ptr<c10d::Store> store;  // of this exchange alone
    std::chrono::milliseconds timeout{};
  };
  // `who` begins messages of buckets; `own_calls` as for Watch.
  GlooTransport(Groups groups, std::string who, std::function<std::string()> own_calls);
  // Closes; the GIL must not be held.
  ~GlooTransport() override;

  int64_t rank() const override { return rank_; }
  int64_t workers() const override { return workers_; }
  FuturePtr gather(const at::Tensor& payload, const at::Tensor& received, Bucket bucket) override;
  FuturePtr all_reduce(Bucket bucket) override;
  std::vector<std::string> gather_texts(const std::string& own, const std::string& caller, const std::string& activity) override;
  void add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) override;
  void announce_failure(const std::string& why) override { watch_->announce_failure(why); }
  void wait_idle() override;
  void close() override;
  std::chrono::milliseconds timeout() const { return timeout_; }

 private:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  // One of the groups; raises RuntimeError once the transport is closed, DistBackendError once a wait has failed.
  c10::intrusive_ptr<c10d::Backend> open(const c10::intrusive_ptr<c10d::Backend> Groups::* group) const;
  template <typename Collective>
  FuturePtr issue(const char* activity, Bucket bucket, const Collective& collective);
  FuturePtr submit(c10::intrusive_ptr<c10d::Backend> group, const WorkPtr& work, const char* activity, int64_t number, Bucket bucket);
  // Waits for a collective on the control group.
  void wait(const WorkPtr& work, const std::string& caller, const std::string& activity, int64_t number);
  at::Tensor gather_now(const at::Tensor& own, const std::string& caller, const std::string& activity);

  Groups groups_;  // empty once closed, which another thread may do at any time
  mutable std::mutex groups_mutex_;
  const std::chrono::milliseconds timeout_;
  const std::string who_;
  const int64_t rank_, workers_;
  const std::shared_ptr<Watch> watch_;  // shared with pending tasks
  // Why a wait ended in vain, once one has. What it waited for may still come, and would be taken for something newer: the
  // groups are of no use any more.
  struct Failure {
    std::mutex mutex;
    std::string why;
  };
  void refuse_if_failed() const;
  static void note(Failure& failure, const std::string& why);
  const std::shared_ptr<Failure> failure_ = std::make_shared<Failure>();
  Completer completer_;
};

}  // namespace regtopk
