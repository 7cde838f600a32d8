#include "own_support.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>

namespace regtopk::own_support {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::optional<at::Tensor> optional(const at::Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

Selection selection_of(const Worker& worker, const Plan& plan) {
  return {plan.k(), worker.options.mu, worker.options.decay, worker.options.distortion};
}

int64_t span_count(const Plan& plan) { return static_cast<int64_t>(plan.layout.spans.size()); }

Stamp stamp_of(const Worker& worker, const Plan& plan) {
  return {worker.steps.step(), plan.hash, plan.round, worker.steps.scale(), worker.deed()};
}

}  // namespace

Sent send(Worker& worker, Plan& plan, const at::Tensor& gradient) {
  const Clock::time_point start = Clock::now();
  at::Tensor payload = plan.next_payload();
  compress_(
      gradient, plan.residual, payload, optional(plan.sent), optional(plan.feedback), plan.shared, optional(plan.applied),
      worker.report.counters(), selection_of(worker, plan), stamp_of(worker, plan), plan.sent_round);
  if (plan.has_wire_form()) {
    reserve(plan.message, {plan.message_bytes()}, payload.options());
    to_wire_(plan.residual, payload, plan.message, plan.wire(), plan.layout.dtype, plan.k(), span_count(plan));
  }
  worker.statistics.compress_seconds += seconds_since(start);
  return {payload, plan.has_wire_form() ? plan.message : payload};
}

Sent send_nothing(Worker& worker, Plan& plan, const at::Tensor& zero) {
  plan.settle(worker.report.counters());
  worker.report.counters().select(0, 2).add_(plan.forget());
  plan.shared.idle.fill_(1);
  const Sent sent = send(worker, plan, zero);
  mark_absent_(sent.payload);
  if (plan.has_wire_form()) mark_absent_(sent.message);
  return sent;
}

void make_room(const Worker& worker, Plan& plan, int64_t rows) {
  const auto bytes = plan.residual.options().dtype(at::kByte);
  reserve(plan.received, {worker.workers, plan.message_bytes()}, bytes);
  if (plan.has_wire_form()) reserve(plan.payloads, {worker.workers, plan.payload_bytes()}, bytes);
  else plan.payloads = plan.received;
  if (worker.options.regularised) reserve(plan.feedback_buffer, {rows, plan.k()}, plan.residual.options());
}

void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient) {
  const Clock::time_point start = Clock::now();
  const auto& [worker, plan, payload] = receivers.front();
  const int64_t rows = static_cast<int64_t>(receivers.size());
  try {
    if (plan.has_wire_form())
      from_wire_(plan.received, plan.payloads, plan.wire(), plan.layout.dtype, plan.numel, plan.k(), span_count(plan));
    aggregate_(
        gradient, plan.payloads, optional(plan.feedback_buffer), plan.shared, optional(worker.report.status()), selection_of(worker, plan),
        stamp_of(worker, plan), worker.rank);
  } catch (const c10::ValueError& error) {
    // What the received bytes are not, said by the operator; a user knows the rank and the hook.
    const std::string text = error.what_without_backtrace();
    C10_THROW_ERROR(ValueError, worker.who + text.substr(std::min(text.size(), text.find(':'))));
  }
  const double seconds = seconds_since(start);
  const double gradient_bytes = static_cast<double>(plan.numel) * static_cast<double>(c10::elementSize(plan.layout.dtype));
  for (int64_t row = 0; row < rows; ++row) {
    auto& [each, its_plan, its_payload] = receivers[row];
    its_plan.remember(its_payload, plan.feedback_buffer.defined() ? plan.feedback_buffer[row] : at::Tensor(), its_plan.round);
    if (&its_plan != &plan) its_plan.shared.idle.copy_(plan.shared.idle);
    Statistics& statistics = each.statistics;
    statistics.entries += plan.numel;
    statistics.sent_entries += plan.k();
    statistics.bytes_sent += static_cast<double>((each.workers - 1) * its_plan.message_bytes());
    statistics.bytes_dense += 2.0 * static_cast<double>(each.workers - 1) / static_cast<double>(each.workers) * gradient_bytes;
    statistics.aggregate_seconds += row == 0 ? seconds : 0.0;
  }
}

void fail(Worker& worker, Plan& plan, const at::Tensor& payload) {
  worker.steps.clock().make_void(plan.round);
  plan.remember(payload, at::Tensor(), plan.round);
  plan.in_vain = true;
}

}  // namespace regtopk::own_support
