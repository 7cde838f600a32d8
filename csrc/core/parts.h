// Parts of parameters, as they travel between the ranks of a host: a row for each rank, with a head and the rank's part of each parameter.
#pragma once

#include <cstdint>

#include "payload.h"

namespace regtopk {

// A host's ranks keep a part each of every parameter: consecutive entries, the same whatever bucket the parameter is in.
struct Part {
  int64_t begin, numel;
};
REGTOPK_HOST_DEVICE inline Part part_of(int64_t numel, int64_t place, int64_t ranks) {
  const int64_t begin = numel * place / ranks;
  return {begin, numel * (place + 1) / ranks - begin};
}

// The head of a row: a header of which magic, step, plan and flags count, and an exchange part. No flag but kFlagUnfilled, which says that
// what the sender made the row of was not valid.
inline constexpr int64_t kPartHeadBytes = sizeof(PayloadHeader) + sizeof(ExchangePart);
REGTOPK_HOST_DEVICE inline PayloadHeader make_part_header(uint64_t step, uint64_t plan) {
  PayloadHeader header{};
  header.magic = kPayloadMagic;
  header.step = step;
  header.plan = plan;
  return header;
}

}  // namespace regtopk
