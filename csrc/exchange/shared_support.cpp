#include "shared_support.h"

#include <ATen/ops/zeros.h>

namespace regtopk::shared_support {
namespace {

MessageParts parts_of(const Plan& plan) { return message_parts(plan.numel, plan.k(), plan.layout.dtype, span_count(plan), plan.wire()); }

// Entries of a slice: whole words, and the same of every rank.
int64_t slice_entries(const Worker& worker, const Plan& plan) {
  constexpr int64_t kGrain = 4;
  return (plan.k() + worker.workers * kGrain - 1) / (worker.workers * kGrain) * kGrain;
}

void make_room(const Worker& worker, Plan& plan) {
  const auto bytes = plan.residual.options().dtype(at::kByte);
  const MessageParts parts = parts_of(plan);
  const int64_t entries = slice_entries(worker, plan);
  const int64_t row_bytes = parts.head_bytes + entries * parts.value_bytes;
  const int64_t averages_bytes = kMarkBytes + entries * static_cast<int64_t>(c10::elementSize(plan.layout.dtype));
  if (!plan.lead.defined() || plan.lead.numel() != plan.message_bytes()) plan.lead = at::zeros({plan.message_bytes()}, bytes);
  if (!plan.rows.defined() || plan.rows.size(0) != worker.workers || plan.rows.size(1) != row_bytes)
    plan.rows = at::zeros({worker.workers, row_bytes}, bytes);
  reserve(plan.received, {worker.workers, row_bytes}, bytes);
  reserve(plan.slice, {averages_bytes}, bytes);
  reserve(plan.averages, {worker.workers, averages_bytes}, bytes);
  if (worker.options.regularised) reserve(plan.feedback_buffer, {1, plan.k()}, plan.residual.options());
}

bool leads(const Worker& worker) { return leader_of(worker) == worker.rank; }

// The head for every rank, and the values one after the other; of the last ranks there may be none.
void fill_rows(const Plan& plan, const at::Tensor& message) {
  const MessageParts parts = parts_of(plan);
  plan.rows.narrow(1, 0, parts.head_bytes).copy_(message.narrow(0, 0, parts.head_bytes));
  const at::Tensor slices = plan.rows.narrow(1, parts.head_bytes, plan.rows.size(1) - parts.head_bytes);
  const int64_t slice_bytes = slices.size(1), bytes = plan.k() * parts.value_bytes, whole = bytes / slice_bytes;
  const at::Tensor values = message.narrow(0, parts.values_at, bytes);
  slices.narrow(0, 0, whole).copy_(values.narrow(0, 0, whole * slice_bytes).view({whole, slice_bytes}));
  const int64_t rest = bytes - whole * slice_bytes;
  if (rest > 0) slices[whole].narrow(0, 0, rest).copy_(values.narrow(0, whole * slice_bytes, rest));
}

}  // namespace

int64_t leader_of(const Worker& worker) { return worker.steps.step() % worker.workers; }

Sent choose_or_keep(Worker& worker, Plan& plan, const at::Tensor& gradient, bool absent) {
  const Stopwatch watch(worker.statistics.compress_seconds);
  const bool choose = leads(worker);
  const Sent sent = compress(worker, plan, gradient, choose, absent);
  if (choose) write_message(plan, sent);
  make_room(worker, plan);
  return sent;
}

at::Tensor support_in(const Worker& worker, const Plan& plan, const Sent& sent) {
  return (leads(worker) ? sent.message : plan.lead).narrow(0, 0, parts_of(plan).values_at);
}

void follow(Worker& worker, Plan& plan, const Sent& sent) {
  const Stopwatch watch(worker.statistics.compress_seconds);
  if (!leads(worker)) {
    say_who(worker, [&] {
      take_(plan.residual, sent.payload, plan.lead, plan.shared, plan.wire(), plan.layout.dtype, plan.k(), leader_of(worker));
    });
    plan.follows = false;
    write_message(plan, sent);
  }
  fill_rows(plan, sent.message);
}

void average(Worker& worker, Plan& plan) {
  const Stopwatch watch(worker.statistics.aggregate_seconds);
  say_who(worker, [&] {
    average_slice_(
        plan.received, plan.slice, plan.wire(), plan.layout.dtype, plan.numel, plan.k(), span_count(plan), stamp_of(worker, plan));
  });
}

void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient) {
  Worker& worker = receivers.front().worker;
  Plan& plan = receivers.front().plan;
  const Stopwatch watch(worker.statistics.aggregate_seconds);
  say_who(worker, [&] {
    spread_(gradient, receivers.front().payload, plan.received, plan.averages, plan.shared, plan.k(), stamp_of(worker, plan));
  });
  // A broadcast is shared out evenly: in N steps every rank leads once.
  const double share = static_cast<double>(worker.workers - 1) / static_cast<double>(worker.workers);
  const double bytes = share * static_cast<double>(parts_of(plan).values_at) +
                       static_cast<double>((worker.workers - 1) * (plan.rows.size(1) + plan.slice.numel()));
  for (const Receiver& each : receivers) {
    if (&each.plan != &plan) each.plan.shared.idle.copy_(plan.shared.idle);
    at::Tensor feedback;
    if (each.worker.options.regularised) {
      feedback = each.plan.feedback_buffer[0];
      feedback_(
          feedback, each.payload, plan.received, plan.averages, each.plan.shared, plan.layout.dtype, plan.numel,
          selection_of(each.worker, each.plan), stamp_of(each.worker, each.plan));
    }
    remember(each, feedback, bytes);
  }
}

std::vector<Transport::Stage> stages(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Sent& sent, const at::Tensor& gradient) {
  using Kind = Transport::Collective::Kind;
  return {
      {{.kind = Kind::kBroadcast, .input = support_in(*worker, *plan, sent), .root = leader_of(*worker)},
       [worker, plan, sent] { follow(*worker, *plan, sent); }},
      {{.kind = Kind::kSwap, .input = plan->rows, .output = plan->received}, [worker, plan] { average(*worker, *plan); }},
      {{.kind = Kind::kGather, .input = plan->slice, .output = plan->averages},
       [worker, plan, sent, gradient] { receive({{*worker, *plan, sent.payload}}, gradient); }}};
}

}  // namespace regtopk::shared_support
