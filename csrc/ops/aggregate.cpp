// regtopk::aggregate_, regtopk::measure_ and regtopk::judge_ on the CPU.
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "../core/aggregate.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

// Received bytes are untrusted: all of them are checked before anything is written.
void check_received(const std::vector<PayloadView>& payloads, int64_t step, int64_t plan) {
  for (size_t rank = 0; rank < payloads.size(); ++rank) {
    if (const auto error = check_payload(payloads[rank].bytes(), payloads[rank].layout(), torch_parallel_for()))
      raise_payload_error("aggregate_", *error, static_cast<int64_t>(rank));
  }
  std::vector<const uint8_t*> heads;
  for (const PayloadView& payload : payloads) heads.push_back(payload.bytes());
  check_heads("aggregate_", heads, payloads[0].layout().spans > 0, step, plan);
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

void measure_cpu(const at::Tensor& gradient, const at::Tensor& payloads, const at::Tensor& squared_norm_tensor, int64_t k, int64_t spans) {
  constexpr const char* who = "measure_";
  AggregateArguments arguments{.layout = check_bucket(who, gradient, k, spans)};
  check_rows(who, "payloads", payloads, arguments.layout.bytes);
  check_vector(who, "squared_norm", squared_norm_tensor, at::kDouble, 1);
  arguments.workers = payloads.size(0);
  arguments.payloads = payloads.const_data_ptr<uint8_t>();
  arguments.gradient = const_cast<void*>(gradient.const_data_ptr());
  *squared_norm_tensor.mutable_data_ptr<double>() = squared_norm(arguments, torch_parallel_for());
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
  library.impl("measure_", &measure_cpu);
  library.impl("judge_", &judge_cpu);
}

}  // namespace regtopk
