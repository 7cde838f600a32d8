#include "gloo.h"

#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

namespace regtopk {
namespace {

using Clock = Completer::Clock;

constexpr const char* kExchange = "the exchange of a bucket's payloads";
constexpr const char* kAllReduce = "the dense all-reduce of a bucket";

}  // namespace

c10::intrusive_ptr<c10d::Work> all_gather(c10d::Backend& group, const at::Tensor& output, const at::Tensor& input) {
  at::Tensor flat = output.view({-1}), sent = input;
// torch 2.14 renamed this function and deprecates the name that earlier versions have; both work.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return group._allgather_base(flat, sent);
#pragma GCC diagnostic pop
}

GlooTransport::GlooTransport(Groups groups, std::string who, std::function<std::string()> own_calls)
    : groups_(std::move(groups)),
      timeout_(groups_.timeout),
      who_(std::move(who)),
      rank_(groups_.payloads->getRank()),
      workers_(groups_.payloads->getSize()),
      watch_(std::make_shared<Watch>(groups_.store, rank_, workers_, timeout_, std::move(own_calls))) {}

GlooTransport::~GlooTransport() { close(); }

void GlooTransport::note(Failure& failure, const std::string& why) {
  const std::lock_guard lock(failure.mutex);
  if (failure.why.empty()) failure.why = why;
}

void GlooTransport::refuse_if_failed() const {
  const std::lock_guard lock(failure_->mutex);
  if (failure_->why.empty()) return;
  C10_THROW_ERROR(
      DistBackendError, c10::str(
                            who_, ": expected a state whose exchanges have all ended, got one of which one failed: ", failure_->why,
                            "; save what it holds and construct a new state"));
}

c10::intrusive_ptr<c10d::Backend> GlooTransport::open(const c10::intrusive_ptr<c10d::Backend> Groups::* group) const {
  refuse_if_failed();
  const std::lock_guard lock(groups_mutex_);
  TORCH_CHECK(groups_.*group, who_, ": expected an open exchange, got one that was closed");
  return groups_.*group;
}

Transport::FuturePtr GlooTransport::gather(const at::Tensor& payload, const at::Tensor& received, Bucket bucket) {
  return issue(kExchange, std::move(bucket), [&](c10d::Backend& group) { return all_gather(group, received, payload); });
}

Transport::FuturePtr GlooTransport::all_reduce(Bucket bucket) {
  std::vector<at::Tensor> tensors{bucket.result};
  return issue(kAllReduce, std::move(bucket), [&](c10d::Backend& group) { return group.allreduce(tensors); });
}

template <typename Collective>
Transport::FuturePtr GlooTransport::issue(const char* activity, Bucket bucket, const Collective& collective) {
  const int64_t number = watch_->begin();
  c10::intrusive_ptr<c10d::Backend> group;
  WorkPtr work;
  try {
    group = open(&Groups::payloads);
    work = collective(*group);
  } catch (...) {
    bucket.fail();
    throw;
  }
  return submit(std::move(group), work, activity, number, std::move(bucket));
}

Transport::FuturePtr GlooTransport::submit(
    c10::intrusive_ptr<c10d::Backend> group, const WorkPtr& work, const char* activity, int64_t number, Bucket bucket) {
  const Clock::time_point issued = Clock::now();
  const FuturePtr arrival = work->getFuture();
  const at::Device device = bucket.result.device();
  const FuturePtr result = c10::make_intrusive<c10::ivalue::Future>(
      c10::TensorType::get(), device.is_cpu() ? std::vector<at::Device>() : std::vector<at::Device>{device});
  const auto complete = [=, who = who_, workers = workers_, timeout = timeout_, watch = watch_, failure = failure_,
                         bucket = std::move(bucket)](Completer::Outcome outcome, const std::string& why) {
    const at::NoGradGuard no_grad;
    const at::OptionalDeviceGuard guard(bucket.result.device());  // on its default stream, which gloo's copies are ordered with
    at::init_num_threads();  // OpenMP has one per thread: take over what torch.set_num_threads set on the user's
    bool finished = false;
    try {
      bucket.count_seconds(std::chrono::duration<double>(Clock::now() - issued).count());
      const auto lost = [&](const std::string& got) {
        note(*failure, got);
        C10_THROW_ERROR(
            DistBackendError, c10::str(
                                  who, ": expected the payloads of all ", workers, " ranks of step ", bucket.step, " within ",
                                  timeout.count() / 1000, " s, got ", got));
      };
      if (outcome == Completer::Outcome::kDoubted) lost(why);
      if (outcome == Completer::Outcome::kTimedOut) lost("none of them complete" + watch->absent(number));
      if (outcome == Completer::Outcome::kStopped) lost("a shutdown of this process");
      if (arrival->hasError()) {
        const std::string contradiction = watch->contradiction(number, activity);
        lost(contradiction.empty() ? arrival->tryRetrieveErrorMessage() : contradiction);
      }
      bucket.finish();
      finished = true;
      result->markCompleted(bucket.result);
    } catch (...) {
      if (!finished) {
        bucket.fail();
        result->setError(std::current_exception());
      }
    }
  };
  const bool taken = completer_.submit(
      {.arrived = [arrival] { return arrival->completed(); },
       .doubt = [watch = watch_, number, activity] { return watch->contradiction(number, activity); },
       .doubt_from = issued + watch_->patience(),
       .doubt_every = watch_->interval(),
       .deadline = issued + timeout_,
       .complete = complete});
  if (!taken) {  // another thread has closed it meanwhile
    complete(Completer::Outcome::kStopped, "");
    group.release();  // as in close()
  }
  arrival->addCallback([wake = completer_.waker()](c10::ivalue::Future&) { wake(); }, /*uses_future=*/false);
  return result;
}

void GlooTransport::wait(const WorkPtr& work, const std::string& caller, const std::string& activity, int64_t number) {
  struct Signal {
    std::mutex mutex;
    std::condition_variable changed;
  };
  const auto signal = std::make_shared<Signal>();
  const FuturePtr arrival = work->getFuture();
  arrival->addCallback(
      [signal](c10::ivalue::Future&) {
        {
          const std::lock_guard lock(signal->mutex);
        }
        signal->changed.notify_all();
      },
      /*uses_future=*/false);
  const Clock::time_point deadline = Clock::now() + timeout_;
  Clock::time_point next = Clock::now() + watch_->patience();
  const auto lost = [&](const std::string& got) {
    note(*failure_, got);
    C10_THROW_ERROR(
        DistBackendError, c10::str(
                              "rank ", rank_, ": ", caller, ": expected all ", workers_, " ranks to come to ", activity, " within ",
                              timeout_.count() / 1000, " s, got ", got));
  };
  std::unique_lock lock(signal->mutex);
  while (!signal->changed.wait_until(lock, std::min(next, deadline), [&] { return arrival->completed(); })) {
    lock.unlock();
    if (const std::string why = watch_->contradiction(number, activity); !why.empty()) lost(why);
    if (Clock::now() >= deadline) lost("none of them complete" + watch_->absent(number));
    next = Clock::now() + watch_->interval();
    lock.lock();
  }
  lock.unlock();
  if (!arrival->hasError()) return;
  // A rank that found out first that it waits in vain has let go of its end; what it waited in says why.
  const std::string why = watch_->contradiction(number, activity);
  lost(why.empty() ? arrival->tryRetrieveErrorMessage() : why);
}

at::Tensor GlooTransport::gather_now(const at::Tensor& own, const std::string& caller, const std::string& activity) {
  const at::Tensor all = at::zeros({workers_, own.numel()}, at::kByte);
  const auto control = open(&Groups::control);
  const int64_t number = watch_->begin();
  wait(all_gather(*control, all, own), caller, activity, number);
  return all;
}

std::vector<std::string> GlooTransport::gather_texts(const std::string& own, const std::string& caller, const std::string& activity) {
  // Nearly every text fits the first message; where one does not, all ranks learn its length from it.
  constexpr int64_t kLength = 8, kFirst = 1024, kLongest = int64_t{1} << 28;
  const auto message_of = [&](int64_t bytes) {
    const at::Tensor message = at::zeros({bytes}, at::kByte);
    uint8_t* const to = message.mutable_data_ptr<uint8_t>();
    const int64_t length = static_cast<int64_t>(own.size());
    std::memcpy(to, &length, kLength);
    std::memcpy(to + kLength, own.data(), static_cast<size_t>(std::min(length, bytes - kLength)));
    return message;
  };
  const auto length_in = [&](const at::Tensor& messages, int64_t other) {
    int64_t length;
    std::memcpy(&length, messages[other].const_data_ptr<uint8_t>(), kLength);
    TORCH_CHECK_VALUE(
        length >= 0 && length <= kLongest, "rank ", rank_, ": expected a text of at most ", kLongest, " bytes of rank ", other, " in ",
        activity, ", got ", length);
    return length;
  };
  at::Tensor all = gather_now(message_of(kFirst), caller, activity);
  int64_t longest = 0;
  for (int64_t other = 0; other < workers_; ++other) longest = std::max(longest, length_in(all, other));
  if (longest > kFirst - kLength) all = gather_now(message_of(longest + kLength), caller, activity);
  std::vector<std::string> texts;
  for (int64_t other = 0; other < workers_; ++other) {
    const int64_t length = std::min(length_in(all, other), all.size(1) - kLength);
    texts.emplace_back(reinterpret_cast<const char*>(all[other].const_data_ptr<uint8_t>()) + kLength, static_cast<size_t>(length));
  }
  return texts;
}

void GlooTransport::add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) {
  std::vector<at::Tensor> tensors{tensor};
  const auto control = open(&Groups::control);
  const int64_t number = watch_->begin();
  wait(control->allreduce(tensors), caller, activity, number);
}

void GlooTransport::wait_idle() {
  if (completer_.wait_idle(Clock::now() + timeout_)) return;
  C10_THROW_ERROR(DistBackendError, c10::str(who_, ": expected no pending exchange within ", timeout_.count() / 1000, " s, got one"));
}

void GlooTransport::close() {
  const bool outstanding = completer_.stop();
  Groups groups;  // let go of without the lock
  {
    const std::lock_guard lock(groups_mutex_);
    std::swap(groups, groups_);
  }
  // Destroying a gloo group waits for its outstanding collectives, which may never end. The process is about to end or the
  // exchange failed: the group is left to the operating system.
  if (outstanding) groups.payloads.release();
  const std::lock_guard lock(failure_->mutex);
  if (!failure_->why.empty()) groups.control.release();
}

}  // namespace regtopk
