#include "stream.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <thread>
#include <utility>

namespace regtopk {

StreamTransport::StreamTransport(
    c10::intrusive_ptr<c10d::Backend> group, at::DeviceType device_type, std::shared_ptr<GlooTransport> gloo, std::string who)
    : who_(std::move(who)), device_type_(device_type), group_(std::move(group)), gloo_(std::move(gloo)) {}

struct StreamTransport::Course {
  GroupPtr group;
  std::vector<Stage> stages;
  Bucket bucket;
  std::shared_ptr<Ends> ends;
  std::exception_ptr error = nullptr;  // of a `then`

  void fail() {
    bucket.fail();
    const at::Device device = bucket.result.device();
    if (device.is_cpu()) return;
    c10::Event end(device.type());
    end.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    const std::lock_guard lock(ends->mutex);
    ends->events.emplace_back(device, std::move(end));
  }
};

Transport::FuturePtr StreamTransport::exchange(std::vector<Stage> stages, Bucket bucket) {
  const at::Tensor& given = stages.front().collective.input;
  // NCCL adds up no sparse tensors.
  if (given.device().type() != device_type_ || given.is_sparse()) return gloo_->exchange(std::move(stages), std::move(bucket));
  const auto course = std::make_shared<Course>();
  course->stages = std::move(stages);
  course->bucket = std::move(bucket);
  course->ends = ends_;
  FuturePtr arrival;
  try {
    {
      const std::lock_guard lock(mutex_);
      TORCH_CHECK(group_, who_, ": expected an open exchange, got one that was closed");
      course->group = group_;
    }
    arrival = begin(*course->group, course->stages.front().collective)->getFuture();
  } catch (...) {
    course->fail();
    throw;
  }
  const FuturePtr result = follow(course, 0, arrival);
  const std::lock_guard lock(mutex_);
  pending_.push_back(result);
  return result;
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
          try {
            take_in(arrived);
            if (course->error) std::rethrow_exception(course->error);
          } catch (...) {
            course->fail();
            throw;
          }
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
          const Collective& next = course->stages[stage + 1].collective;
          if (course->error) next.input.zero_();
          return follow(course, stage + 1, begin(*course->group, next)->getFuture());
        } catch (...) {
          course->fail();
          throw;
        }
      },
      c10::TensorType::get());
}

void StreamTransport::wait_for(const FuturePtr& future) const {
  const auto deadline = std::chrono::steady_clock::now() + gloo_->timeout();
  while (!future->completed()) {  // on a stream it is
    if (std::chrono::steady_clock::now() >= deadline) {
      C10_THROW_ERROR(
          DistBackendError, c10::str(who_, ": expected no pending exchange within ", gloo_->timeout().count() / 1000, " s, got one"));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void StreamTransport::wait_idle() {
  std::vector<FuturePtr> pending;
  {
    const std::lock_guard lock(mutex_);
    pending.swap(pending_);
  }
  for (const FuturePtr& future : pending) {
    wait_for(future);
    future->wait();  // the current stream waits for what it holds, the host does not
  }
  {
    const std::lock_guard lock(ends_->mutex);
    for (auto& [device, end] : std::exchange(ends_->events, {})) end.block(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  gloo_->wait_idle();
}

void StreamTransport::close() {
  c10::intrusive_ptr<c10d::Backend> group;
  std::vector<FuturePtr> pending;
  {
    const std::lock_guard lock(mutex_);
    group.swap(group_);
    pending.swap(pending_);
  }
  gloo_->close();
}

}  // namespace regtopk
