// The thread that completes exchanges, pushed from all sides: arrivals from other threads, deadlines that pass, stops with
// tasks pending, wakers that outlive it.
#include <atomic>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/transport/completer.h"
#include "check.h"

namespace {

using regtopk::Completer;
using namespace std::chrono_literals;

// Tasks are completed in the order in which they were submitted, each once, whatever the order of their arrivals.
void run_in_order(uint64_t seed) {
  constexpr int kTasks = 200;
  std::mt19937_64 random(seed);
  std::vector<std::atomic<bool>> arrived(kTasks);
  std::vector<int> order;  // written by the completer's thread alone, read after wait_idle
  std::vector<std::thread> peers;
  {
    Completer completer;
    for (int i = 0; i < kTasks; ++i) {
      completer.submit(
          {.arrived = [&arrived, i] { return arrived[i].load(); },
           .deadline = Completer::Clock::now() + 60s,
           .complete =
               [&order, i](Completer::Outcome outcome, const std::string&) {
                 CHECK(outcome == Completer::Outcome::kArrived);
                 order.push_back(i);
               }});
      if (random() % 4 == 0) {
        peers.emplace_back([&arrived, i, wake = completer.waker()] {
          arrived[i] = true;
          wake();
        });
      } else {
        arrived[i] = true;
        completer.waker()();
      }
    }
    for (std::thread& peer : peers) peer.join();
    CHECK(completer.wait_idle(Completer::Clock::now() + 60s));
    CHECK(order.size() == kTasks);
    for (int i = 0; i < kTasks; ++i) CHECK(order[i] == i);
    CHECK(completer.stop().empty());
  }
}

// What is doubted ends before its deadline, with the reason; what is only late is asked about and then arrives.
void run_with_doubts() {
  Completer completer;
  std::atomic<int> asked = 0, doubted = 0, arrived = 0;
  completer.submit(
      {.arrived = [] { return false; },
       .doubt = [&] { return ++asked < 3 ? "" : "nobody comes"; },
       .doubt_from = Completer::Clock::now() + 1ms,
       .doubt_every = 1ms,
       .deadline = Completer::Clock::now() + 60s,
       .complete = [&](Completer::Outcome outcome,
                       const std::string& why) { doubted += outcome == Completer::Outcome::kDoubted && why == "nobody comes"; }});
  completer.submit(
      {.arrived = [&] { return asked >= 6; },
       .doubt = [&] { return ++asked, ""; },
       .doubt_from = Completer::Clock::now(),
       .doubt_every = 1ms,
       .deadline = Completer::Clock::now() + 60s,
       .complete = [&](Completer::Outcome outcome, const std::string&) { arrived += outcome == Completer::Outcome::kArrived; }});
  CHECK(completer.wait_idle(Completer::Clock::now() + 60s));
  CHECK(doubted == 1 && arrived == 1);
  CHECK(completer.stop().size() == 1);  // something was given up that may still be going on
}

void run_past_the_deadline() {
  Completer completer;
  std::atomic<int> timed_out = 0;
  for (int i = 0; i < 20; ++i) {
    completer.submit(
        {.arrived = [] { return false; },
         .deadline = Completer::Clock::now() + 2ms,
         .complete = [&](Completer::Outcome outcome, const std::string&) { timed_out += outcome == Completer::Outcome::kTimedOut; }});
  }
  CHECK(completer.wait_idle(Completer::Clock::now() + 60s));
  CHECK(timed_out == 20);
}

// Others submit, wait and wake while one stops it.
void stop_among_others() {
  std::function<void()> waker;
  std::atomic<int> submitted = 0, completed = 0;
  {
    Completer completer;
    waker = completer.waker();
    std::vector<std::thread> peers;
    for (int peer = 0; peer < 3; ++peer) {
      peers.emplace_back([&] {
        while (completer.submit(
            {.arrived = [] { return true; },
             .deadline = Completer::Clock::now() + 60s,
             .complete = [&](Completer::Outcome, const std::string&) { ++completed; }})) {
          ++submitted;
          completer.wait_idle(Completer::Clock::now());
          waker();
        }
      });
    }
    while (submitted < 50) std::this_thread::yield();
    completer.stop();
    for (std::thread& peer : peers) peer.join();
  }
  CHECK(submitted == completed);
  waker();
}

void stop_with_tasks_outstanding() {
  Completer completer;
  std::atomic<int> stopped = 0;
  for (int i = 0; i < 5; ++i) {
    completer.submit(
        {.arrived = [] { return false; },
         .deadline = Completer::Clock::now() + 60s,
         .complete = [&](Completer::Outcome outcome, const std::string&) { stopped += outcome == Completer::Outcome::kStopped; }});
  }
  CHECK(completer.stop().size() == 5);
  CHECK(stopped == 5);
}

}  // namespace

int main() {
  for (uint64_t round = 0; round < 20; ++round) {
    run_in_order(round);
    run_past_the_deadline();
    run_with_doubts();
    stop_among_others();
    stop_with_tasks_outstanding();
  }
  std::printf("completer: 20 rounds of arrivals, deadlines and stops\n");
  return 0;
}
