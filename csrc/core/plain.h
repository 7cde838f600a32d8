// The plain paths: any value type, any machine, every pass over memory that the definition asks for. What the fast path of
// simd/ is checked against.
#pragma once

#include "aggregate.h"
#include "compress.h"

namespace regtopk {

void compress_plain(const CompressArguments& arguments, const ParallelFor& parallel_for);
bool aggregate_plain(const AggregateArguments& arguments, const ParallelFor& parallel_for);

}  // namespace regtopk
