// What the ranks of a group write of themselves into its store, for the others to read.
//
// A store is served by some process, which may have stopped: it answers nothing then, and its client waits without a limit. So each
// question is asked on a thread of its own, and whoever asks waits so long and no longer.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace regtopk {

class Board {
 public:
  Board(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks, std::chrono::milliseconds limit);

  // These raise what the store raises, and std::runtime_error where it does not answer within the limit; then at once, as long as that
  // answer has not come.
  void write(const std::string& words);
  // What the others have written last, by rank; empty where nothing.
  std::map<int64_t, std::string> read();

 private:
  void ask(std::function<void(c10d::Store& store)> question);

  const c10::intrusive_ptr<c10d::Store> store_;
  const int64_t rank_, ranks_;
  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  std::set<int64_t> have_written_;
  std::shared_future<void> unanswered_;
};

}  // namespace regtopk
