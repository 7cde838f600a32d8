#pragma once

#include "../aggregate.h"
#include "kernels.h"

namespace regtopk {

// Aggregate block by block in cache, for value types that have kernels. Same bytes as the plain path.
bool aggregate_blocks(const AggregateArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for);

}  // namespace regtopk
