#include "completer.h"

#include <algorithm>

namespace regtopk {

Completer::Completer() : thread_(&Completer::run, state_) {}

Completer::~Completer() { stop(); }

bool Completer::submit(Task task) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->stopping) return false;
    state_->pending.push_back(std::move(task));
  }
  state_->changed.notify_all();
  return true;
}

std::function<void()> Completer::waker() const {
  return [state = state_] {
    // The lock orders the change that the caller made before a waiter's next look.
    {
      const std::lock_guard lock(state->mutex);
    }
    state->changed.notify_all();
  };
}

bool Completer::wait_idle(Clock::time_point deadline) const {
  std::unique_lock lock(state_->mutex);
  return state_->changed.wait_until(lock, deadline, [this] { return state_->pending.empty(); });
}

std::vector<std::function<bool()>> Completer::stop() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  {
    const std::lock_guard lock(stop_mutex_);
    if (thread_.joinable()) {
      // The last owner may be let go of by a task, on the thread itself.
      if (thread_.get_id() == std::this_thread::get_id()) thread_.detach();
      else thread_.join();
    }
  }
  const std::lock_guard lock(state_->mutex);
  return state_->under_way;
}

void Completer::run(const std::shared_ptr<State>& shared) {
  const std::shared_ptr<State> state = shared;
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->changed.wait(lock, [&] { return state->stopping || !state->pending.empty(); });
    if (state->pending.empty()) return;
    Task& task = state->pending.front();  // a deque keeps the front in place while others are added
    const auto decided = [&] { return state->stopping || task.arrived(); };
    std::string why;
    Clock::time_point next_doubt = task.doubt ? task.doubt_from : task.deadline;
    while (!state->changed.wait_until(lock, std::min(next_doubt, task.deadline), decided) && Clock::now() < task.deadline) {
      lock.unlock();
      why = task.doubt();
      lock.lock();
      if (!why.empty()) break;
      next_doubt = Clock::now() + task.doubt_every;
    }
    Outcome outcome = Outcome::kArrived;
    if (!task.arrived()) {
      outcome = state->stopping ? Outcome::kStopped : why.empty() ? Outcome::kTimedOut : Outcome::kDoubted;
      state->under_way.push_back(task.arrived);
    }
    lock.unlock();
    task.complete(outcome, why);
    task = Task{};  // lets go of what it holds before anyone is told that it is done
    lock.lock();
    state->pending.pop_front();
    state->changed.notify_all();
  }
}

}  // namespace regtopk
