// DistributedDataParallel's way in: one bucket in, a future of the averaged bucket out. The only file that knows a GradBucket.
#pragma once

#include <torch/csrc/distributed/c10d/comm.hpp>

#include "group.h"

namespace regtopk {

// Exchanges one bucket. The future holds the bucket's own buffer, filled with the average in place.
GroupExchange::FuturePtr run(GroupExchange& exchange, c10d::GradBucket& bucket);

}  // namespace regtopk
