// The scheme in which every rank chooses its own entries and all ranks add up everybody's: Top-k and RegTop-k.
//
//   front end         sparse_hook or attach, LocalExchange        what a bucket is, and whose
//      │  Bucket
//      ▼
//   Worker::enter     begins a step? which plan? ── new layout ─► Store::make
//      │  Plan
//      ▼
//   send              compress_ ─► payload: settles the last step (void, idle), accumulates, selects, packs
//      │  payload     to_wire_  ─► message: narrower values, a shorter index code; else the payload is the message
//      ▼
//   transport         all-gather ─► received [N, bytes]           who issues it, in which order, on which thread
//      │
//      ▼
//   receive           from_wire_ ─► payloads
//                     aggregate_ ─► the bucket: checks every payload, adds in rank order, divides by N, judges, feeds back
//
// The host never looks at what a tensor holds: header, scale, bits of idle parameters and verdict are the operators' to write
// and read, in tensors on the bucket's device.
#pragma once

#include <memory>
#include <vector>

#include "../transport/transport.h"
#include "scheme.h"

namespace regtopk::own_support {

// In buffers of the plan; the gradient is only read.
Sent send(Worker& worker, Plan& plan, const at::Tensor& gradient, bool absent = false);

// Buffers of the plan for what is received: messages of all workers, and `rows` of feedback. Made once, on the thread and the
// stream of the front end.
void make_room(const Worker& worker, Plan& plan, int64_t rows);

// Writes the average of what the first plan has received to `gradient`, and remembers for each receiver, of consecutive
// ranks, what it sent. ValueError, before anything is written, where the bytes are not what every rank should have sent; a device lowers
// `status`.
void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient, const at::Tensor& status);

// All of it, but for `send`, between processes.
std::vector<Transport::Stage> stages(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Sent& sent, const at::Tensor& average);

}  // namespace regtopk::own_support
