// regtopk::aggregate_ and regtopk::judge_ on the CPU.
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <atomic>

#include "../core/aggregate.h"
#include "../core/deed.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

// Any thread may write it, of this state or of one that shares the verdict: rounds only grow.
void make_void(const at::Tensor& verdict, int64_t round) {
  if (round < 0) return;
  std::atomic_ref(verdict.mutable_data_ptr<int64_t>()[round % kVerdictRounds]).store(round, std::memory_order_relaxed);
}

// Received bytes are untrusted: all of them are checked before anything is written.
void check_received(const std::vector<PayloadView>& payloads, int64_t step, int64_t plan) {
  const auto fail = [](int64_t rank, const PayloadError& error) {
    TORCH_CHECK_VALUE(
        false, "aggregate_: expected ", error.field, " ", error.expected, " in the payload of rank ", rank, ", got ", error.got);
  };
  const int64_t workers = static_cast<int64_t>(payloads.size());
  for (int64_t rank = 0; rank < workers; ++rank) {
    if (const auto error = check_payload(payloads[rank].bytes(), payloads[rank].layout(), torch_parallel_for())) fail(rank, *error);
  }
  if (payloads[0].layout().spans > 0) {
    const ExchangePart first = payloads[0].exchange_part();
    for (int64_t rank = 1; rank < workers; ++rank) {
      const ExchangePart other = payloads[rank].exchange_part();
      TORCH_CHECK_VALUE(
          first.deed == other.deed,
          "aggregate_: expected every rank to have made the same calls of reset, load_state_dict, pause, resume and skipped, got ",
          describe_deed(first.deed), " on rank 0 and ", describe_deed(other.deed), " on rank ", rank, "; make the call on every rank");
      TORCH_CHECK_VALUE(
          first.scale == other.scale, "aggregate_: expected the same gradient scale on every rank, got ", first.scale, " on rank 0 and ",
          other.scale, " on rank ", rank, "; give every rank's state a GradScaler with the same arguments, or none");
    }
  }
  for (int64_t rank = 0; rank < workers; ++rank) {
    const PayloadHeader header = payloads[rank].header();
    if (header.step != static_cast<uint64_t>(step)) fail(rank, {"step", std::to_string(step), std::to_string(header.step)});
    if (header.plan != static_cast<uint64_t>(plan))
      fail(rank, {"plan", std::to_string(plan), std::to_string(static_cast<int64_t>(header.plan))});
  }
}

void aggregate_cpu(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback,
    const std::optional<at::Tensor>& spans_tensor, const std::optional<at::Tensor>& idle, const std::optional<at::Tensor>& verdict,
    const std::optional<at::Tensor>&, int64_t k, int64_t rank, c10::string_view distortion, int64_t step, int64_t plan, int64_t round) {
  constexpr const char* who = "aggregate_";
  const int64_t span_count = check_spans(who, spans_tensor, gradient.numel());
  AggregateArguments arguments{.layout = check_bucket(who, gradient, k, span_count)};
  check_rows(who, "payloads", payloads, arguments.layout.bytes);
  arguments.workers = payloads.size(0);
  arguments.payloads = payloads.const_data_ptr<uint8_t>();
  arguments.distortion = distortion_of(who, distortion);
  if (feedback) {
    check_feedback_rows(who, *feedback, accumulate_dtype(gradient.scalar_type()), arguments.layout, rank, arguments.workers);
    arguments.feedback = feedback->mutable_data_ptr();
    arguments.first_feedback_worker = rank;
    arguments.feedback_workers = feedback->size(0);
  }
  TORCH_CHECK_VALUE(span_count == 0 || (idle && verdict), who, ": expected idle and verdict together with spans, got spans alone");
  if (span_count > 0) {
    check_flags(who, "idle", *idle, span_count);
    check_verdict(who, *verdict, round);
  }
  std::vector<PayloadView> received;
  received.reserve(arguments.workers);
  for (int64_t worker = 0; worker < arguments.workers; ++worker)
    received.emplace_back(arguments.payloads + worker * arguments.layout.bytes, arguments.layout);
  check_received(received, step, plan);
  arguments.gradient = gradient.mutable_data_ptr();
  const bool finite = aggregate(arguments, torch_parallel_for());
  if (span_count == 0) return;
  if (!finite) make_void(*verdict, round);
  uint8_t* const is_idle = idle->mutable_data_ptr<uint8_t>();
  bool any = false;
  for (int64_t span = 0; span < span_count; ++span) {
    const bool zero = std::all_of(received.begin(), received.end(), [&](const PayloadView& payload) { return payload.is_zero(span); });
    is_idle[span] = zero ? 1 : 0;
    any |= zero;
  }
  if (any) clear_idle_spans(arguments, {spans_tensor->const_data_ptr<int64_t>(), span_count}, is_idle);
}

void judge_cpu(const at::Tensor& tensor, const at::Tensor& verdict, int64_t round) {
  constexpr const char* who = "judge_";
  const ValueType type = value_type_of(who, tensor.scalar_type());
  check_verdict(who, verdict, round);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), who, ": expected a contiguous tensor, got strides ", tensor.strides());
  if (!all_finite(tensor.const_data_ptr(), tensor.numel(), type, torch_parallel_for())) make_void(verdict, round);
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("aggregate_", &aggregate_cpu);
  library.impl("judge_", &judge_cpu);
}

}  // namespace regtopk
