#pragma once

#include <cstdint>
#include <functional>

namespace regtopk {

// Runs body(begin, end) over [0, count) cut into consecutive ranges, in any order, possibly at the same time. Results
// must not depend on the cut; the caller supplies the threads, so that the core needs none of its own.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>;

inline void serial_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

}  // namespace regtopk
