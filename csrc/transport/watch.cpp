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
  if (last_.kind == "failed") {
    try {
      publish({begun_, "goes on", ""});
    } catch (const std::exception&) {
      // As in contradiction().
    }
  }
  return begun_++;
}

void Watch::publish(const Record& record) {
  last_ = record;
  std::ostringstream lines;
  lines << record.number << '\n' << record.kind << '\n' << own_calls_() << '\n' << failures_ << '\n' << ++beats_ << '\n' << record.text;
  const std::string words = lines.str();
  store_->set("waits/" + std::to_string(rank_), std::vector<uint8_t>(words.begin(), words.end()));
}

std::string Watch::written_by(int64_t other) const {
  const std::string key = "waits/" + std::to_string(other);
  if (!store_->check({key})) return "";
  const std::vector<uint8_t> record = store_->get(key);
  return {record.begin(), record.end()};
}

std::map<int64_t, std::string> Watch::written() const {
  std::map<int64_t, std::string> records;
  for (int64_t other = 0; other < ranks_; ++other) {
    if (other != rank_) records[other] = written_by(other);
  }
  return records;
}

std::string Watch::contradiction(int64_t number, const std::string& activity) {
  try {
    int64_t own_failures = 0;
    {
      const std::lock_guard lock(mutex_);
      if (!found_.empty()) return found_;
      own_failures = failures_;
      const bool is_new = number > last_.number || (number == last_.number && last_.kind == "goes on");
      publish(is_new ? Record{number, "waits", activity} : last_);  // the same again is a sign of life
    }
    for (int64_t other = 0; other < ranks_; ++other) {
      if (other == rank_) continue;
      const std::string record = written_by(other);
      if (record.empty()) continue;
      std::istringstream lines(record);
      std::string its_number, kind, its_calls, its_failures, beat, text;
      for (std::string* line : {&its_number, &kind, &its_calls, &its_failures, &beat}) std::getline(lines, *line);
      std::getline(lines, text, '\0');
      const bool has_lost = kind == "lost";
      if (!has_lost && (its_number != std::to_string(number) || kind == "goes on")) continue;
      if (kind == "waits" && text == activity) continue;
      if (kind == "failed" && std::stoll(its_failures) <= own_failures) continue;  // as this rank did; it has not gone on yet
      std::ostringstream words;
      if (has_lost) {
        words << text;
      } else {
        words << "rank " << other << (kind == "failed" ? " failed: " : " in ") << text << " (after " << its_calls << "), and rank " << rank_
              << " in " << activity << " (after " << own_calls_() << "); make the same calls on every rank";
      }
      const std::lock_guard lock(mutex_);
      found_ = words.str();
      return found_;
    }
  } catch (const std::exception&) {
    // Without a store there is no more to find out than that nobody answers.
  }
  return "";
}

std::string Watch::absent(int64_t number) {
  std::string ranks;
  try {
    for (const auto& [other, record] : written()) {
      if (!record.empty() && std::stoll(record) >= number) continue;
      ranks += (ranks.empty() ? "; rank " : ", ") + std::to_string(other);
    }
  } catch (const std::exception&) {
    return "";  // as in contradiction()
  }
  return ranks.empty() ? "" : ranks + " has not come to it";
}

std::string Watch::gone(int64_t number, const std::string& activity) {
  {
    const std::lock_guard lock(mutex_);
    if (gone_) return *gone_;
  }
  const auto until = std::chrono::steady_clock::now() + patience_ + interval();  // who began to wait a moment later says so by then
  std::string found;
  try {
    const std::map<int64_t, std::string> before = written();
    std::map<int64_t, std::string> silent = before;
    while (true) {
      found = contradiction(number, activity);
      for (const auto& [other, record] : written()) {
        if (record != before.at(other)) silent.erase(other);
      }
      if (!found.empty() || silent.empty() || std::chrono::steady_clock::now() >= until) break;
      std::this_thread::sleep_for(interval() / 2);
    }
    if (found.empty() && !silent.empty()) {
      for (const auto& [other, record] : silent) found += (found.empty() ? "rank " : ", ") + std::to_string(other);
      found = silent.size() == 1 ? found + " has said nothing since and may have ended"
                                 : "one of " + found + ", which have said nothing since, may have ended";
      const std::lock_guard lock(mutex_);
      found_ = found;
      publish({number, "lost", found});
    }
  } catch (const std::exception&) {
    if (found.empty()) found = "no answer of the group's store; the process that serves it, rank 0 as a rule, may have ended";
  }
  const std::lock_guard lock(mutex_);
  gone_ = found;
  return found;
}

void Watch::announce_failure(const std::string& why) {
  try {
    const std::lock_guard lock(mutex_);
    ++failures_;
    publish({begun_, "failed", why});
  } catch (const std::exception&) {
    // The others will find out by their timeout.
  }
}

}  // namespace regtopk
