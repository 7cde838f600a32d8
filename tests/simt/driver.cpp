// The launchers of cuda/launch.h as C functions, for tests/simt/host.py: on host memory in the emulation, on device memory
// where nvcc compiles this with the kernels into a library that knows no torch.
#include <sstream>

#include "../../csrc/core/parts.h"
#include "../../cuda/launch.h"
#include "calls.h"
#if defined(REGTOPK_EMULATED)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

using namespace regtopk;

namespace {

std::string error;

#if defined(REGTOPK_EMULATED)
void allow(const void* pointer, int64_t bytes, bool writable) {
  if (pointer == nullptr || bytes == 0) return;
  const uint8_t* const begin = static_cast<const uint8_t*>(pointer);
  simt::buffers.push_back({begin, begin + bytes, writable});
}

// Runs a launcher with these buffers allowed; returns an error's text, empty if there was none.
template <typename Launch>
const char* run(const Launch& launch) {
  simt::error.clear();
  const cudaError_t result = launch();
  simt::buffers.clear();
  error = simt::error;
  if (result != cudaSuccess && error.empty()) error = "the launcher refused its arguments";
  return error.c_str();
}
#else
void allow(const void*, int64_t, bool) {}

template <typename Launch>
const char* run(const Launch& launch) {
  const cudaError_t result = launch();
  error = result == cudaSuccess ? "" : result == cudaErrorInvalidValue ? "the launcher refused its arguments" : cudaGetErrorString(result);
  return error.c_str();
}
#endif

void allow(const SpansCall& spans) {
  allow(spans.ends, (spans.count + 1) * 8, false);
  allow(spans.idle, spans.count, false);
  allow(spans.verdict, 8, false);
  allow(spans.applied, spans.count, false);
  allow(spans.counters, 3 * 8, true);
}

SpansLaunch launch_of(const SpansCall& spans) {
  return {spans.ends, spans.count, spans.idle, spans.verdict, spans.sent_round, spans.applied, spans.counters};
}

int64_t accumulate_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : 4; }

template <typename Call>
PayloadLayout payload_of(const Call& call) {
  return PayloadLayout(call.numel, call.k, static_cast<ValueType>(call.type), call.spans);
}

WireLayout wire_of(const WireCall& call) {
  return WireLayout::of(payload_of(call), static_cast<ValueType>(call.wire_type), call.elias_fano != 0);
}

void allow(const SpreadCall& call) {
  allow(call.rows, call.workers * call.row_bytes, false);
  allow(call.averages, call.workers * call.averages_bytes, false);
  allow(call.span_ends, (call.spans + 1) * 8, false);
}

AveragesLaunch received_of(const SpreadCall& call) {
  return {call.rows, call.averages, call.workers, call.row_bytes, call.averages_bytes, call.step};
}

void allow(const PartsCall& call, bool rows_are_written) {
  allow(call.rows, call.ranks * call.row_bytes, rows_are_written);
  allow(call.ends, (1 + call.ranks) * (call.parameters + 1) * 8, false);
  allow(call.gradient, call.numel * value_bytes(static_cast<ValueType>(call.type)), !rows_are_written);
}

PartsLaunch launch_of(const PartsCall& call) {
  return {static_cast<ValueType>(call.type), call.numel, call.ends, call.parameters, call.ranks, call.row_bytes, call.step, call.plan};
}

}  // namespace

