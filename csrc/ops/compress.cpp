// regtopk::compress_ and the two ways back, regtopk::settle_ and regtopk::put_back_, on the CPU.
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <atomic>

#include "../core/compress.h"
#include "../core/lead.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

constexpr int64_t kRepeated = 0, kDisplaced = 1, kHistoryDropped = 2;

void count(const at::Tensor& counters, int64_t which, int64_t by) {
  // Read by stats() from any thread.
  std::atomic_ref(counters.mutable_data_ptr<int64_t>()[which]).fetch_add(by, std::memory_order_relaxed);
}

bool round_is_void(const at::Tensor& verdict, int64_t round) {
  return round >= 0 && verdict.const_data_ptr<int64_t>()[round % kVerdictRounds] == round;
}

bool any(const uint8_t* flags, int64_t numel) {
  return std::any_of(flags, flags + numel, [](uint8_t flag) { return flag != 0; });
}

// What was sent returns where it was not applied: for idle spans, and for all of a void round but those that an optimizer has
// applied all the same. Returns whether the round was void: its history has ended.
bool settle(
    const PayloadView& sent, void* residual, const Spans& spans, const uint8_t* idle, bool is_void, const uint8_t* applied,
    const at::Tensor& counters, void* sent_values = nullptr) {
  if (!is_void && !any(idle, spans.count)) return false;
  const auto returns = [&](int64_t span) { return idle[span] != 0 || (is_void && (applied == nullptr || applied[span] == 0)); };
  const int64_t returned = put_back_spans(sent, residual, spans, returns, sent_values);
  count(counters, kHistoryDropped, is_void ? sent.layout().k : returned);
  return is_void;
}

void compress_cpu(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const std::optional<at::Tensor>& spans_tensor, const std::optional<at::Tensor>& idle,
    const std::optional<at::Tensor>& verdict, const std::optional<at::Tensor>& applied, const std::optional<at::Tensor>& counters,
    int64_t k, double mu, double decay, c10::string_view distortion, int64_t step, int64_t plan, double scale, int64_t deed,
    int64_t sent_round, bool trusted, at::OptionalIntArrayRef bracket, bool choose, int64_t chunk, int64_t chunk_k) {
  constexpr const char* who = "compress_";
  const int64_t numel = gradient.numel(), span_count = check_spans(who, spans_tensor, numel);
  CompressArguments arguments{.layout = check_bucket(who, gradient, k, span_count)};
  const at::ScalarType accumulate = accumulate_dtype(gradient.scalar_type());
  check_vector(who, "residual", residual, accumulate, numel);
  check_vector(who, "payload", payload, at::kByte, arguments.layout.bytes);
  arguments.distortion = distortion_of(who, distortion);
  arguments.mu = checked_mu(who, mu);
  arguments.decay = checked_decay(who, decay);
  arguments.chunks = checked_chunks(who, arguments.layout, chunk, chunk_k);
  TORCH_CHECK_VALUE(!feedback || sent, who, ": expected feedback together with the payload it belongs to, got feedback alone");
  TORCH_CHECK_VALUE(
      span_count == 0 || (idle && verdict && counters), who, ": expected idle, verdict and counters together with spans, got spans alone");
  if (span_count > 0) {
    check_flags(who, "idle", *idle, span_count);
    check_verdict(who, *verdict, sent_round);
    check_counters(who, *counters);
    if (applied) check_flags(who, "applied", *applied, span_count);
  }

  std::optional<PayloadView> sent_view;
  if (sent) {
    sent_view.emplace(sent->const_data_ptr<uint8_t>(), check_own_payload(who, "sent", *sent, numel, arguments.layout.type, trusted));
    TORCH_CHECK_VALUE(!sent->is_alias_of(payload), who, ": expected payload and sent in different memory, got the same");
    arguments.sent = &*sent_view;
  }
  if (feedback) {
    check_vector(who, "feedback", *feedback, accumulate, sent_view->layout().k);
    arguments.feedback = feedback->const_data_ptr();
  }
  if (bracket) {
    TORCH_CHECK_VALUE(
        bracket->size() == 2 && std::all_of(bracket->begin(), bracket->end(), [](int64_t key) { return key >= 0 && key <= 0x7fffffff; }),
        who, ": expected a bracket of two score keys in [0, 2^31), got ", *bracket);
    arguments.bracket = Bracket{.low = static_cast<uint32_t>((*bracket)[0]), .high = static_cast<uint32_t>((*bracket)[1])};
  }
  arguments.gradient = gradient.const_data_ptr();
  arguments.residual = residual.mutable_data_ptr();
  arguments.payload = payload.mutable_data_ptr<uint8_t>();
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);
  const auto work = [choose](const CompressArguments& arguments, const ParallelFor& parallel_for) {
    choose ? compress(arguments, parallel_for) : regtopk::accumulate(arguments, parallel_for);
  };
  if (span_count == 0) return work(arguments, torch_parallel_for());

  const Spans spans = spans_of(*spans_tensor);
  const uint8_t* const was_idle = idle->const_data_ptr<uint8_t>();
  const bool is_settled_void = sent && settle(
                                           *sent_view, arguments.residual, spans, was_idle, round_is_void(*verdict, sent_round),
                                           applied ? applied->const_data_ptr<uint8_t>() : nullptr, *counters);
  if (is_settled_void) {
    arguments.sent = nullptr;
    arguments.feedback = nullptr;
  }
  c10::SmallVector<uint8_t, 256> zero(span_count), idle_now(span_count);
  find_zero_spans(arguments.gradient, arguments.layout.type, spans, zero.data());
  for (int64_t span = 0; span < span_count; ++span) idle_now[span] = was_idle[span] & zero[span];
  {
    const ParkedSpans parked(arguments.residual, static_cast<int64_t>(c10::elementSize(accumulate)), spans, idle_now.data());
    work(arguments, torch_parallel_for());
  }
  const ExchangePart part{.scale = scale, .deed = static_cast<uint64_t>(deed)};
  std::memcpy(arguments.payload + sizeof(PayloadHeader), &part, sizeof part);
  uint8_t* const bits = arguments.payload + arguments.layout.zero_bits_at;
  for (int64_t span = 0; span < span_count; ++span) bits[span / 8] |= static_cast<uint8_t>(zero[span] << (span % 8));
  const PayloadHeader header = PayloadView(arguments.payload, arguments.layout).header();
  count(*counters, kRepeated, static_cast<int64_t>(header.repeated));
  count(*counters, kDisplaced, static_cast<int64_t>(header.displaced));
}

