// The scheme in which one rank, the leader, chooses the entries of all: the traffic does not grow with the number of ranks, and every
// average is over all of them. The leader of step t is rank t mod N.
//
//   choose_or_keep    the leader: compress_ ─► payload ─► message      the others: residual + gradient stay in the residual
//   broadcast         the message up to its values: the support
//   follow            the others: take_ ─► payload ─► message          everybody: a head and a slice of the values for each rank
//   swap              all-to-all ─► received [N, head and slice]
//   average           average_slice_: checks every head, adds up in rank order, divides
//   gather            all-gather ─► averages [N, mark and slice]
//   receive           spread_ ─► the bucket; feedback_
//
// A dense bucket goes the same way without a leader: everybody's support is all of it. Its history ends.
#pragma once

#include <memory>
#include <vector>

#include "../transport/transport.h"
#include "scheme.h"

namespace regtopk::shared_support {

// What a rank sends of a bucket of which a leader chooses k entries, that travel in `wire`; and of one that is dense.
double bytes_of(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire);
double bytes_of_all(const Worker& worker, const Plan& plan);

// In buffers of the plan; the gradient is only read. Makes room for what comes later.
Sent choose_or_keep(Worker& worker, Plan& plan, const at::Tensor& gradient, bool absent = false);

// The rank that chooses in the step under way.
int64_t leader_of(const Worker& worker);
// The part of a message that the leader sends to all, and where the others put it.
at::Tensor support_in(const Worker& worker, const Plan& plan, const Sent& sent);

// These raise ValueError, before anything is written, where the bytes are not what every rank should have sent.
void follow(Worker& worker, Plan& plan, const Sent& sent);
void average(Worker& worker, Plan& plan);
// Writes the average that the first plan has received to `gradient`, and remembers for each receiver what it sent.
void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient);

// All of it, but for `choose_or_keep`, between processes.
std::vector<Transport::Stage> stages(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Sent& sent, const at::Tensor& average);

}  // namespace regtopk::shared_support
