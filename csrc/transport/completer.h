// A thread that ends exchanges in the order in which they were begun. It knows no torch: a task is a predicate that says
// whether the payloads have arrived, a deadline, and what to do then.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace regtopk {

class Completer {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Outcome { kArrived, kTimedOut, kDoubted, kStopped };
  struct Task {
    std::function<bool()> arrived;  // cheap; must not block
    std::function<std::string()> doubt = {};  // why it will never arrive, or nothing; asked now and then from `doubt_from` on
    Clock::time_point doubt_from = Clock::time_point::max();
    Clock::duration doubt_every = std::chrono::seconds(1);
    Clock::time_point deadline;
    std::function<void(Outcome, const std::string& why)> complete;  // called once, never throws
  };

  Completer();
  // Stops. Must not be called by a thread that holds a lock which a task needs (in Python: the GIL).
  ~Completer();

  // Takes it; false after stop().
  bool submit(Task task);
  // Wakes the thread to ask `arrived` again. The returned function may outlive the completer.
  std::function<void()> waker() const;
  // Waits until nothing is pending; false if that has not happened by the deadline.
  bool wait_idle(Clock::time_point deadline) const;
  // Completes everything pending with kStopped and ends the thread. Returns the `arrived` of what was ever completed and had not
  // arrived: it may be going on still. Two threads may call it at once.
  std::vector<std::function<bool()>> stop();

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> pending;  // the front one stays while it is being completed
    bool stopping = false;
    std::vector<std::function<bool()>> under_way;  // of what was completed and had not arrived
  };
  static void run(const std::shared_ptr<State>& state);

  std::shared_ptr<State> state_ = std::make_shared<State>();
  std::mutex stop_mutex_;
  std::thread thread_;
};

}  // namespace regtopk
