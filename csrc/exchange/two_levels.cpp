#include "two_levels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "own_support.h"

namespace regtopk::two_levels {
namespace {

// Those ranks `first`, first + step, ... are counted from 0 in what the operation says.
void say_whose(int64_t first, int64_t step, int64_t count, const std::function<void()>& operation) {
  try {
    operation();
  } catch (const c10::ValueError& error) {
    std::string ranks;
    for (int64_t i = 0; i < count; ++i) ranks += c10::str(i == 0 ? "" : ", ", first + i * step);
    C10_THROW_ERROR(ValueError, error.what_without_backtrace() + ("; counted from 0 among the ranks " + ranks));
  }
}

// Buffers of the plan: rows to and from the host's ranks, in those that a leader's support would use, and where parts lie in them.
void make_room(const Worker& worker, Plan& plan, const Layout& whole, int64_t whole_hash) {
  const int64_t host_ranks = worker.options.host_ranks;
  std::vector<int64_t> numels;
  for (const Span& span : whole.spans) numels.push_back(span.numel);
  const auto bytes = plan.residual.options().dtype(at::kByte);
  const int64_t row_bytes = part_row_bytes(numels, host_ranks, whole.dtype);
  for (at::Tensor* rows : {&plan.rows, &plan.averages}) {
    if (rows->defined() && rows->size(1) == row_bytes) continue;
    reserve(*rows, {host_ranks, row_bytes}, bytes);
    rows->zero_();  // what fills a row up travels
  }
  if (!plan.slice.defined() || plan.slice.numel() != row_bytes) plan.slice = at::zeros({row_bytes}, bytes);
  if (!plan.found.defined()) plan.found = at::empty({2}, plan.shared.spans.options());
  if (!plan.parts.defined() || plan.parts_hash != whole_hash) {
    plan.parts = make_parts(numels, host_ranks, whole.device);
    plan.parts_hash = whole_hash;
  }
  if (plan.numel > 0) return own_support::make_room(worker, plan, /*rows=*/1);
  // A part without entries: something travels all the same.
  if (!plan.message.defined()) plan.message = at::zeros({1}, bytes);
  reserve(plan.received, {worker.workers, 1}, bytes);
}

}  // namespace

Way way(
    const std::shared_ptr<Worker>& worker, const std::shared_ptr<Plan>& plan, const Layout& whole, const at::Tensor& gradient,
    const at::Tensor& average) {
  using Kind = Transport::Collective::Kind;
  using Among = Transport::Collective::Among;
  const int64_t host_ranks = worker->options.host_ranks, first = worker->rank * host_ranks;
  Stamp stamp = stamp_of(*worker, *plan);
  stamp.plan = whole.hash();
  make_room(*worker, *plan, whole, stamp.plan);
  split_(gradient, plan->rows, plan->parts, stamp);

  const bool is_empty = plan->numel == 0;
  const Sent sent = is_empty ? Sent{{}, plan->message} : place_for(*plan);
  const at::Tensor part = entries_of(plan->slice, plan->numel, whole.dtype);
  const auto given = std::make_shared<bool>(false);  // the part's gradient is in the residual

  const auto in_host = [=](const std::function<void()>& operation) {
    say_whose(first, 1, host_ranks, [&] { say_who(*worker, operation); });
  };
  const auto mark = [=](const at::Tensor& message) { mark_unfilled_(message, plan->found, optional(worker->report.statuses())); };
  const auto compress = [=] {
    in_host([&] { mean_(plan->averages, plan->slice, plan->found, plan->numel, whole.dtype, stamp); });
    if (is_empty) return;
    const auto no_plan_changes = worker->hold_plans();
    own_support::send(*worker, *plan, part);
    *given = true;
    mark(sent.message);
  };
  const auto receive = [=] {
    if (!is_empty) {
      say_whose(worker->place, host_ranks, worker->workers, [&] {
        own_support::receive({{*worker, *plan, sent.payload}}, part, plan->found.narrow(0, 0, 1));
      });
    }
    mark(plan->slice);
  };
  const auto join = [=] {
    in_host([&] {
      join_(
          plan->averages, average, plan->parts, worker->steps.clock().verdict(average.device()), optional(worker->report.status_in_host()),
          stamp);
    });
    worker->steps.clock().note_end(average.device(), stamp.round);  // what all of the bucket says of the round
    worker->statistics.bytes_local += static_cast<double>(2 * (host_ranks - 1) * plan->slice.numel());
  };
  const auto fail = [=] {
    if (*given) regtopk::fail(*worker, *plan, sent.payload);
    else worker->steps.clock().make_void(stamp.round);
  };
  return {
      {{{.kind = Kind::kSwap, .input = plan->rows, .output = plan->averages, .among = Among::kHost}, compress},
       {{.kind = Kind::kGather, .input = sent.message, .output = plan->received, .among = Among::kHosts}, receive},
       {{.kind = Kind::kGather, .input = plan->slice, .output = plan->averages, .among = Among::kHost}, join}},
      fail};
}

}  // namespace regtopk::two_levels
