// regtopk::aggregate_ on the CPU.
#include <torch/library.h>

#include "../core/aggregate.h"
#include "checks.h"

namespace regtopk {
namespace {

// Received bytes are untrusted: all of them are checked before anything is written.
void check_received(const uint8_t* payloads, int64_t workers, const PayloadLayout& layout, int64_t step, int64_t plan) {
  const auto fail = [](int64_t rank, const PayloadError& error) {
    TORCH_CHECK_VALUE(
        false, "aggregate_: expected ", error.field, " ", error.expected, " in the payload of rank ", rank, ", got ", error.got);
  };
  for (int64_t rank = 0; rank < workers; ++rank) {
    const uint8_t* const bytes = payloads + rank * layout.bytes;
    if (const auto error = check_payload(bytes, layout, torch_parallel_for())) fail(rank, *error);
    const PayloadHeader header = PayloadView(bytes, layout).header();
    if (header.step != static_cast<uint64_t>(step)) fail(rank, {"step", std::to_string(step), std::to_string(header.step)});
    if (header.plan != static_cast<uint64_t>(plan)) fail(rank, {"plan", std::to_string(plan), std::to_string(static_cast<int64_t>(header.plan))});
  }
}

void aggregate_cpu(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback, int64_t k, int64_t rank,
    c10::string_view distortion, int64_t step, int64_t plan) {
  constexpr const char* who = "aggregate_";
  AggregateArguments arguments{.layout = check_bucket(who, gradient, k)};
  check_payloads(who, payloads, arguments.layout);
  arguments.workers = payloads.size(0);
  arguments.payloads = payloads.const_data_ptr<uint8_t>();
  arguments.distortion = distortion_of(who, distortion);
  if (feedback) {
    check_feedback_rows(who, *feedback, accumulate_dtype(gradient.scalar_type()), arguments.layout, rank, arguments.workers);
    arguments.feedback = feedback->mutable_data_ptr();
    arguments.first_feedback_worker = rank;
    arguments.feedback_workers = feedback->size(0);
  }
  check_received(arguments.payloads, arguments.workers, arguments.layout, step, plan);
  arguments.gradient = gradient.mutable_data_ptr();
  aggregate(arguments, torch_parallel_for());
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) { library.impl("aggregate_", &aggregate_cpu); }

}  // namespace regtopk
