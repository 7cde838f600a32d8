#include "watch.h"

#include <algorithm>
#include <sstream>
#include <thread>
#include <utility>

namespace regtopk {

Watch::Watch(
    c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks, std::chrono::milliseconds timeout,
    std::function<std::string()> own_calls)
    : store_(std::move(store)),
      rank_(rank),
      ranks_(ranks),
      patience_(std::min<std::chrono::milliseconds>(std::chrono::seconds(2), timeout / 5)),
      own_calls_(std::move(own_calls)) {}

int64_t Watch::begin() {
  const std::lock_guard lock(mutex_);
  if (std::exchange(failure_announced_, false)) {
    try {
      publish(begun_, "goes on", "");
    } catch (const std::exception&) {
      // As in contradiction().
    }
  }
  return begun_++;
}

void Watch::publish(int64_t number, const std::string& kind, const std::string& text) {
  const std::string record = std::to_string(number) + "\n" + kind + "\n" + own_calls_() + "\n" + text;
  store_->set("waits/" + std::to_string(rank_), std::vector<uint8_t>(record.begin(), record.end()));
}

std::string Watch::contradiction(int64_t number, const std::string& activity) {
  try {
    {
      const std::lock_guard lock(mutex_);
      if (!found_.empty()) return found_;
      if (published_ < number) {
        published_ = number;
        publish(number, "waits", activity);
      }
    }
    for (int64_t other = 0; other < ranks_; ++other) {
      const std::string key = "waits/" + std::to_string(other);
      if (other == rank_ || !store_->check({key})) continue;
      const std::vector<uint8_t> record = store_->get(key);
      std::istringstream lines(std::string(record.begin(), record.end()));
      std::string its_number, kind, its_calls, text;
      std::getline(lines, its_number);
      std::getline(lines, kind);
      std::getline(lines, its_calls);
      std::getline(lines, text, '\0');
      if (its_number != std::to_string(number) || kind == "goes on" || (kind == "waits" && text == activity)) continue;
      std::ostringstream words;
      words << "rank " << other << (kind == "failed" ? " failed: " : " in ") << text << " (after " << its_calls << "), and rank " << rank_
            << " in " << activity << " (after " << own_calls_() << "); make the same calls on every rank";
      const std::lock_guard lock(mutex_);
      found_ = words.str();
      return found_;
    }
  } catch (const std::exception&) {
    // Without a store there is no more to find out than that nobody answers.
  }
  return "";
}

std::string Watch::ranks_before(int64_t number) {
  std::string ranks;
  try {
    for (int64_t other = 0; other < ranks_; ++other) {
      const std::string key = "waits/" + std::to_string(other);
      if (other == rank_) continue;
      if (store_->check({key})) {
        const std::vector<uint8_t> record = store_->get(key);
        if (std::stoll(std::string(record.begin(), record.end())) >= number) continue;
      }
      ranks += (ranks.empty() ? "rank " : ", ") + std::to_string(other);
    }
  } catch (const std::exception&) {
    return "";  // as in contradiction()
  }
  return ranks;
}

std::string Watch::absent(int64_t number) {
  const std::string ranks = ranks_before(number);
  return ranks.empty() ? "" : "; " + ranks + " has not come to it";
}

std::string Watch::gone(int64_t number, const std::string& activity) {
  {
    const std::lock_guard lock(mutex_);
    if (gone_) return *gone_;
  }
  const auto until = std::chrono::steady_clock::now() + patience_;
  std::string found = contradiction(number, activity), silent = ranks_before(number);
  while (found.empty() && !silent.empty() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(patience_ / 10);
    found = contradiction(number, activity);
    silent = ranks_before(number);
  }
  if (found.empty() && !silent.empty()) found = silent + " has said nothing since and may have ended";
  const std::lock_guard lock(mutex_);
  gone_ = found;
  return found;
}

void Watch::announce_failure(const std::string& why) {
  try {
    const std::lock_guard lock(mutex_);
    publish(begun_, "failed", why);
    failure_announced_ = true;
  } catch (const std::exception&) {
    // The others will find out by their timeout.
  }
}

}  // namespace regtopk
