// Finds out, within seconds, why ranks wait for each other in vain.
//
// All ranks go through the same activities in the same order: an agreement, the exchange of a bucket, a save. Where one rank
// alone calls something, ranks wait in different activities with the same number, each for the others, until a timeout that
// says nothing. So a rank that has waited for a while writes into the group's store what it waits in, again and again, and reads what
// the others wait in. A rank that is merely late has written nothing; one whose process has ended writes nothing any more.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "board.h"

namespace regtopk {

class Watch {
 public:
  // `own_calls` says in words what this rank alone may have called, and its step.
  Watch(
      c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks, std::chrono::milliseconds timeout,
      std::function<std::string()> own_calls);

  // How long a wait is ordinary, and how often it is asked about after that.
  std::chrono::milliseconds patience() const { return patience_; }
  std::chrono::milliseconds interval() const { return patience_ / 2; }

  // The number of an activity that begins now.
  int64_t begin();
  // Says that this rank waits in that activity, and returns what contradicts it on another rank, in words; empty if nothing does.
  std::string contradiction(int64_t number, const std::string& activity);
  // Who has never said that it waits in that activity, or in a later one, in words; empty where everybody has. After a timeout; who came
  // to it a moment ago has the time to say so. Once, as gone().
  std::string absent(int64_t number);
  // Where a collective has ended with an error: waits for a sign of life of every other rank, which has the same error or still waits.
  // Returns what contradicts that activity, or else who gives no sign, in words, and tells the others; empty where all do. Once: later
  // answers are the first one.
  std::string gone(int64_t number, const std::string& activity);
  // Says that this rank failed instead of beginning the next activity.
  void announce_failure(const std::string& why);
  // Says that this rank begins no activity any more, and does not end those from `unfinished` on.
  void announce_close(int64_t unfinished);

 private:
  struct Record {
    int64_t number = -1;
    std::string kind = "", text = "", calls = "";
    int64_t failures = 0, beat = 0;
  };
  std::string find_absent(int64_t number);
  static std::optional<Record> parse(const std::string& written);
  void publish(int64_t number, const std::string& kind, const std::string& text);
  // What contradicts that activity among what the others have written.
  std::string look(int64_t number, const std::string& activity, const std::map<int64_t, std::string>& written);
  // Says that this rank waits in that activity.
  void say(int64_t number, const std::string& activity);

  static constexpr int64_t kRemembered = 1000;  // activities: more than are ever pending at once

  const int64_t rank_;
  const std::chrono::milliseconds patience_;
  Board board_;
  const std::function<std::string()> own_calls_;
  std::mutex mutex_;
  int64_t begun_ = 0, beats_ = 0;
  std::map<int64_t, int64_t> failures_;   // of this rank, instead of the activities with those numbers
  Record last_;                           // of this rank; "failed" is of the activity begun_
  std::optional<std::string> absent_, gone_;  // what those have found out
  std::string found_;                     // what contradicts; the record that the others need to see stays as it is then
};

}  // namespace regtopk
