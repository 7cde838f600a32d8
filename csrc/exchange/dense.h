// The scheme of buckets that are all-reduced as they are: sparse tensors, and everything while the exchange is paused.
// Residuals wait. A result that is not finite makes the round void, for the buckets of other schemes too.
#pragma once

#include "worker.h"

namespace regtopk::dense {

// What the all-reduce is to add up: divides in place, as DDP does without a hook. Returns its number of bytes. `plan` is null
// where nothing is kept; its history ends otherwise.
double send(const Worker& worker, Plan* plan, const at::Tensor& gradient);

// Judges the sum and counts.
void receive(Worker& worker, const at::Tensor& sum, double bytes);

}  // namespace regtopk::dense
