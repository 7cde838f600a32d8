// Sample (K0): a bracket around the k-th largest score, from a few entries of the bucket.
#pragma once

#include "../compress.h"

namespace regtopk {

// Reads about one entry in 64, 65,536 at most in buckets up to 2^29 entries, in sectors of 32 bytes of the residual. The
// positions are a fixed function of the bucket's size. A sector is chosen from each of many equal strata, so that sorted
// gradients and layers of very different scale are covered evenly.
//
// The k-th score lies in [low, high] unless the sample is off by more than five standard deviations; it only costs time
// where it does.
// T is the gradient's type, a 32-bit or 16-bit one.
template <typename T>
Bracket sample_bracket(const CompressArguments& arguments, const ParallelFor& parallel_for);

}  // namespace regtopk
