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

#include "worker.h"

namespace regtopk::own_support {

struct Sent {
  at::Tensor payload;  // to be remembered
  at::Tensor message;  // to be sent
};
// Both in buffers of the plan; the gradient is only read.
Sent send(Worker& worker, Plan& plan, const at::Tensor& gradient);

// The same of a worker that contributes nothing this time: all its residuals wait, its history ends. `zero` is of zeros.
Sent send_nothing(Worker& worker, Plan& plan, const at::Tensor& zero);

// Buffers of the plan for what is received: messages of all workers, and `rows` of feedback. Made once, on the thread and the
// stream of the front end.
void make_room(const Worker& worker, Plan& plan, int64_t rows);

// Who receives: a worker and its plan for the bucket.
struct Receiver {
  Worker& worker;
  Plan& plan;
  at::Tensor payload;  // what it has sent
};

// Writes the average of what the first plan has received to `gradient`, and remembers for each receiver, of consecutive
// ranks, what it sent. ValueError, before anything is written, where the bytes are not what every rank should have sent.
void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient);

// The payload reached nobody: it returns to the residual at the next step, and what the step's other buckets sent with it,
// unless an optimizer steps all the same.
void fail(Worker& worker, Plan& plan, const at::Tensor& payload);

}  // namespace regtopk::own_support
