// regtopk::compress_ and regtopk::put_back_ on the CPU.
#include <torch/library.h>

#include <mutex>

#include "../core/compress.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

std::mutex forced_bracket_mutex;
std::optional<Bracket> forced_bracket;

std::optional<Bracket> bracket_in_force() {
  const std::lock_guard lock(forced_bracket_mutex);
  return forced_bracket;
}

void compress_cpu(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, int64_t k, double mu, c10::string_view distortion, int64_t step, int64_t plan) {
  constexpr const char* who = "compress_";
  CompressArguments arguments{.layout = check_bucket(who, gradient, k)};
  const int64_t numel = gradient.numel();
  const at::ScalarType accumulate = accumulate_dtype(gradient.scalar_type());
  check_vector(who, "residual", residual, accumulate, numel);
  check_vector(who, "payload", payload, at::kByte, arguments.layout.bytes);
  arguments.distortion = distortion_of(who, distortion);
  arguments.mu = checked_mu(who, mu);
  TORCH_CHECK_VALUE(!feedback || sent, who, ": expected feedback together with the payload it belongs to, got feedback alone");

  std::optional<PayloadView> sent_view;
  if (sent) {
    sent_view.emplace(sent->const_data_ptr<uint8_t>(), check_own_payload(who, "sent", *sent, numel, arguments.layout.type));
    TORCH_CHECK_VALUE(!sent->is_alias_of(payload), who, ": expected payload and sent in different memory, got the same");
    arguments.sent = &*sent_view;
  }
  if (feedback) {
    check_vector(who, "feedback", *feedback, accumulate, sent_view->layout().k);
    arguments.feedback = feedback->const_data_ptr();
  }
  arguments.gradient = gradient.const_data_ptr();
  arguments.residual = residual.mutable_data_ptr();
  arguments.payload = payload.mutable_data_ptr<uint8_t>();
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);
  arguments.bracket = bracket_in_force();
  compress(arguments, torch_parallel_for());
}

void put_back_cpu(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  constexpr const char* who = "put_back_";
  const ValueType type = value_type_of(who, dtype);
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  const PayloadLayout layout = check_own_payload(who, "payload", payload, residual.numel(), type);
  put_back(PayloadView(payload.const_data_ptr<uint8_t>(), layout), residual.mutable_data_ptr(), torch_parallel_for());
}

}  // namespace

void force_bracket(std::optional<std::pair<uint32_t, uint32_t>> keys) {
  const std::lock_guard lock(forced_bracket_mutex);
  forced_bracket.reset();
  if (keys) forced_bracket = Bracket{.low = keys->first, .high = keys->second};
}

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("compress_", &compress_cpu);
  library.impl("put_back_", &put_back_cpu);
}

}  // namespace regtopk