void settle_cpu(
    const at::Tensor& residual, const at::Tensor& sent, const at::Tensor& spans, const at::Tensor& idle, const at::Tensor& verdict,
    const std::optional<at::Tensor>& applied, const at::Tensor& counters, at::ScalarType dtype, int64_t sent_round) {
  constexpr const char* who = "settle_";
  const int64_t numel = residual.numel(), span_count = check_spans(who, spans, numel);
  check_vector(who, "residual", residual, accumulate_dtype(dtype), numel);
  check_flags(who, "idle", idle, span_count);
  check_verdict(who, verdict, sent_round);
  check_counters(who, counters);
  if (applied) check_flags(who, "applied", *applied, span_count);
  const PayloadView view(sent.const_data_ptr<uint8_t>(), check_own_payload(who, "sent", sent, numel, value_type_of(who, dtype)));
  settle(
      view, residual.mutable_data_ptr(), spans_of(spans), idle.const_data_ptr<uint8_t>(), round_is_void(verdict, sent_round),
      applied ? applied->const_data_ptr<uint8_t>() : nullptr, counters, sent.mutable_data_ptr<uint8_t>() + view.layout().values_at);
}

void put_back_cpu(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  constexpr const char* who = "put_back_";
  const ValueType type = value_type_of(who, dtype);
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  const PayloadLayout layout = check_own_payload(who, "payload", payload, residual.numel(), type);
  put_back(PayloadView(payload.const_data_ptr<uint8_t>(), layout), residual.mutable_data_ptr(), torch_parallel_for());
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("compress_", &compress_cpu);
  library.impl("settle_", &settle_cpu);
  library.impl("put_back_", &put_back_cpu);
}

}  // namespace regtopk
