// A stage before those of a bucket, in which the ranks compare what they are about to send.
#pragma once

#include <functional>
#include <vector>

#include "transport.h"

namespace regtopk {

// Gathers a number of each rank and calls check(numbers), by rank: the same on all, so that what it throws is every rank's error. On the CPU.
Transport::Stage compare(int64_t own, int64_t ranks, std::function<void(const std::vector<int64_t>& numbers)> check);

}  // namespace regtopk
