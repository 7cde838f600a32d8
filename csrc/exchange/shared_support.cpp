#include "shared_support.h"

#include "../core/lead.h"

namespace regtopk::shared_support {
namespace {

MessageParts parts_of(const Plan& plan, int64_t k, const Wire& wire) {
  return message_parts(plan.numel, k, plan.layout.dtype, span_count(plan), wire);
}
MessageParts parts_of(const Plan& plan) { return parts_of(plan, plan.k(), plan.wire()); }

// Entries of a slice: whole words, and the same of every rank.
int64_t slice_entries(const Worker& worker, int64_t k) {
  constexpr int64_t kGrain = 4;
  return (k + worker.workers * kGrain - 1) / (worker.workers * kGrain) * kGrain;
}

// What this rank sends to each, of k entries: a head and a slice of its values; then its averages.
int64_t row_bytes(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire) {
  const MessageParts parts = parts_of(plan, k, wire);
  return parts.head_bytes + slice_entries(worker, k) * parts.value_bytes;
}
int64_t averages_bytes(const Worker& worker, const Plan& plan, int64_t k) {
  return kMarkBytes + slice_entries(worker, k) * static_cast<int64_t>(c10::elementSize(plan.layout.dtype));
}

// Of the two last collectives.
double bytes_of_values(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire) {
  return static_cast<double>((worker.workers - 1) * (row_bytes(worker, plan, k, wire) + averages_bytes(worker, plan, k)));
}

bool has_feedback(const Worker& worker, const Plan& plan) { return worker.options.regularised && !plan.is_dense(); }

void make_room(const Worker& worker, Plan& plan) {
  const auto bytes = plan.residual.options().dtype(at::kByte);
  const int64_t of_row = row_bytes(worker, plan, plan.k(), plan.wire()), of_averages = averages_bytes(worker, plan, plan.k());
  const auto reserve_zeros = [&](at::Tensor& tensor, at::IntArrayRef shape) {
    if (tensor.defined() && tensor.sizes() == shape) return;
    reserve(tensor, shape, bytes);
    tensor.zero_();
  };
  if (!plan.is_dense()) reserve_zeros(plan.lead, {plan.message_bytes()});
  reserve_zeros(plan.rows, {worker.workers, of_row});
  reserve(plan.received, {worker.workers, of_row}, bytes);
  reserve(plan.slice, {of_averages}, bytes);
  reserve(plan.averages, {worker.workers, of_averages}, bytes);
  if (has_feedback(worker, plan)) reserve(plan.feedback_buffer, {1, plan.k()}, plan.residual.options());
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

// A broadcast is shared out evenly: in N steps every rank leads once.
double bytes_of(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire) {
  const double share = static_cast<double>(worker.workers - 1) / static_cast<double>(worker.workers);
  return share * static_cast<double>(parts_of(plan, k, wire).values_at) + bytes_of_values(worker, plan, k, wire);
}

double bytes_of_all(const Worker& worker, const Plan& plan) {
  return bytes_of_values(worker, plan, plan.numel, {plan.layout.dtype, false});
}

Sent choose_or_keep(Worker& worker, Plan& plan, const at::Tensor& gradient, bool absent) {
  const Stopwatch watch(worker.statistics.compress_seconds);
  const bool choose = plan.is_dense() || leads(worker);
  const Sent sent = compress(worker, plan, gradient, choose, absent);
  if (choose) write_message(plan, sent);
  make_room(worker, plan);
  if (plan.is_dense()) fill_rows(plan, sent.message);
  return sent;
}

at::Tensor support_in(const Worker& worker, const Plan& plan, const Sent& sent) {
  return (leads(worker) ? sent.message : plan.lead).narrow(0, 0, parts_of(plan).values_at);
}

void follow(Worker& worker, Plan& plan, const Sent& sent) {
  const Stopwatch watch(worker.statistics.compress_seconds);
  if (!leads(worker)) {
    say_who(worker, [&] {
      take_(
          plan.residual, sent.payload, plan.lead, plan.shared, optional(worker.report.status()), plan.wire(), plan.layout.dtype, plan.k(),
          leader_of(worker), stamp_of(worker, plan));
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
        plan.received, plan.slice, optional(worker.report.status()), plan.wire(), plan.layout.dtype, plan.numel, plan.k(), span_count(plan),
        stamp_of(worker, plan));
  });
}

void receive(const std::vector<Receiver>& receivers, const at::Tensor& gradient) {
  Worker& worker = receivers.front().worker;
  Plan& plan = receivers.front().plan;
  const Stopwatch watch(worker.statistics.aggregate_seconds);
  say_who(worker, [&] {
    spread_(
        gradient, receivers.front().payload, plan.received, plan.averages, plan.shared, optional(worker.report.status()), plan.k(),
        stamp_of(worker, plan));
  });
  const bool dense = plan.is_dense();
  if (!dense) {
    measure(receivers, gradient, receivers.front().payload.unsqueeze(0), [&](int64_t k) { return bytes_of(worker, plan, k, plan.wire()); });
  }
  const double bytes = dense ? bytes_of_all(worker, plan) : bytes_of(worker, plan, plan.k(), plan.wire());
  for (const Receiver& each : receivers) {
    if (&each.plan != &plan) each.plan.shared.idle.copy_(plan.shared.idle);
    at::Tensor feedback;
    if (has_feedback(each.worker, each.plan)) {
      feedback = each.plan.feedback_buffer[0];
      feedback_(
          feedback, each.payload, plan.received, plan.averages, each.plan.shared, plan.layout.dtype, plan.numel,
          selection_of(each.worker, each.plan), stamp_of(each.worker, each.plan));
    }
    remember(each, feedback, bytes);
    each.worker.statistics.dense_buckets += dense ? 1 : 0;
  }
}

std::vector<Transport::Stage> stages(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Sent& sent, const at::Tensor& gradient) {
  using Kind = Transport::Collective::Kind;
  std::vector<Transport::Stage> stages{
      {{.kind = Kind::kSwap, .input = plan->rows, .output = plan->received}, [worker, plan] { average(*worker, *plan); }},
      {{.kind = Kind::kGather, .input = plan->slice, .output = plan->averages},
       [worker, plan, sent, gradient] { receive({{*worker, *plan, sent.payload}}, gradient); }}};
  if (plan->is_dense()) return stages;
  stages.insert(
      stages.begin(), {{.kind = Kind::kBroadcast, .input = support_in(*worker, *plan, sent), .root = leader_of(*worker)},
                       [worker, plan, sent] { follow(*worker, *plan, sent); }});
  return stages;
}

}  // namespace regtopk::shared_support
