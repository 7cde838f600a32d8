// The scheme of hosts: the ranks of a host send what their mean is, each a part of it, so that a bucket leaves a host once.
//
//   split_            the gradient ─► rows [ranks of the host, head and part of each parameter]
//   swap, in the host              ─► their mean, of this rank's part: added up in rank order
//   own_support       the mean is this part's gradient: compress_, all-gather among the ranks of one place on their hosts, aggregate_
//   gather, in the host            ─► averages [ranks of the host, head and part]
//   join_             the bucket; judges all of it
//
// A device, which nobody waits for, makes a mean or a bucket of NaN where a head is not valid, and marks what the rank sends after it, so that
// no rank of the job takes the step for a good one: ops/library.cpp. What it has found is told by ranks of the job: describe_statuses.
//
// A part of a parameter is the same whatever bucket the parameter is in, so that what is kept of it stays where it is when DDP
// regroups its buckets; residual, history and idleness are a part's own.
#pragma once

#include <memory>
#include <vector>

#include "../transport/transport.h"
#include "scheme.h"

namespace regtopk::two_levels {

struct Way {
  std::vector<Transport::Stage> stages;
  std::function<void()> fail;
};

// All of it, for a bucket of that layout; the gradient is only read, before this returns.
Way way(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Layout& whole, const at::Tensor& gradient,
    const at::Tensor& average);

}  // namespace regtopk::two_levels
