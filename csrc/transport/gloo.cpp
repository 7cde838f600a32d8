#include "gloo.h"

#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <list>
#include <mutex>
#include <utility>

namespace regtopk {
namespace {

constexpr const char* kExchange = "the exchange of a bucket's payloads";
constexpr const char* kAllReduce = "the dense all-reduce of a bucket";

// Why a collective has ended with an error. A rank that found out first that it waits in vain has let go of its end: what it waited in
// says why. One whose process has ended says nothing, and gloo's error names nobody. And gloo has the same limit as the deadline, and may
// come first.
std::string reason_of(
    const c10::ivalue::Future& arrival, Watch& watch, int64_t number, const std::string& activity, Completer::Clock::time_point deadline) {
  std::string why = watch.contradiction(number, activity);
  if (!why.empty()) return why;
  why = arrival.tryRetrieveErrorMessage();
  if (Completer::Clock::now() + watch.interval() >= deadline) return why + watch.absent(number);
  const std::string gone = watch.gone(number, activity);
  return gone.empty() ? why : gone + " (" + why + ")";
}

// Gives groups back once all that is under way on them has ended, which it may never: destroying a gloo group waits for that. So it is
// asked about when the next exchange is closed, and what is left at the end of the process is the operating system's.
void give_back_later(std::vector<GlooTransport::GroupPtr> groups, std::vector<std::function<bool()>> under_way) {
  struct Left {
    std::vector<GlooTransport::GroupPtr> groups;
    std::vector<std::function<bool()>> under_way;
  };
  static auto* const all = new std::list<Left>;
  static auto* const mutex = new std::mutex;
  std::list<Left> ended;  // let go of without the lock
  const std::lock_guard lock(*mutex);
  if (!groups.empty()) all->push_back({std::move(groups), std::move(under_way)});
  for (auto each = all->begin(); each != all->end();) {
    const auto left = each++;
    if (std::all_of(left->under_way.begin(), left->under_way.end(), [](const auto& has_ended) { return has_ended(); }))
      ended.splice(ended.end(), *all, left);
  }
}

}  // namespace

c10::intrusive_ptr<c10d::Work> begin(c10d::Backend& group, const Transport::Collective& collective) {
  using Kind = Transport::Collective::Kind;
  at::Tensor input = collective.input, output = collective.output;
  std::vector<at::Tensor> in_place{input};
  switch (collective.kind) {
    case Kind::kGather: {
      at::Tensor flat = output.view({-1});
// torch 2.14 renamed these functions and deprecates the names that earlier versions have; both work.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
      return group._allgather_base(flat, input);
#pragma GCC diagnostic pop
    }
    case Kind::kAllReduce:
      return group.allreduce(in_place);
    case Kind::kBroadcast: {
      c10d::BroadcastOptions options;
      options.rootRank = collective.root;
      return group.broadcast(in_place, options);
    }
    case Kind::kSwap: {
      std::vector<int64_t> equal;
      return group.alltoall_base(output, input, equal, equal);
    }
  }
  return nullptr;
}

GlooTransport::GlooTransport(Groups groups, std::string who, std::function<std::string()> own_calls)
    : groups_(std::move(groups)),
      timeout_(groups_.timeout),
      who_(std::move(who)),
      rank_(groups_.control->getRank()),
      workers_(groups_.control->getSize()),
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

template <typename Pick>
GlooTransport::GroupPtr GlooTransport::open(const Pick& pick) const {
  refuse_if_failed();
  const std::lock_guard lock(groups_mutex_);
  TORCH_CHECK(groups_.control, who_, ": expected an open exchange, got one that was closed");
  return pick(groups_);
}

void GlooTransport::open_stages(const std::vector<Stage>& stages) {
  for (size_t stage = 0; stage < stages.size(); ++stage) {
    const std::pair key(stage, stages[stage].collective.among);
    const auto open_stage = [&] {
      const std::lock_guard lock(groups_mutex_);
      return groups_.stages.contains(key) ? nullptr : groups_.open_stage;
    }();
    if (!open_stage) continue;
    GroupPtr group = (*open_stage)(static_cast<int64_t>(stage), static_cast<int64_t>(key.second));
    const std::lock_guard lock(groups_mutex_);
    if (groups_.control) groups_.stages.emplace(key, std::move(group));
  }
}

Transport::FuturePtr GlooTransport::exchange(std::vector<Stage> stages, Bucket bucket) {
  const auto course = std::make_shared<Course>();
  const Collective& first = std::find_if(stages.begin(), stages.end(), [](const Stage& stage) { return !stage.fails_alike; })->collective;
  course->activity = first.kind == Collective::Kind::kAllReduce ? kAllReduce : kExchange;
  // Ranks of which each takes another for the leader would wait for one another.
  if (first.kind == Collective::Kind::kBroadcast) course->activity += c10::str(" that rank ", first.root, " leads");
  course->number = watch_->begin();
  const at::Device device = bucket.result.device();
  course->result = c10::make_intrusive<c10::ivalue::Future>(
      c10::TensorType::get(), device.is_cpu() ? std::vector<at::Device>() : std::vector<at::Device>{device});
  course->stages = std::move(stages);
  course->bucket = std::move(bucket);
  if (course->stages.size() > 1) unfinished_->add(course->number);
  try {
    open_stages(course->stages);
    issue(course, 0);
  } catch (...) {
    unfinished_->remove(course->number);
    course->bucket.fail();
    throw;
  }
  return course->result;
}

void GlooTransport::Unfinished::add(int64_t number) {
  const std::lock_guard lock(mutex_);
  numbers_.insert(number);
}

void GlooTransport::Unfinished::remove(int64_t number) {
  const std::lock_guard lock(mutex_);
  numbers_.erase(number);
}

int64_t GlooTransport::Unfinished::first() const {
  const std::lock_guard lock(mutex_);
  return numbers_.empty() ? std::numeric_limits<int64_t>::max() : *numbers_.begin();
}

void GlooTransport::announce_close() { watch_->announce_close(unfinished_->first()); }

void GlooTransport::issue(const std::shared_ptr<Course>& course, size_t stage) {
  const Collective& collective = course->stages[stage].collective;
  GroupPtr group = open([&](const Groups& groups) { return groups.stages.at({stage, collective.among}); });
  const WorkPtr work = begin(*group, collective);
  if (stage > 0 && stage + 1 == course->stages.size()) unfinished_->remove(course->number);
  const Completer::Clock::time_point issued = Completer::Clock::now();
  const FuturePtr arrival = work->getFuture();
  const auto complete = [=, weak = weak_from_this(), who = who_, workers = workers_, timeout = timeout_, watch = watch_, failure = failure_,
                         under_way = under_way_, unfinished = unfinished_](Completer::Outcome outcome, const std::string& why) {
    const at::NoGradGuard no_grad;
    const Bucket& bucket = course->bucket;
    const at::OptionalDeviceGuard guard(bucket.result.device());  // on its default stream, which gloo's copies are ordered with
    at::init_num_threads();  // OpenMP has one per thread: take over what torch.set_num_threads set on the user's
    bool finished = false;
    try {
      bucket.count_seconds(std::chrono::duration<double>(Completer::Clock::now() - issued).count());
      const auto lost = [&](const std::string& got) {
        note(*failure, got);
        C10_THROW_ERROR(
            DistBackendError, c10::str(
                                  who, ": expected the payloads of all ", workers, " ranks of step ", bucket.step, " within ",
                                  timeout.count() / 1000, " s, got ", got));
      };
      if (outcome == Completer::Outcome::kDoubted) lost(why);
      if (outcome == Completer::Outcome::kTimedOut) lost("none of them complete" + watch->absent(course->number));
      if (outcome == Completer::Outcome::kStopped) lost("a shutdown of this process");
      if (arrival->hasError()) lost(reason_of(*arrival, *watch, course->number, course->activity, issued + timeout));
      try {
        if (!course->error) course->stages[stage].then();
      } catch (...) {
        course->error = std::current_exception();
      }
      if (course->error && course->stages[stage].fails_alike) std::rethrow_exception(course->error);
      if (stage + 1 < course->stages.size()) {
        if (course->error) course->stages[stage + 1].collective.input.zero_();
        const auto transport = weak.lock();
        if (!transport) lost("a shutdown of this process");
        transport->issue(course, stage + 1);
        return;
      }
      if (course->error) std::rethrow_exception(course->error);
      finished = true;
      under_way->note(bucket.result, bucket.keeps);
      course->result->markCompleted(bucket.result);
    } catch (...) {
      if (!finished) {
        unfinished->remove(course->number);
        bucket.fail();
        under_way->note(bucket.result, bucket.keeps);
        course->result->setError(std::current_exception());
      }
    }
  };
  const bool taken = completer_.submit(
      {.arrived = [arrival] { return arrival->completed(); },
       .doubt = [watch = watch_, course] { return watch->contradiction(course->number, course->activity); },
       .doubt_from = issued + watch_->patience(),
       .doubt_every = watch_->interval(),
       .deadline = issued + timeout_,
       .complete = complete});
  if (!taken) {  // another thread has closed it meanwhile
    complete(Completer::Outcome::kStopped, "");
    give_back_later({std::move(group)}, {[arrival] { return arrival->completed(); }});
  }
  arrival->addCallback([wake = completer_.waker()](c10::ivalue::Future&) { wake(); }, /*uses_future=*/false);
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
  const Completer::Clock::time_point deadline = Completer::Clock::now() + timeout_;
  Completer::Clock::time_point next = Completer::Clock::now() + watch_->patience();
  const auto lost = [&](const std::string& got) {
    note(*failure_, got);
    {
      const std::lock_guard lock(failure_->mutex);
      failure_->under_way.emplace_back([arrival] { return arrival->completed(); });
    }
    C10_THROW_ERROR(
        DistBackendError, c10::str(
                              "rank ", rank_, ": ", caller, ": expected all ", workers_, " ranks to come to ", activity, " within ",
                              timeout_.count() / 1000, " s, got ", got));
  };
  std::unique_lock lock(signal->mutex);
  while (!signal->changed.wait_until(lock, std::min(next, deadline), [&] { return arrival->completed(); })) {
    lock.unlock();
    if (const std::string why = watch_->contradiction(number, activity); !why.empty()) lost(why);
    if (Completer::Clock::now() >= deadline) lost("none of them complete" + watch_->absent(number));
    next = Completer::Clock::now() + watch_->interval();
    lock.lock();
  }
  lock.unlock();
  if (!arrival->hasError()) return;
  lost(reason_of(*arrival, *watch_, number, activity, deadline));
}

at::Tensor GlooTransport::gather_now(const at::Tensor& own, const std::string& caller, const std::string& activity) {
  const at::Tensor all = at::zeros({workers_, own.numel()}, at::kByte);
  const auto control = open([](const Groups& groups) { return groups.control; });
  const int64_t number = watch_->begin();
  wait(begin(*control, {.kind = Collective::Kind::kGather, .input = own, .output = all}), caller, activity, number);
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
  const auto control = open([](const Groups& groups) { return groups.control; });
  const int64_t number = watch_->begin();
  wait(begin(*control, {.kind = Collective::Kind::kAllReduce, .input = tensor}), caller, activity, number);
}

void GlooTransport::wait_idle() {
  if (!completer_.wait_idle(Completer::Clock::now() + timeout_))
    C10_THROW_ERROR(DistBackendError, c10::str(who_, ": expected no pending exchange within ", timeout_.count() / 1000, " s, got one"));
  under_way_->follow();
}

void GlooTransport::close() {
  std::vector<std::function<bool()>> under_way = completer_.stop(), of_control;
  constexpr std::chrono::seconds kPatience{1};
  under_way_->leave(UnderWay::Clock::now() + kPatience);
  Groups groups;  // let go of without the lock
  {
    const std::lock_guard lock(groups_mutex_);
    std::swap(groups, groups_);
  }
  std::vector<GroupPtr> stages, control;
  if (!under_way.empty()) {
    for (auto& [key, group] : groups.stages) stages.push_back(std::move(group));
  }
  {
    const std::lock_guard lock(failure_->mutex);
    of_control = failure_->under_way;
  }
  if (!of_control.empty() && groups.control) control.push_back(std::move(groups.control));
  give_back_later(std::move(stages), std::move(under_way));
  give_back_later(std::move(control), std::move(of_control));
}

}  // namespace regtopk
