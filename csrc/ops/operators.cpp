#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>

#include <cstddef>

#include "../core/deed.h"
#include "../core/payload.h"
#include "../core/payload_status.h"
#include "checks.h"

namespace regtopk {
namespace {

using Optional = std::optional<at::Tensor>;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The ranks that it counts from 0 are `first`, first + stride ... of the job.
std::string describe_status(int64_t status, int64_t first, int64_t stride) {
  const auto word = static_cast<unsigned long long>(status);
  const int64_t rank = first + rank_of(word) * stride;
  switch (field_of(word)) {
    case PayloadField::kDeed:
      return c10::str(
          "expected every rank to have made the same calls of ", kDeeds, ", got others on rank ", rank, " than on rank ", first,
          "; make the call on every rank");
    case PayloadField::kScale:
      return c10::str(
          "expected the same gradient scale on every rank, got another on rank ", rank, " than on rank ", first,
          "; give every rank's state a GradScaler with the same arguments, or none");
    case PayloadField::kHeader:
      return c10::str(
          "expected a header of this bucket in the payload of rank ", rank,
          ", got another, or none, as a rank sends that has an error of its own");
    case PayloadField::kStep:
      return c10::str("expected this rank's step in the payload of rank ", rank, ", got another");
    case PayloadField::kPlan:
      return c10::str(
          "expected this rank's plan in the payload of rank ", rank,
          ", got another: it sent another bucket; make the same calls in the same order on every rank");
    case PayloadField::kTileStarts:
      return c10::str("expected valid tile starts in the payload of rank ", rank, ", got others");
    case PayloadField::kSupport:
      return c10::str("expected a valid support in the payload of rank ", rank, ", got another");
    case PayloadField::kAverages:
      return c10::str(
          "expected averages of this rank's step of rank ", rank,
          ", got those of another step, or none: what it received was damaged, as its own error says");
  }
  return c10::str("expected valid payloads, got status ", status);
}

}  // namespace

bool has_kernels(at::Device device) {
  if (device.is_cpu()) return true;
  if (device.is_cuda()) return has_cuda_kernels();
  static const auto compress = c10::Dispatcher::singleton().findSchemaOrThrow("regtopk::compress_", "");
  return device.is_privateuseone() && compress.hasKernelForDispatchKey(at::TensorOptions().device(device).computeDispatchKey());
}

void compress_(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const Optional& sent, const Optional& feedback,
    const Shared& shared, const Optional& applied, const at::Tensor& counters, const Selection& selection, const Stamp& stamp,
    int64_t sent_round, bool choose) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, const Optional&, const Optional&, int64_t, double, double, c10::string_view, int64_t, int64_t, double, int64_t,
      int64_t, bool, at::OptionalIntArrayRef, bool, int64_t, int64_t)>("regtopk::compress_");
  operation.call(
      gradient, residual, payload, sent, feedback, shared.spans, shared.idle, shared.verdict, applied, counters, selection.k, selection.mu,
      selection.decay, selection.distortion, stamp.step, stamp.plan, stamp.scale, static_cast<int64_t>(stamp.deed), sent_round,
      /*trusted=*/true, /*bracket=*/std::nullopt, choose, selection.chunk, selection.chunk_k);
}

void aggregate_(
    const at::Tensor& gradient, const at::Tensor& payloads, const Optional& feedback, const Shared& shared, const Optional& status,
    const Selection& selection, const Stamp& stamp, int64_t rank) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&, int64_t,
      int64_t, c10::string_view, int64_t, int64_t, int64_t)>("regtopk::aggregate_");
  operation.call(
      gradient, payloads, feedback, shared.spans, shared.idle, shared.verdict, status, selection.k, rank, selection.distortion, stamp.step,
      stamp.plan, stamp.round);
}

void measure_(const at::Tensor& gradient, const at::Tensor& payloads, const at::Tensor& squared_norm, int64_t k, int64_t spans) {
  static const auto operation =
      find_operator<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t)>("regtopk::measure_");
  operation.call(gradient, payloads, squared_norm, k, spans);
}

