#pragma once

#include "../compress.h"
#include "kernels.h"

namespace regtopk {

// Compress where each chunk of the bucket selects by itself, for value types that have kernels. Same bytes as the plain path.
void compress_chunks(const CompressArguments& arguments, const Kernels& kernels, const ParallelFor& parallel_for);

}  // namespace regtopk