extern "C" {

#if defined(REGTOPK_EMULATED)
void simt_schedule(int order, uint64_t seed, int resident_blocks, int multiprocessors) {
  simt::schedule = {static_cast<simt::Order>(order), seed, resident_blocks, multiprocessors};
}

void simt_reset_traffic() { simt::traffic.clear(); }

// "kernel loaded stored" lines, in bytes.
const char* simt_traffic() {
  static std::string text;
  std::ostringstream lines;
  for (const auto& [kernel, bytes] : simt::traffic) lines << kernel << ' ' << bytes.loaded << ' ' << bytes.stored << '\n';
  text = lines.str();
  return text.c_str();
}
#endif

void call_sampling(int64_t numel, int64_t k, SamplingNumbers* out) {
  const Sampling sampling = sampling_of(numel, k);
  *out = {sampling.sectors, sampling.rank_high, sampling.rank_low, sampling.list_capacity};
}

int64_t call_payload_bytes(int64_t numel, int64_t k, int64_t type, int64_t spans) {
  return PayloadLayout(numel, k, static_cast<ValueType>(type), spans).bytes;
}

int64_t call_aggregate_workspace(const AggregateCall* call) {
  return aggregate_workspace_bytes(PayloadLayout(call->numel, call->k, static_cast<ValueType>(call->type), call->spans));
}

int64_t call_zeroed_bytes() { return kZeroedBytes; }

int64_t call_compress_workspace(const CompressCall* call) {
  const auto& s = call->sampling;
  return compress_workspace_bytes(
      PayloadLayout(call->numel, call->k, static_cast<ValueType>(call->type), call->spans.count), call->feedback != nullptr,
      {s.sectors, s.rank_high, s.rank_low, s.list_capacity});
}

const char* call_compress(const CompressCall* call) {
  const ValueType type = static_cast<ValueType>(call->type);
  const PayloadLayout layout(call->numel, call->k, type, call->spans.count);
  const auto& s = call->sampling;
  const int64_t wide = accumulate_bytes(type);
  allow(call->gradient, layout.numel * value_bytes(type), false);
  allow(call->residual, layout.numel * wide, true);
  allow(call->payload, layout.bytes, true);
  allow(call->sent, call->sent_bytes, false);
  allow(call->feedback, call->feedback_entries * wide, false);
  allow(call->spans);
  allow(call->workspace, call_compress_workspace(call), true);
  return run([&] {
    return launch_compress(
        {.layout = layout,
         .gradient = call->gradient,
         .residual = call->residual,
         .payload = call->payload,
         .step = call->step,
         .plan = call->plan,
         .spans = launch_of(call->spans),
         .scale = call->scale,
         .deed = call->deed,
         .sent = call->sent,
         .sent_bytes = call->sent_bytes,
         .feedback = call->feedback,
         .feedback_entries = call->feedback_entries,
         .distortion = static_cast<Distortion>(call->distortion),
         .mu = call->mu,
         .decay = call->decay,
         .chunks = {call->chunk, call->chunk_k},
         .choose = call->choose != 0,
         .sampling = {s.sectors, s.rank_high, s.rank_low, s.list_capacity},
         .workspace = call->workspace},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_aggregate(const AggregateCall* call) {
  const ValueType type = static_cast<ValueType>(call->type);
  const PayloadLayout layout(call->numel, call->k, type, call->spans);
  allow(call->payloads, call->workers * layout.bytes, false);
  allow(call->gradient, layout.numel * value_bytes(type), true);
  allow(call->feedback, call->feedback_workers * layout.k * accumulate_bytes(type), true);
  allow(call->worst_status, sizeof *call->worst_status, true);
  allow(call->workspace, call_aggregate_workspace(call), true);
  allow(call->span_ends, (call->spans + 1) * 8, false);
  allow(call->idle, call->spans, true);
  allow(call->verdict, 8, true);
  return run([&] {
    return launch_aggregate(
        {.layout = layout,
         .payloads = call->payloads,
         .workers = call->workers,
         .gradient = call->gradient,
         .feedback = call->feedback,
         .first_feedback_worker = call->first_feedback_worker,
         .feedback_workers = call->feedback_workers,
         .distortion = static_cast<Distortion>(call->distortion),
         .step = call->step,
         .plan = call->plan,
         .span_ends = call->span_ends,
         .idle = call->idle,
         .verdict = call->verdict,
         .round = call->round,
         .workspace = call->workspace,
         .worst_status = call->worst_status},
        static_cast<cudaStream_t>(call->stream));
  });
}

int64_t call_measure_zeroed_bytes() { return kMeasureZeroedBytes; }

int64_t call_measure_workspace(const MeasureCall* call) { return measure_workspace_bytes(payload_of(*call)); }

const char* call_measure(const MeasureCall* call) {
  const PayloadLayout layout = payload_of(*call);
  allow(call->payloads, call->workers * layout.bytes, false);
  allow(call->gradient, layout.numel * value_bytes(layout.type), false);
  allow(call->squared_norm, 8, true);
  allow(call->workspace, call_measure_workspace(call), true);
  return run([&] {
    return launch_measure(
        {.layout = layout,
         .payloads = call->payloads,
         .workers = call->workers,
         .gradient = call->gradient,
         .squared_norm = call->squared_norm,
         .workspace = call->workspace},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_settle(const SettleCall* call) {
  const ValueType type = static_cast<ValueType>(call->type);
  allow(call->sent, call->sent_bytes, call->spans.ends != nullptr && call->masks == 0);
  allow(call->residual, call->numel * accumulate_bytes(type), true);
  allow(call->spans);
  return run([&] {
    return launch_settle(
        {.sent = call->sent,
         .sent_bytes = call->sent_bytes,
         .type = type,
         .numel = call->numel,
         .residual = call->residual,
         .spans = launch_of(call->spans),
         .masks = call->masks != 0},
        static_cast<cudaStream_t>(call->stream));
  });
}

int64_t call_correct_zeroed_bytes() { return kCorrectZeroedBytes; }

int64_t call_correct_workspace(const CorrectCall* call) { return correct_workspace_bytes(call->numel); }

const char* call_correct(const CorrectCall* call) {
  const ValueType type = static_cast<ValueType>(call->type);
  allow(call->given, call->numel * value_bytes(type), true);  // before the gradient, whose memory it may be
  allow(call->gradient, call->numel * value_bytes(type), false);
  allow(call->velocity, call->numel * accumulate_bytes(type), true);
  allow(call->span_ends, (call->spans + 1) * 8, false);
  allow(call->workspace, call_correct_workspace(call), true);
  return run([&] {
    return launch_correct(
        {.type = type,
         .numel = call->numel,
         .gradient = call->gradient,
         .given = call->given,
         .velocity = call->velocity,
         .span_ends = call->span_ends,
         .spans = call->spans,
         .momentum = call->momentum,
         .nesterov = call->nesterov != 0,
         .largest_norm = call->largest_norm,
         .workspace = call->workspace},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_judge(const JudgeCall* call) {
  const ValueType type = static_cast<ValueType>(call->type);
  allow(call->values, call->numel * value_bytes(type), false);
  allow(call->verdict, 8, true);
  return run([&] {
    return launch_judge(
        {.values = call->values, .numel = call->numel, .type = type, .verdict = call->verdict, .round = call->round},
        static_cast<cudaStream_t>(call->stream));
  });
}

int64_t call_wire_bytes(const WireCall* call) { return wire_of(*call).bytes; }

int64_t call_to_wire_workspace(const WireCall* call) { return to_wire_workspace_bytes(payload_of(*call), wire_of(*call)); }

int64_t call_from_wire_workspace(const WireCall* call) {
  return from_wire_workspace_bytes(payload_of(*call), wire_of(*call), call->workers);
}

const char* call_to_wire(const WireCall* call) {
  const PayloadLayout layout = payload_of(*call);
  const WireLayout wire = wire_of(*call);
  allow(call->payloads, layout.bytes, true);
  allow(call->residual, layout.numel * accumulate_bytes(layout.type), true);
  allow(call->wire, wire.bytes, true);
  allow(call->workspace, call_to_wire_workspace(call), true);
  return run([&] {
    return launch_to_wire(
        {.layout = layout,
         .wire = wire,
         .payload = call->payloads,
         .residual = call->residual,
         .bytes = call->wire,
         .workspace = call->workspace},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_from_wire(const WireCall* call) {
  const PayloadLayout layout = payload_of(*call);
  const WireLayout wire = wire_of(*call);
  allow(call->payloads, call->workers * layout.bytes, true);
  allow(call->wire, call->workers * wire.bytes, false);
  allow(call->workspace, call_from_wire_workspace(call), true);
  return run([&] {
    return launch_from_wire(
        {.layout = layout,
         .wire = wire,
         .bytes = call->wire,
         .workers = call->workers,
         .payloads = call->payloads,
         .workspace = call->workspace},
        static_cast<cudaStream_t>(call->stream));
  });
}

int64_t call_take_room(const TakeCall* call) { return take_room_bytes(payload_of(call->wire), wire_of(call->wire)); }

const char* call_take(const TakeCall* call) {
  const PayloadLayout layout = payload_of(call->wire);
  const WireLayout wire = wire_of(call->wire);
  allow(call->wire.payloads, layout.bytes, true);
  allow(call->wire.residual, layout.numel * accumulate_bytes(layout.type), true);
  allow(call->wire.wire, wire.values_at, false);
  allow(call->wire.workspace, aggregate_workspace_bytes(layout), true);
  allow(call->room, call_take_room(call), true);
  allow(call->span_ends, (layout.spans + 1) * 8, false);
  allow(call->idle, layout.spans, false);
  allow(call->worst_status, sizeof *call->worst_status, true);
  return run([&] {
    return launch_take(
        {.layout = layout,
         .wire = wire,
         .lead = call->wire.wire,
         .leader = call->leader,
         .step = call->step,
         .plan = call->plan,
         .payload = call->wire.payloads,
         .residual = call->wire.residual,
         .span_ends = call->span_ends,
         .idle = call->idle,
         .worst_status = call->worst_status,
         .workspace = call->wire.workspace,
         .room = call->room},
        static_cast<cudaStream_t>(call->wire.stream));
  });
}

const char* call_average_slice(const AverageSliceCall* call) {
  allow(call->rows, call->wire.workers * call->row_bytes, false);
  allow(call->averages, call->averages_bytes, true);
  allow(call->worst_status, sizeof *call->worst_status, true);
  return run([&] {
    return launch_average_slice(
        {.layout = payload_of(call->wire),
         .wire = wire_of(call->wire),
         .rows = call->rows,
         .workers = call->wire.workers,
         .row_bytes = call->row_bytes,
         .step = call->step,
         .plan = call->plan,
         .averages = call->averages,
         .worst_status = call->worst_status},
        static_cast<cudaStream_t>(call->stream));
  });
}

int64_t call_spread_room(const SpreadCall* call) { return spread_room_bytes(payload_of(*call)); }

const char* call_spread(const SpreadCall* call) {
  const PayloadLayout layout = payload_of(*call);
  allow(*call);
  allow(call->payload, layout.values_at, false);
  allow(call->gradient, layout.numel * value_bytes(layout.type), true);
  allow(call->idle, layout.spans, true);
  allow(call->verdict, 8, true);
  allow(call->worst_status, sizeof *call->worst_status, true);
  allow(call->workspace, aggregate_workspace_bytes(layout), true);
  allow(call->room, call_spread_room(call), true);
  return run([&] {
    return launch_spread(
        {.layout = layout,
         .received = received_of(*call),
         .payload = call->payload,
         .gradient = call->gradient,
         .span_ends = call->span_ends,
         .idle = call->idle,
         .verdict = call->verdict,
         .round = call->round,
         .worst_status = call->worst_status,
         .workspace = call->workspace,
         .room = call->room},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_feedback(const SpreadCall* call) {
  const PayloadLayout layout = payload_of(*call);
  allow(*call);
  allow(call->payload, layout.bytes, false);
  allow(call->idle, layout.spans, false);
  allow(call->feedback, layout.k * accumulate_bytes(layout.type), true);
  return run([&] {
    return launch_feedback(
        {.layout = layout,
         .received = received_of(*call),
         .payload = call->payload,
         .span_ends = call->span_ends,
         .idle = call->idle,
         .distortion = static_cast<Distortion>(call->distortion),
         .feedback = call->feedback},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_split(const PartsCall* call) {
  allow(*call, /*rows_are_written=*/true);
  return run([&] {
    return launch_split(
        {.parts = launch_of(*call), .gradient = call->gradient, .rows = call->rows, .scale = call->scale, .deed = call->deed},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_mean(const PartsCall* call) {
  allow(call->rows, call->ranks * call->row_bytes, false);
  allow(call->row, kPartHeadBytes + call->entries * value_bytes(static_cast<ValueType>(call->type)), true);
  allow(call->found, 2 * sizeof *call->found, true);
  return run([&] {
    return launch_mean(
        {.type = static_cast<ValueType>(call->type),
         .rows = call->rows,
         .ranks = call->ranks,
         .row_bytes = call->row_bytes,
         .entries = call->entries,
         .step = call->step,
         .plan = call->plan,
         .scale = call->scale,
         .deed = call->deed,
         .row = call->row,
         .found = call->found},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_join(const PartsCall* call) {
  allow(*call, /*rows_are_written=*/false);
  allow(call->verdict, 8, true);
  allow(call->worst_status, sizeof *call->worst_status, true);
  return run([&] {
    return launch_join(
        {.parts = launch_of(*call),
         .rows = call->rows,
         .gradient = call->gradient,
         .verdict = call->verdict,
         .round = call->round,
         .worst_status = call->worst_status},
        static_cast<cudaStream_t>(call->stream));
  });
}

const char* call_mark(uint8_t* message, int64_t bytes, const unsigned long long* found, unsigned long long* worst_status, void* stream) {
  allow(message, bytes, true);
  allow(found, 2 * sizeof *found, false);
  allow(worst_status, 2 * sizeof *worst_status, true);
  return run(
      [&] { return launch_mark({.message = message, .found = found, .worst_status = worst_status}, static_cast<cudaStream_t>(stream)); });
}

}  // extern "C"