void correct_(
    const at::Tensor& gradient, const at::Tensor& given, const Optional& velocity, const at::Tensor& spans, const Correction& correction) {
  static const auto operation =
      find_operator<void(const at::Tensor&, const at::Tensor&, const Optional&, const at::Tensor&, double, bool, double)>(
          "regtopk::correct_");
  operation.call(gradient, given, velocity, spans, correction.momentum, correction.nesterov, correction.largest_norm);
}

void mask_(
    const at::Tensor& velocity, const at::Tensor& sent, const Shared& shared, const Optional& applied, at::ScalarType dtype,
    int64_t sent_round) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, at::ScalarType,
      int64_t)>("regtopk::mask_");
  operation.call(velocity, sent, shared.spans, shared.idle, shared.verdict, applied, dtype, sent_round);
}

void judge_(const at::Tensor& tensor, const at::Tensor& verdict, int64_t round) {
  static const auto operation = find_operator<void(const at::Tensor&, const at::Tensor&, int64_t)>("regtopk::judge_");
  operation.call(tensor, verdict, round);
}

void settle_(
    const at::Tensor& residual, const at::Tensor& sent, const Shared& shared, const Optional& applied, const at::Tensor& counters,
    at::ScalarType dtype, int64_t sent_round) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, const at::Tensor&,
      at::ScalarType, int64_t)>("regtopk::settle_");
  operation.call(residual, sent, shared.spans, shared.idle, shared.verdict, applied, counters, dtype, sent_round);
}

void put_back_(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  static const auto operation = find_operator<void(const at::Tensor&, const at::Tensor&, at::ScalarType)>("regtopk::put_back_");
  operation.call(residual, payload, dtype);
}

void to_wire_(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& wire, const Wire& form, at::ScalarType dtype, int64_t k,
    int64_t spans) {
  static const auto operation =
      find_operator<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::ScalarType, at::ScalarType, bool, int64_t, int64_t)>(
          "regtopk::to_wire_");
  operation.call(residual, payload, wire, dtype, form.dtype, form.elias_fano, k, spans);
}

void from_wire_(
    const at::Tensor& wire, const at::Tensor& payloads, const Wire& form, at::ScalarType dtype, int64_t numel, int64_t k, int64_t spans) {
  static const auto operation =
      find_operator<void(const at::Tensor&, const at::Tensor&, at::ScalarType, at::ScalarType, bool, int64_t, int64_t, int64_t)>(
          "regtopk::from_wire_");
  operation.call(wire, payloads, dtype, form.dtype, form.elias_fano, numel, k, spans);
}

void take_(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& lead, const Shared& shared, const Optional& status,
    const Wire& form, at::ScalarType dtype, int64_t k, int64_t leader, const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, at::ScalarType,
      at::ScalarType, bool, int64_t, int64_t, int64_t, int64_t)>("regtopk::take_");
  operation.call(
      residual, payload, lead, shared.spans, shared.idle, status, dtype, form.dtype, form.elias_fano, k, leader, stamp.step, stamp.plan);
}

void average_slice_(
    const at::Tensor& rows, const at::Tensor& averages, const Optional& status, const Wire& form, at::ScalarType dtype, int64_t numel,
    int64_t k, int64_t spans, const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const Optional&, at::ScalarType, at::ScalarType, bool, int64_t, int64_t, int64_t, int64_t,
      int64_t)>("regtopk::average_slice_");
  operation.call(rows, averages, status, dtype, form.dtype, form.elias_fano, numel, k, spans, stamp.step, stamp.plan);
}

void spread_(
    const at::Tensor& gradient, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const Shared& shared,
    const Optional& status, int64_t k, const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const Optional&, int64_t, int64_t, int64_t)>("regtopk::spread_");
  operation.call(gradient, payload, rows, averages, shared.spans, shared.idle, shared.verdict, status, k, stamp.step, stamp.round);
}

