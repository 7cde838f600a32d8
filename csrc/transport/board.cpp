#include "board.h"

#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace regtopk {
namespace {

std::string key_of(int64_t rank) { return "waits/" + std::to_string(rank); }

}  // namespace

Board::Board(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks, std::chrono::milliseconds limit)
    : store_(std::move(store)), rank_(rank), ranks_(ranks), limit_(limit) {}

void Board::ask(std::function<void(c10d::Store&)> question) {
  const auto silence = [] { throw std::runtime_error("expected an answer of the group's store, got none"); };
  const auto answers = [](const std::shared_future<void>& answer, std::chrono::milliseconds within) {
    return answer.wait_for(within) == std::future_status::ready;
  };
  {
    const std::lock_guard lock(mutex_);
    if (unanswered_.valid() && !answers(unanswered_, std::chrono::milliseconds(0))) silence();
  }
  auto task = std::make_shared<std::packaged_task<void()>>([store = store_, question = std::move(question)] { question(*store); });
  const std::shared_future<void> answer = task->get_future().share();
  std::thread([task = std::move(task)] { (*task)(); }).detach();
  if (!answers(answer, limit_)) {
    const std::lock_guard lock(mutex_);
    unanswered_ = answer;
    silence();
  }
  answer.get();
}

void Board::write(const std::string& words) {
  ask([key = key_of(rank_), record = std::vector<uint8_t>(words.begin(), words.end())](c10d::Store& store) { store.set(key, record); });
}

std::map<int64_t, std::string> Board::read() {
  struct Answer {
    std::map<int64_t, std::string> records;
    std::set<int64_t> have_written;  // to ask for a key that is not there would wait
  };
  const auto answer = std::make_shared<Answer>();  // the asker may be gone by the time it comes
  {
    const std::lock_guard lock(mutex_);
    answer->have_written = have_written_;
  }
  ask([answer, rank = rank_, ranks = ranks_](c10d::Store& store) {
    for (int64_t other = 0; other < ranks; ++other) {
      if (other == rank) continue;
      std::string& record = answer->records[other];
      if (!answer->have_written.contains(other) && !store.check({key_of(other)})) continue;
      const std::vector<uint8_t> words = store.get(key_of(other));
      record.assign(words.begin(), words.end());
      answer->have_written.insert(other);
    }
  });
  const std::lock_guard lock(mutex_);
  have_written_.merge(answer->have_written);
  return std::move(answer->records);
}

}  // namespace regtopk
