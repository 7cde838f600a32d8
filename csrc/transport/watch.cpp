#include "watch.h"

#include <algorithm>
#include <sstream>
#include <thread>
#include <utility>

namespace regtopk {
namespace {

constexpr const char* kNoStore = "no answer of the group's store; the process that serves it, rank 0 as a rule, may have ended or stopped";

std::string name(const std::vector<int64_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  return text;
}

}  // namespace

Watch::Watch(
    c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks, std::chrono::milliseconds timeout,
    std::function<std::string()> own_calls)
    : rank_(rank),
      patience_(std::min<std::chrono::milliseconds>(std::chrono::seconds(2), timeout / 5)),
      board_(std::move(store), rank, ranks, patience_),
      own_calls_(std::move(own_calls)) {}

int64_t Watch::begin() {
  const std::lock_guard lock(mutex_);
  if (last_.kind == "failed") {
    try {
      publish(begun_, "goes on", "");
    } catch (const std::exception&) {
      // As in contradiction().
    }
  }
  return begun_++;
}

void Watch::publish(int64_t number, const std::string& kind, const std::string& text) {
  const auto failed = failures_.find(number);
  last_ = {number, kind, text, own_calls_(), failed == failures_.end() ? 0 : failed->second, ++beats_};
  std::ostringstream lines;
  lines << last_.number << '\n' << last_.kind << '\n' << last_.calls << '\n' << last_.failures << '\n' << last_.beat << '\n' << last_.text;
  board_.write(lines.str());
}

std::optional<Watch::Record> Watch::parse(const std::string& written) {
  if (written.empty()) return std::nullopt;
  std::istringstream lines(written);
  std::string number, failures, beat;
  Record record;
  for (std::string* line : {&number, &record.kind, &record.calls, &failures, &beat}) std::getline(lines, *line);
  std::getline(lines, record.text, '\0');
  record.number = std::stoll(number);
  record.failures = std::stoll(failures);
  record.beat = std::stoll(beat);
  return record;
}

void Watch::say(int64_t number, const std::string& activity) {
  const std::lock_guard lock(mutex_);
  if (!found_.empty()) return;
  const bool is_new = number > last_.number || (number == last_.number && last_.kind == "goes on");
  if (is_new) publish(number, "waits", activity);
  else publish(last_.number, last_.kind, last_.text);  // the same again is a sign of life
}

std::string Watch::look(int64_t number, const std::string& activity, const std::map<int64_t, std::string>& written) {
  const std::lock_guard lock(mutex_);
  if (!found_.empty()) return found_;
  const auto failed = failures_.find(number);
  const int64_t own_failures = failed == failures_.end() ? 0 : failed->second;
  for (const auto& [other, words] : written) {
    const std::optional<Record> record = parse(words);
    if (!record) continue;
    const bool has_lost = record->kind == "lost", has_closed = record->kind == "closed" && record->number <= number;
    if (!has_lost && !has_closed && (record->number != number || record->kind == "goes on" || record->kind == "closed")) continue;
    if (record->kind == "waits" && record->text == activity) continue;
    if (record->kind == "failed" && record->failures <= own_failures) continue;  // as this rank did; it has not gone on yet
    found_ = has_lost ? record->text
                      : "rank " + std::to_string(other) +
                            (has_closed                 ? " has closed its state"
                             : record->kind == "failed" ? " failed: "
                                                        : " in ") +
                            record->text + " (after " + record->calls + "), and rank " + std::to_string(rank_) + " in " + activity +
                            " (after " + own_calls_() + "); make the same calls on every rank";
    return found_;
  }
  return "";
}

std::string Watch::contradiction(int64_t number, const std::string& activity) {
  try {
    say(number, activity);
    return look(number, activity, board_.read());
  } catch (const std::exception&) {
    // Without a store there is no more to find out than that nobody answers.
    const std::lock_guard lock(mutex_);
    return found_;
  }
}

std::string Watch::absent(int64_t number) {
  {
    const std::lock_guard lock(mutex_);
    if (absent_) return *absent_;
  }
  const std::string found = find_absent(number);
  const std::lock_guard lock(mutex_);
  absent_ = found;
  return found;
}

std::string Watch::find_absent(int64_t number) {
  const auto until = std::chrono::steady_clock::now() + patience_ + interval();
  try {
    while (true) {
      std::vector<int64_t> ranks;
      for (const auto& [other, words] : board_.read()) {
        const std::optional<Record> record = parse(words);
        if (!record || record->number < number || (record->number == number && record->kind == "failed")) ranks.push_back(other);
      }
      if (ranks.empty()) return "";
      if (std::chrono::steady_clock::now() >= until) return "; " + name(ranks) + (ranks.size() == 1 ? " has" : " have") + " not come to it";
      std::this_thread::sleep_for(interval() / 2);
    }
  } catch (const std::exception&) {
    return std::string("; ") + kNoStore;
  }
}

std::string Watch::gone(int64_t number, const std::string& activity) {
  {
    const std::lock_guard lock(mutex_);
    if (gone_) return *gone_;
  }
  const auto until = std::chrono::steady_clock::now() + patience_ + interval();  // who began to wait a moment later says so by then
  std::string found;
  try {
    const std::map<int64_t, std::string> before = board_.read();
    std::map<int64_t, std::string> silent = before;
    while (true) {
      say(number, activity);
      const std::map<int64_t, std::string> written = board_.read();
      found = look(number, activity, written);
      for (const auto& [other, record] : written) {
        if (record != before.at(other)) silent.erase(other);
      }
      if (!found.empty() || silent.empty() || std::chrono::steady_clock::now() >= until) break;
      std::this_thread::sleep_for(interval() / 2);
    }
    if (found.empty() && !silent.empty()) {
      std::vector<int64_t> ranks;
      for (const auto& [other, record] : silent) ranks.push_back(other);
      found = ranks.size() == 1 ? name(ranks) + " has said nothing since and may have ended"
                                : "one of " + name(ranks) + ", which have said nothing since, may have ended";
      const std::lock_guard lock(mutex_);
      found_ = found;
      publish(number, "lost", found);
    }
  } catch (const std::exception&) {
    if (found.empty()) found = kNoStore;
  }
  const std::lock_guard lock(mutex_);
  gone_ = found;
  return found;
}

void Watch::announce_failure(const std::string& why) {
  try {
    const std::lock_guard lock(mutex_);
    failures_.erase(failures_.begin(), failures_.lower_bound(begun_ - kRemembered));
    ++failures_[begun_];
    publish(begun_, "failed", why);
  } catch (const std::exception&) {
    // The others will find out by their timeout.
  }
}

void Watch::announce_close(int64_t unfinished) {
  try {
    const std::lock_guard lock(mutex_);
    if (begun_ > 0 && found_.empty() && last_.kind != "failed") publish(std::min(begun_, unfinished), "closed", "");
  } catch (const std::exception&) {
    // As in announce_failure().
  }
}

}  // namespace regtopk
