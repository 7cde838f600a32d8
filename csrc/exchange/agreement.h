// Before payloads move, all ranks compare what decides their sizes and their meaning.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace regtopk {

// Named values, in the same order on every rank: the fingerprint, readable so that an error can show both values.
using Fingerprint = std::vector<std::pair<std::string, std::string>>;

// All-gathers the fingerprint, one fixed-size message per rank whatever it holds, and waits for it. Raises ValueError on
// every rank, naming the ranks and their values, unless all are equal; DistBackendError when a rank does not answer in time.
void agree(c10d::ProcessGroup& group, const Fingerprint& fingerprint, std::chrono::milliseconds timeout);

}  // namespace regtopk
