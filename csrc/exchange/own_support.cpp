#include "own_support.h"

namespace regtopk::own_support {

Sent send(Worker& worker, Plan& plan, const at::Tensor& gradient, bool absent) {
  const Stopwatch watch(worker.statistics.compress_seconds);
  const Sent sent = compress(worker, plan, gradient, /*choose=*/true, absent);
  write_message(plan, sent);
  return sent;
}

void make_room(const Worker& worker, Plan& plan, int64_t rows) {
  const auto bytes = plan.residual.options().dtype(at::kByte);
  reserve(plan.received, {worker.workers, plan.message_bytes()}, bytes);
  if (plan.has_wire_form()) {
    if (plan.payloads.defined() && plan.payloads.is_alias_of(plan.received)) plan.payloads.reset();  // of a step without
    reserve(plan.payloads, {worker.workers, plan.payload_bytes()}, bytes);
  } else {
    plan.payloads = plan.received;
  }
  if (worker.options.regularised) reserve(plan.feedback_buffer, {rows, plan.k()}, plan.residual.options());
}

void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient, const at::Tensor& status) {
  Worker& worker = receivers.front().worker;
  Plan& plan = receivers.front().plan;
  const Stopwatch watch(worker.statistics.aggregate_seconds);
  say_who(worker, [&] {
    if (plan.has_wire_form())
      from_wire_(plan.received, plan.payloads, plan.wire(), plan.layout.dtype, plan.numel, plan.k(), span_count(plan));
    aggregate_(
        gradient, plan.payloads, optional(plan.feedback_buffer), plan.shared, optional(status), selection_of(worker, plan),
        stamp_of(worker, plan), worker.rank);
  });
  measure(receivers, gradient, plan.payloads, [&](int64_t k) { return static_cast<double>(plan.message_bytes_of(k, plan.wire())); });
  for (size_t row = 0; row < receivers.size(); ++row) {
    const Receiver& each = receivers[row];
    if (&each.plan != &plan) each.plan.shared.idle.copy_(plan.shared.idle);
    remember(
        each, plan.feedback_buffer.defined() ? plan.feedback_buffer[static_cast<int64_t>(row)] : at::Tensor(),
        static_cast<double>((worker.workers - 1) * plan.message_bytes()));
  }
}

std::vector<Transport::Stage> stages(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Sent& sent, const at::Tensor& average) {
  make_room(*worker, *plan, /*rows=*/1);
  return {{{Transport::Collective::Kind::kGather, sent.message, plan->received}, [worker, plan, sent, average] {
             receive({{*worker, *plan, sent.payload}}, average, worker->report.status());
           }}};
}

}  // namespace regtopk::own_support
