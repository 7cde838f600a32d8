#include "stream.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace regtopk {

StreamTransport::StreamTransport(Groups groups, at::DeviceType device_type, std::shared_ptr<GlooTransport> gloo, std::string who)
    : who_(std::move(who)),
      device_type_(device_type),
      groups_{{Among::kAll, std::move(groups.model)}},
      open_(std::move(groups.open)),
      close_(std::move(groups.close)),
      gloo_(std::move(gloo)) {}

struct StreamTransport::Course {
  std::vector<GroupPtr> groups;  // of the stages
  std::vector<Stage> stages;
  Bucket bucket;
  std::shared_ptr<UnderWay> under_way;
  std::exception_ptr error = nullptr;  // of a `then`

  // While others hold them: this may be the thread of one of them, which could not wait for itself.
  void let_go() { groups.clear(); }
  void end() { under_way->end(bucket.result, std::move(bucket.keeps)); }
  void fail() {
    let_go();
    bucket.fail();
    end();
  }
};

std::vector<StreamTransport::GroupPtr> StreamTransport::groups_of(const std::vector<Stage>& stages) {
  const auto find = [this](Among among) {
    const std::lock_guard lock(mutex_);
    TORCH_CHECK(!groups_.empty(), who_, ": expected an open exchange, got one that was closed");
    const auto found = groups_.find(among);
    return found == groups_.end() ? GroupPtr() : found->second;
  };
  std::vector<GroupPtr> groups;
  for (const Stage& stage : stages) {
    const Among among = stage.collective.among;
    GroupPtr group = find(among);
    if (!group) {
      group = (*open_)(static_cast<int64_t>(among));  // without the lock: it takes another language's
      const std::lock_guard lock(mutex_);
      if (!groups_.empty()) groups_.emplace(among, group);
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

Transport::FuturePtr StreamTransport::issue(Course& course, size_t stage) {
  const Collective& collective = course.stages[stage].collective;
  const WorkPtr work = begin(*course.groups[stage], collective);
  if (collective.among != Among::kAll) {
    const std::lock_guard lock(mutex_);
    last_[collective.among] = work;
  }
  return work->getFuture();
}

Transport::FuturePtr StreamTransport::exchange(std::vector<Stage> stages, Bucket bucket) {
  const at::Tensor& given = stages.front().collective.input;
  // NCCL adds up no sparse tensors.
  if (given.device().type() != device_type_ || given.is_sparse()) return gloo_->exchange(std::move(stages), std::move(bucket));
  const auto course = std::make_shared<Course>();
  course->stages = std::move(stages);
  course->bucket = std::move(bucket);
  course->under_way = under_way_;
  under_way_->begin();
  try {
    course->groups = groups_of(course->stages);
    return follow(course, 0, issue(*course, 0));
  } catch (...) {
    course->fail();
    throw;
  }
}

void StreamTransport::also_wait_for(const FuturePtr& future) {
  under_way_->begin();
  future->addCallback([under_way = under_way_](c10::ivalue::Future& done) {
    under_way->end(done.hasError() ? at::Tensor() : done.value().toTensor(), {});
  });
}

Transport::FuturePtr StreamTransport::follow(const std::shared_ptr<Course>& course, size_t stage, const FuturePtr& arrival) {
  const auto take_in = [who = who_, workers = workers(), course, stage](const c10::ivalue::Future& arrived) {
    if (arrived.hasError()) {
      C10_THROW_ERROR(
          DistBackendError, c10::str(
                                who, ": expected the payloads of all ", workers, " ranks of step ", course->bucket.step, ", got ",
                                arrived.tryRetrieveErrorMessage()));
    }
    try {
      if (!course->error) course->stages[stage].then();
    } catch (...) {
      course->error = std::current_exception();
    }
  };
  // Where the backend works on a stream the future is complete as soon as it is issued, and what is behind it runs here and now, on a
  // stream that waits for the collective.
  if (stage + 1 == course->stages.size()) {
    return arrival->then(
        [take_in, course](c10::ivalue::Future& arrived) -> c10::IValue {
          const at::NoGradGuard no_grad;
          course->let_go();
          try {
            take_in(arrived);
            if (course->error) std::rethrow_exception(course->error);
          } catch (...) {
            course->fail();
            throw;
          }
          course->end();
          return course->bucket.result;
        },
        c10::TensorType::get());
  }
  wait_for(arrival);
  return arrival->thenAsync(
      [this, take_in, course, stage](c10::ivalue::Future& arrived) {
        const at::NoGradGuard no_grad;
        try {
          take_in(arrived);
          if (course->error) course->stages[stage + 1].collective.input.zero_();
          return follow(course, stage + 1, issue(*course, stage + 1));
        } catch (...) {
          course->fail();
          throw;
        }
      },
      c10::TensorType::get());
}

void StreamTransport::lost_patience() const {
  C10_THROW_ERROR(DistBackendError, c10::str(who_, ": expected no pending exchange within ", timeout().count() / 1000, " s, got one"));
}

void StreamTransport::wait_for(const FuturePtr& future) const {
  const auto deadline = std::chrono::steady_clock::now() + timeout();
  while (!future->completed()) {  // on a stream it is
    if (std::chrono::steady_clock::now() >= deadline) lost_patience();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void StreamTransport::wait_idle() {
  bool is_closed = false;
  {
    const std::lock_guard lock(mutex_);
    is_closed = groups_.empty();
  }
  // Once it is closed they may never end.
  if (!is_closed && !under_way_->wait(UnderWay::Clock::now() + timeout())) lost_patience();
  under_way_->follow();
  gloo_->wait_idle();
}

void StreamTransport::close() {
  std::map<Among, GroupPtr> groups;
  std::map<Among, WorkPtr> last;
  std::shared_ptr<const std::function<void()>> close_groups;
  {
    const std::lock_guard lock(mutex_);
    groups.swap(groups_);
    last.swap(last_);
    close_groups.swap(close_);
  }
  // Giving a group back waits for its collectives, which never end where a rank is gone: it is left to the end of the process then. No
  // other rank is waited for.
  constexpr std::chrono::seconds kPatience{1};
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  const auto are_done = [&] { return std::all_of(last.begin(), last.end(), [](const auto& each) { return each.second->isCompleted(); }); };
  while (!are_done() && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  under_way_->leave(deadline);
  const bool was_opened = groups.size() > 1, done = are_done();
  groups.clear();
  if (was_opened && done && close_groups) (*close_groups)();
  gloo_->close();
}

}  // namespace regtopk
