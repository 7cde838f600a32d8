#include "scheme.h"

#include <algorithm>
#include <cmath>

#include "shared_support.h"

namespace regtopk {

Selection selection_of(const Worker& worker, const Plan& plan) {
  return {plan.k(), worker.options.mu, worker.options.decay, worker.options.distortion, worker.options.chunk, plan.chunk_k};
}

Stamp stamp_of(const Worker& worker, const Plan& plan) {
  return {worker.steps.step(), plan.hash, plan.round, worker.steps.scale(), worker.deed()};
}

int64_t span_count(const Plan& plan) { return static_cast<int64_t>(plan.layout.spans.size()); }

at::Tensor correct(Worker& worker, Plan& plan, const at::Tensor& gradient, const at::Tensor& room) {
  const Options& options = worker.options;
  if (!options.corrects()) return gradient;
  const Stopwatch watch(worker.statistics.compress_seconds);
  plan.mask();
  const double largest_norm = options.clip_norm * worker.steps.scale() / std::sqrt(static_cast<double>(worker.workers));
  correct_(gradient, room, optional(plan.velocity), plan.shared.spans, {options.momentum, options.nesterov, largest_norm});
  return room;
}

Sent place_for(Plan& plan) {
  const at::Tensor payload = plan.next_payload();
  if (!plan.has_wire_form()) return {payload, payload};
  reserve(plan.message, {plan.message_bytes()}, payload.options());
  return {payload, plan.message};
}

Sent compress(Worker& worker, Plan& plan, const at::Tensor& gradient, bool choose, bool absent) {
  if (absent) {
    plan.settle(worker.report.counters());
    worker.report.counters().select(0, 2).add_(plan.forget());
    plan.shared.idle.fill_(1);
  }
  plan.follows = !choose;
  const Sent sent = place_for(plan);
  compress_(
      gradient, plan.residual, sent.payload, optional(plan.sent), optional(plan.feedback), plan.shared, optional(plan.applied),
      worker.report.counters(), selection_of(worker, plan), stamp_of(worker, plan), plan.sent_round, choose);
  ++plan.times_given;
  if (absent) mark_absent_(sent.payload);
  return sent;
}

void write_message(const Plan& plan, const Sent& sent) {
  if (plan.has_wire_form()) to_wire_(plan.residual, sent.payload, sent.message, plan.wire(), plan.layout.dtype, plan.k(), span_count(plan));
}

double bytes_of_chosen(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire) {
  if (worker.options.leader) return shared_support::bytes_of(worker, plan, k, wire);
  return static_cast<double>((worker.workers - 1) * plan.message_bytes_of(k, wire));
}

std::string plain_text(const std::exception& error) {
  const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
}

void say_who(const Worker& worker, const std::function<void()>& operation) {
  try {
    operation();
  } catch (const c10::ValueError& error) {
    const std::string text = error.what_without_backtrace();
    C10_THROW_ERROR(ValueError, worker.who + text.substr(std::min(text.size(), text.find(':'))));
  }
}

void measure(
    const std::vector<Receiver>& receivers, const at::Tensor& average, const at::Tensor& payloads,
    const std::function<double(int64_t k)>& bytes_of) {
  const Receiver& first = receivers.front();
  if (!first.worker.options.adaptive) return;
  Number& squared_norm = first.plan.squared_norm;
  measure_(average, payloads, squared_norm.there(), first.plan.k(), span_count(first.plan));
  squared_norm.send();
  for (const Receiver& each : receivers) each.worker.measure(each.plan, squared_norm, bytes_of);
}

void remember(const Receiver& receiver, const at::Tensor& feedback, double bytes) {
  const auto& [worker, plan, payload] = receiver;
  plan.remember(payload, feedback, plan.round);
  worker.steps.clock().note_end(plan.layout.device, plan.round);
  const double gradient_bytes = static_cast<double>(plan.numel) * static_cast<double>(c10::elementSize(plan.layout.dtype));
  Statistics& statistics = worker.statistics;
  statistics.entries += plan.numel;
  statistics.sent_entries += plan.k();
  statistics.bytes_sent += bytes;
  statistics.bytes_dense += 2.0 * static_cast<double>(worker.workers - 1) / static_cast<double>(worker.workers) * gradient_bytes;
}

void fail(Worker& worker, Plan& plan, const at::Tensor& payload) {
  worker.steps.clock().make_void(plan.round);
  worker.begin_measuring_anew();  // other ranks may know more of the step
  if (plan.follows) {
    plan.forget();
    plan.shared.idle.zero_();
    return;
  }
  plan.remember(payload, at::Tensor(), plan.round);
  plan.in_vain = true;
}

}  // namespace regtopk