void feedback_(
    const at::Tensor& feedback, const at::Tensor& payload, const at::Tensor& rows, const at::Tensor& averages, const Shared& shared,
    at::ScalarType dtype, int64_t numel, const Selection& selection, const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::ScalarType,
      int64_t, c10::string_view, int64_t)>("regtopk::feedback_");
  operation.call(feedback, payload, rows, averages, shared.spans, shared.idle, dtype, numel, selection.distortion, stamp.step);
}

void split_(const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor& parts, const Stamp& stamp) {
  static const auto operation =
      find_operator<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, double, int64_t)>("regtopk::split_");
  operation.call(gradient, rows, parts, stamp.step, stamp.plan, stamp.scale, static_cast<int64_t>(stamp.deed));
}

void mean_(
    const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype, const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType, int64_t, int64_t, double, int64_t)>(
      "regtopk::mean_");
  operation.call(rows, row, found, entries, dtype, stamp.step, stamp.plan, stamp.scale, static_cast<int64_t>(stamp.deed));
}

void join_(
    const at::Tensor& rows, const at::Tensor& gradient, const at::Tensor& parts, const at::Tensor& verdict, const Optional& status,
    const Stamp& stamp) {
  static const auto operation = find_operator<void(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, int64_t, int64_t, int64_t)>(
      "regtopk::join_");
  operation.call(rows, gradient, parts, verdict, status, stamp.step, stamp.plan, stamp.round);
}

void mark_unfilled_(const at::Tensor& message, const at::Tensor& found, const Optional& status) {
  static const auto operation = find_operator<void(const at::Tensor&, const at::Tensor&, const Optional&)>("regtopk::mark_unfilled_");
  operation.call(message, found, status);
}

MessageParts message_parts(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans, const Wire& form) {
  const WireLayout wire = check_wire("message_parts", numel, k, spans, dtype, form).second;
  return {wire.index_at, wire.values_at, static_cast<int64_t>(c10::elementSize(form.dtype))};
}

at::Tensor encode(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan, int64_t spans) {
  static const auto operation =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t)>("regtopk::encode");
  return operation.call(indices, values, numel, step, plan, spans);
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype) {
  static const auto operation =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t, at::ScalarType)>("regtopk::decode");
  return operation.call(payload, numel, k, dtype);
}

int64_t payload_bytes(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans) {
  TORCH_CHECK_VALUE(
      k >= 1 && k <= numel && k <= int64_t{UINT32_MAX}, "payload_bytes: expected 1 <= k <= min(numel, 2^32 - 1), got k=", k,
      " and numel=", numel);
  return PayloadLayout(numel, k, value_type_of("payload_bytes", dtype), spans).bytes;
}

int64_t wire_bytes(int64_t numel, int64_t k, at::ScalarType dtype, int64_t spans, const Wire& form) {
  return check_wire("wire_bytes", numel, k, spans, dtype, form).second.bytes;
}

std::string describe_statuses(int64_t of_workers, int64_t in_host, int64_t host, int64_t place, int64_t host_ranks) {
  constexpr auto kValid = static_cast<int64_t>(kPayloadsValid);
  // What was wrong inside the host made this rank's payload one that is rejected, and the other way round what its rows hold is a consequence.
  const bool is_cause = stage_of(static_cast<unsigned long long>(in_host)) < kStageOfConsequences;
  if (in_host != kValid && (of_workers == kValid || is_cause)) return describe_status(in_host, host * host_ranks, 1);
  return of_workers == kValid ? "" : describe_status(of_workers, place, host_ranks);
}

void mark_absent_(const at::Tensor& payload) {
  static_assert(kFlags < 256, "one byte of the header holds all flags");
  payload.select(0, offsetof(PayloadHeader, flags)).bitwise_or_(static_cast<int64_t>(kFlagAbsent));
}

at::Tensor make_verdict(at::Device device) { return at::full({kVerdictRounds}, -1, at::TensorOptions().dtype(at::kLong).device(device)); }

bool is_void(const at::Tensor& verdict, int64_t round) {
  return round >= 0 && verdict.select(0, round % kVerdictRounds).item<int64_t>() == round;
}

}  // namespace regtopk
