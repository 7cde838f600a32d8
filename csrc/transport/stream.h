// Collectives of device tensors on the model's own group, in the order of the stream: NCCL, or any backend whose futures carry
// the stream's events. Those of a host's ranks and of one place on the hosts have groups of the same kind.
//
//   hook call, autograd's thread:   issues the collective behind what the stream has to do, and the rest behind the collective
//
// Nothing waits on the host, so that there is no thread and nothing to wake; but between the stages of a bucket for a backend that is no
// work of a stream: its collectives would come out of order otherwise. The model's group is enough: DDP calls the hook in
// bucket order on every rank, from the thread that would issue its own all-reduces on the same group; a communicator of one's
// own would cost its buffers and put a second one in flight beside it. What ranks compare beforehand, and a save, go through
// gloo as ever.
//
// NCCL takes several communicators on one device where every rank issues their collectives in one order, and none waits for room that
// another holds which waits for it. The stages of a bucket follow one another on the stream, and the next bucket's first one is on the
// communicator of this one's last, behind it: of the two of a host and of a place no more than one is ever at work.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "gloo.h"
#include "under_way.h"

namespace regtopk {

class StreamTransport final : public Transport {
 public:
  using GroupPtr = c10::intrusive_ptr<c10d::Backend>;
  struct Groups {
    GroupPtr model;
    // Of other ranks than all, where a bucket first needs it; some kinds wait for them then, NCCL in the first collective. And what
    // gives all of those back, as long as the process goes on.
    std::shared_ptr<const std::function<GroupPtr(int64_t among)>> open;
    std::shared_ptr<const std::function<void()>> close;
  };
  // The groups serve tensors of that type of device; `gloo` takes all else.
  StreamTransport(Groups groups, at::DeviceType device_type, std::shared_ptr<GlooTransport> gloo, std::string who);

  int64_t rank() const override { return gloo_->rank(); }
  int64_t workers() const override { return gloo_->workers(); }
  std::chrono::milliseconds timeout() const override { return gloo_->timeout(); }
  FuturePtr exchange(std::vector<Stage> stages, Bucket bucket) override;
  void also_wait_for(const FuturePtr& future) override;
  std::vector<std::string> gather_texts(const std::string& own, const std::string& caller, const std::string& activity) override {
    return gloo_->gather_texts(own, caller, activity);
  }
  void add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) override {
    gloo_->add_up(tensor, caller, activity);
  }
  void announce_failure(const std::string& why) override { gloo_->announce_failure(why); }
  void announce_close() override { gloo_->announce_close(); }
  void wait_idle() override;
  void close() override;

 private:
  using Among = Collective::Among;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  struct Course;
  // The groups of the stages. RuntimeError once the transport is closed.
  std::vector<GroupPtr> groups_of(const std::vector<Stage>& stages);
  // Issues the collective of a stage.
  FuturePtr issue(Course& course, size_t stage);
  // What is to be done behind `arrival`, that of a stage.
  FuturePtr follow(const std::shared_ptr<Course>& course, size_t stage, const FuturePtr& arrival);
  void wait_for(const FuturePtr& future) const;
  [[noreturn]] void lost_patience() const;

  const std::string who_;
  const at::DeviceType device_type_;
  std::mutex mutex_;
  std::map<Among, GroupPtr> groups_;  // empty once closed
  std::map<Among, WorkPtr> last_;     // on each but the model's
  std::shared_ptr<const std::function<GroupPtr(int64_t among)>> open_;
  std::shared_ptr<const std::function<void()>> close_;
  const std::shared_ptr<UnderWay> under_way_ = std::make_shared<UnderWay>();  // shared with callbacks
  const std::shared_ptr<GlooTransport> gloo_;
};

}  // namespace regtopk
