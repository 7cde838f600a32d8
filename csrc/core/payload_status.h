// What a device that cannot raise finds wrong with received payloads, as one number of which the lowest is kept.
#pragma once

#include <cstdint>

#include "value_types.h"

namespace regtopk {

// kPayloadsValid or stage << 40 | rank << 8 | field. As on the CPU the bytes of all ranks are checked first, stage 0, then the
// exchange parts against rank 0's, then step and plan; then what follows from another error: a payload that a rank had no support to
// fill at, or a row made of what was not valid, and last the averages of slices. Within a stage rank by rank.
inline constexpr unsigned long long kPayloadsValid = ~0ull;
enum class PayloadField : uint8_t {
  kHeader = 1,
  kStep = 2,
  kPlan = 3,
  kTileStarts = 4,
  kSupport = 5,
  kDeed = 6,
  kScale = 7,
  kAverages = 8
};
inline constexpr uint32_t kStageOfConsequences = 3;
REGTOPK_HOST_DEVICE constexpr PayloadField field_of(unsigned long long status) { return static_cast<PayloadField>(status & 0xff); }
REGTOPK_HOST_DEVICE constexpr int64_t rank_of(unsigned long long status) { return static_cast<int64_t>(status >> 8 & 0xffffffffu); }
REGTOPK_HOST_DEVICE constexpr uint64_t stage_of(unsigned long long status) { return status >> 40; }

}  // namespace regtopk
