// The operators' schemas. Devices register their implementations in files of their own.
//
// Of a bucket with `spans`, int64 [P + 1], the ends of its parameters, a payload has an exchange part, and these small tensors
// on the bucket's device carry what one stage finds out and another acts on, so that nobody waits for the device:
//
//   idle      uint8 [P]  1 where all ranks' gradients were zero in the last step: written by aggregate_, read by compress_
//   verdict   int64 [4096] round r is void where entry r % 4096 holds r: written by aggregate_ and judge_, read by compress_
//   applied   uint8 [P]  1 where an optimizer has applied what was sent although the round was void
//   counters  int64 [3]  sums of repeated, displaced, and history entries that ended early
//
// measure_ writes the squared 2-norm of what aggregate_ or spread_ has written; of payloads that are not valid any number.
//
// Before compress_, correct_ writes to `given`, which may be the gradient, what is given instead of it: clipped to a norm, and with a
// velocity. mask_ sets a velocity to zero where what was sent has been applied.
//
// Between the two a payload may take a narrower form, core/wire.h: to_wire_ writes it, puts what the narrower values leave out
// into the residual and leaves in the payload what the wire carries; from_wire_ makes payloads of the rows received. A row that
// is none becomes one that aggregate_ rejects; on the CPU from_wire_ raises.
//
// Received payloads that are not valid: on the CPU aggregate_ raises. A device, which nobody waits for, makes the result NaN
// and the round void, leaves idle as it was, and lowers `status`, int64 [1], -1 to begin with, to what was found, if that is
// less as an unsigned number (core/payload_status.h): the lowest of all calls.
//
// With a `chunk` every so many consecutive entries send k of their own, `chunk_k`, and the last, fewer ones the rest of `k`.
//
// Of a support that a leader has chosen, core/lead.h, compress_ without `choose` leaves the followers a payload without entries, which
// take_ fills at the leader's support, and of which rows [workers, head and slice] travel. average_slice_ writes a row of averages, 16
// bytes with the step and then those of its slice; spread_ the bucket, of all rows of averages; feedback_ the feedback. Where a device
// finds a lead or a head that is not valid, it goes on with a payload that every receiver rejects, or with averages of no step: so that
// spread_ finds it on every rank, whose result is NaN then and the round void.
//
// Between the ranks of a host travel rows of parts, core/parts.h: split_ writes one for each rank, mean_ the mean of those received, and join_
// the bucket, which it judges, of those that all have; `parts`, int64 [1 + ranks, P + 1], has the ends of the parameters and of their parts in
// each row. `found`, int64 [2], is what a device finds wrong with a bucket in a step: first of the payloads of other hosts, then of the host's
// rows. mean_ writes both, -1 if nothing, aggregate_ lowers the first. Where there is something, what a rank sends next is made of NaN, and
// mark_unfilled_ gives it a flag for which every receiver rejects it, and lowers `status`, of the same two. join_ lowers the second, alone.
#include <torch/library.h>

TORCH_LIBRARY(regtopk, library) {
  library.def(
      "compress_(Tensor gradient, Tensor(a!) residual, Tensor(b!) payload, Tensor? sent, Tensor? feedback, Tensor? spans=None, "
      "Tensor? idle=None, Tensor? verdict=None, Tensor? applied=None, Tensor(c!)? counters=None, *, int k, float mu=1.0, float decay=1.0, "
      "str distortion='previous', int step=0, int plan=0, float scale=1.0, int deed=0, int sent_round=-1, bool trusted=False, "
      "int[]? bracket=None, bool choose=True, int chunk=0, int chunk_k=0) -> ()");
  library.def(
      "aggregate_(Tensor(a!) gradient, Tensor payloads, Tensor(b!)? feedback, Tensor? spans=None, Tensor(c!)? idle=None, "
      "Tensor(d!)? verdict=None, Tensor(e!)? status=None, *, int k, int rank=0, str distortion='previous', int step=0, int plan=0, "
      "int round=-1) -> ()");
  library.def("measure_(Tensor gradient, Tensor payloads, Tensor(a!) squared_norm, *, int k, int spans=0) -> ()");
  library.def(
      "correct_(Tensor gradient, Tensor(a!) given, Tensor(b!)? velocity, Tensor spans, *, float momentum=0.0, bool nesterov=False, "
      "float largest_norm=0.0) -> ()");
  library.def(
      "mask_(Tensor(a!) velocity, Tensor sent, Tensor spans, Tensor idle, Tensor verdict, Tensor? applied, *, ScalarType dtype, "
      "int sent_round) -> ()");
  library.def("judge_(Tensor tensor, Tensor(a!) verdict, *, int round) -> ()");
  library.def(
      "settle_(Tensor(a!) residual, Tensor(b!) sent, Tensor spans, Tensor idle, Tensor verdict, Tensor? applied, Tensor(c!) counters, *, "
      "ScalarType dtype, int sent_round) -> ()");
  library.def("put_back_(Tensor(a!) residual, Tensor payload, *, ScalarType dtype) -> ()");
  library.def(
      "to_wire_(Tensor(a!) residual, Tensor(b!) payload, Tensor(c!) wire, *, ScalarType dtype, ScalarType wire_dtype, bool "
      "elias_fano=False, "
      "int k, int spans=0) -> ()");
  library.def(
      "from_wire_(Tensor wire, Tensor(a!) payloads, *, ScalarType dtype, ScalarType wire_dtype, bool elias_fano=False, int numel, int k, "
      "int spans=0) -> ()");
  library.def(
      "take_(Tensor(a!) residual, Tensor(b!) payload, Tensor lead, Tensor spans, Tensor idle, Tensor(c!)? status=None, *, ScalarType "
      "dtype, "
      "ScalarType wire_dtype, bool elias_fano=False, int k, int leader=0, int step, int plan) -> ()");
  library.def(
      "average_slice_(Tensor rows, Tensor(a!) averages, Tensor(b!)? status=None, *, ScalarType dtype, ScalarType wire_dtype, "
      "bool elias_fano=False, int numel, int k, int spans, int step, int plan) -> ()");
  library.def(
      "spread_(Tensor(a!) gradient, Tensor payload, Tensor rows, Tensor averages, Tensor spans, Tensor(b!) idle, Tensor(c!) verdict, "
      "Tensor(d!)? status=None, *, int k, int step, int round) -> ()");
  library.def(
      "feedback_(Tensor(a!) feedback, Tensor payload, Tensor rows, Tensor averages, Tensor spans, Tensor idle, *, ScalarType dtype, "
      "int numel, str distortion, int step) -> ()");
  library.def("split_(Tensor gradient, Tensor(a!) rows, Tensor parts, *, int step, int plan, float scale=1.0, int deed=0) -> ()");
  library.def(
      "mean_(Tensor rows, Tensor(a!) row, Tensor(b!) found, *, int entries, ScalarType dtype, int step, int plan, float scale=1.0, "
      "int deed=0) -> ()");
  library.def(
      "join_(Tensor rows, Tensor(a!) gradient, Tensor parts, Tensor(b!) verdict, Tensor(c!)? status=None, *, int step, int plan, int "
      "round) "
      "-> ()");
  library.def("mark_unfilled_(Tensor(a!) message, Tensor found, Tensor(b!)? status=None) -> ()");
  library.def("encode(Tensor indices, Tensor values, *, int numel, int step=0, int plan=0, int spans=0) -> Tensor");
  library.def("decode(Tensor payload, *, int numel, int k, ScalarType dtype) -> (Tensor indices, Tensor values)");
}
