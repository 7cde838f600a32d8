// What a rank does to its state by itself. All ranks have to do the same; each message says what its sender has done, so that
// a rank that did something alone is found out, and named, by the next exchange.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

namespace regtopk {

enum class Deed : uint8_t { kNone = 0, kReset = 1, kLoad = 2, kPause = 3, kResume = 4, kSkipped = 5, kAborted = 6 };

// All of them, in messages.
inline constexpr const char* kDeeds = "reset, load_state_dict, pause, resume, skipped and abort";

// The number of deeds so far and the last of them, in one word.
constexpr uint64_t next_deed(uint64_t word, Deed deed) { return ((word >> 8) + 1) << 8 | static_cast<uint64_t>(deed); }

inline std::string describe_deed(uint64_t word) {
  constexpr const char* kNames[] = {"no call", "reset()", "load_state_dict()", "pause()", "resume()", "skipped()", "abort()"};
  if (word == 0) return kNames[0];
  const uint64_t last = word & 0xff;
  return std::to_string(word >> 8) + ((word >> 8) == 1 ? " call, " : " calls, the last ") +
         (last < std::size(kNames) ? kNames[last] : "unknown");
}

}  // namespace regtopk
