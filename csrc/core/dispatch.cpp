// Which path computes: the one that this machine has kernels for, else the plain one.
#include "plain.h"
#include "simd/aggregate_blocks.h"
#include "simd/compress_bracketed.h"
#include "simd/compress_chunks.h"
#include "simd/kernel_choice.h"

namespace regtopk {

void compress(const CompressArguments& arguments, const ParallelFor& parallel_for) {
  const Kernels* kernels = kernels_for(arguments.layout.type);
  if (kernels == nullptr) compress_plain(arguments, parallel_for);
  else (arguments.chunks ? compress_chunks : compress_bracketed)(arguments, *kernels, parallel_for);
}

bool aggregate(const AggregateArguments& arguments, const ParallelFor& parallel_for) {
  if (const Kernels* kernels = kernels_for(arguments.layout.type)) return aggregate_blocks(arguments, *kernels, parallel_for);
  return aggregate_plain(arguments, parallel_for);
}

}  // namespace regtopk
