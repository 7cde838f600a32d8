// Collectives on gloo, on process groups of the exchange's own.
//
//   hook call, autograd's thread:   issues a bucket's first collective; the future of its result
//   completer's thread:             it has arrived -> then -> issues the next one ... -> the future is complete
//
// gloo matches collectives by the order in which they are issued, and messages of unequal size on one group, as when ranks
// disagree, end the process: so each stage of the buckets has a group that nobody else uses, what ranks compare beforehand has
// another, and collectives are issued in bucket order, the first ones by the hook call, later ones by the completer, which takes up
// what has arrived in the order of issue; never by a callback.
//
// No rank waits for one that waits for it: if a rank waits for a later stage of bucket b that another has not issued, that one
// waits for a later stage of a bucket before b, and so on; first stages wait for no completer.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "completer.h"
#include "transport.h"
#include "under_way.h"
#include "watch.h"

namespace regtopk {

c10::intrusive_ptr<c10d::Work> begin(c10d::Backend& group, const Transport::Collective& collective);

class GlooTransport final : public Transport, public std::enable_shared_from_this<GlooTransport> {
 public:
  using GroupPtr = c10::intrusive_ptr<c10d::Backend>;
  using Among = Collective::Among;
  struct Groups {
    std::map<std::pair<size_t, Among>, GroupPtr> stages;  // the first one's of all ranks, to begin with
    GroupPtr control;
    c10::intrusive_ptr<c10d::Store> store;  // of this exchange alone
    std::chrono::milliseconds timeout{};
    // Of another one; waits for the other ranks. Not copied, which may take another language's lock.
    std::shared_ptr<const std::function<GroupPtr(int64_t stage, int64_t among)>> open_stage = nullptr;
  };
  // `who` begins messages of buckets; `own_calls` as for Watch.
  GlooTransport(Groups groups, std::string who, std::function<std::string()> own_calls);
  // Closes; the GIL must not be held.
  ~GlooTransport() override;

  int64_t rank() const override { return rank_; }
  int64_t workers() const override { return workers_; }
  std::chrono::milliseconds timeout() const override { return timeout_; }
  FuturePtr exchange(std::vector<Stage> stages, Bucket bucket) override;
  std::vector<std::string> gather_texts(const std::string& own, const std::string& caller, const std::string& activity) override;
  void add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) override;
  void announce_failure(const std::string& why) override { watch_->announce_failure(why); }
  void announce_close() override;
  void wait_idle() override;
  void close() override;

 private:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  // On its way through its stages.
  struct Course {
    std::vector<Stage> stages;
    Bucket bucket;
    std::string activity;
    int64_t number;  // of the activity
    FuturePtr result;
    std::exception_ptr error = nullptr;  // of a `then`
  };
  // A group, of those that a function picks; raises RuntimeError once the transport is closed, DistBackendError once a wait has failed.
  template <typename Pick>
  GroupPtr open(const Pick& pick) const;
  void open_stages(const std::vector<Stage>& stages);
  void issue(const std::shared_ptr<Course>& course, size_t stage);
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
    std::vector<std::function<bool()>> under_way;  // whether what was waited for on the control group has come by now
  };
  void refuse_if_failed() const;
  static void note(Failure& failure, const std::string& why);
  const std::shared_ptr<Failure> failure_ = std::make_shared<Failure>();
  // Activities of which this rank has stages still to begin.
  class Unfinished {
   public:
    void add(int64_t number);
    void remove(int64_t number);
    int64_t first() const;  // the largest number where there is none

   private:
    mutable std::mutex mutex_;
    std::set<int64_t> numbers_;
  };
  const std::shared_ptr<Unfinished> unfinished_ = std::make_shared<Unfinished>();  // shared with pending tasks
  // What was done to a device's buckets follows on the device's default stream.
  const std::shared_ptr<UnderWay> under_way_ = std::make_shared<UnderWay>();  // shared with pending tasks
  Completer completer_;
};

}  // namespace regtopk
