#pragma once

#include "../compress.h"
#include "kernels.h"

namespace regtopk {

// Compress in one pass over r and g, for value types that have kernels. Same bytes as the plain path.
void compress_bracketed(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for);

}  // namespace regtopk
