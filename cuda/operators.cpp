// Registers the kernels as the CUDA implementation of the operators; built in place of csrc/ops/without_cuda.cpp.
//
// The tensor contracts are those of the CPU operators, from the one place that has them. What only the bytes of a payload
// can tell is checked on the device (launch.h), because nothing here waits for it.
#include "operators.h"

#include <torch/library.h>

namespace regtopk {
namespace {

SpansLaunch check_flags_of_spans(
    const char* who, const at::Tensor& spans, const at::Tensor& idle, const at::Tensor& verdict, const std::optional<at::Tensor>& applied,
    int64_t sent_round, const at::Device& device) {
  const int64_t count = spans.numel() - 1;
  check_flags(who, "idle", idle, count);
  check_on_device(who, "spans", spans, device);
  check_on_device(who, "idle", idle, device);
  if (applied) {
    check_flags(who, "applied", *applied, count);
    check_on_device(who, "applied", *applied, device);
  }
  return {
      .ends = spans.const_data_ptr<int64_t>(),
      .count = count,
      .idle = idle.const_data_ptr<uint8_t>(),
      .verdict = entry_of(who, verdict, sent_round, device),
      .sent_round = sent_round,
      .applied = applied ? applied->const_data_ptr<uint8_t>() : nullptr};
}

SpansLaunch check_shared(
    const char* who, const at::Tensor& spans, const at::Tensor& idle, const at::Tensor& verdict, const std::optional<at::Tensor>& applied,
    const at::Tensor& counters, int64_t sent_round, const at::Device& device) {
  SpansLaunch result = check_flags_of_spans(who, spans, idle, verdict, applied, sent_round, device);
  check_counters(who, counters);
  check_on_device(who, "counters", counters, device);
  result.counters = counters.mutable_data_ptr<int64_t>();
  return result;
}

void check_payload_tensor(const char* who, const char* name, const at::Tensor& payload, const at::Device& device) {
  check_vector(who, name, payload, at::kByte, payload.numel());
  check_on_device(who, name, payload, device);
  TORCH_CHECK_VALUE(
      payload.numel() >= static_cast<int64_t>(sizeof(PayloadHeader)), who, ": expected ", name, " of at least ", sizeof(PayloadHeader),
      " bytes, got ", payload.numel());
  check_aligned(who, name, payload.const_data_ptr());
}

// Never freed: the CUDA runtime may be gone at exit.
Workspaces& compress_workspaces() {
  static auto* const workspaces = new Workspaces(4);  // a quarter of the bucket's bytes each; with levels on streams of futures
  return *workspaces;
}
Workspaces& measure_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}
Workspaces& correct_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}
Workspaces& to_wire_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}
Workspaces& from_wire_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}

void compress_cuda(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& idle,
    const std::optional<at::Tensor>& verdict, const std::optional<at::Tensor>& applied, const std::optional<at::Tensor>& counters,
    int64_t k, double mu, double decay, c10::string_view distortion, int64_t step, int64_t plan, double scale, int64_t deed,
    int64_t sent_round, bool, at::OptionalIntArrayRef, bool choose, int64_t chunk, int64_t chunk_k) {
  constexpr const char* who = "compress_";
  TORCH_CHECK_NOT_IMPLEMENTED(
      chunk <= kLargestChunkOfDevice, who, ": expected chunks of at most ", kLargestChunkOfDevice, " entries with CUDA tensors, got ",
      chunk);
  const int64_t numel = gradient.numel();
  CompressLaunch arguments{.layout = check_bucket(who, gradient, k, count_spans(who, spans, numel)), .spans = {}, .sampling = {}};
  const at::Device device = gradient.device();
  const at::ScalarType accumulate = accumulate_dtype(gradient.scalar_type());
  check_countable(who, numel);
  check_vector(who, "residual", residual, accumulate, numel);
  check_vector(who, "payload", payload, at::kByte, arguments.layout.bytes);
  check_on_device(who, "residual", residual, device);
  check_on_device(who, "payload", payload, device);
  arguments.distortion = distortion_of(who, distortion);
  arguments.mu = checked_mu(who, mu);
  arguments.decay = checked_decay(who, decay);
  TORCH_CHECK_VALUE(!feedback || sent, who, ": expected feedback together with the payload it belongs to, got feedback alone");
  if (sent) {
    check_payload_tensor(who, "sent", *sent, device);
    TORCH_CHECK_VALUE(!sent->is_alias_of(payload), who, ": expected payload and sent in different memory, got the same");
    arguments.sent = sent->const_data_ptr<uint8_t>();
    arguments.sent_bytes = sent->numel();
  }
  if (feedback) {
    check_vector(who, "feedback", *feedback, accumulate, feedback->numel());
    check_on_device(who, "feedback", *feedback, device);
    arguments.feedback = feedback->const_data_ptr();
    arguments.feedback_entries = feedback->numel();
  }
  TORCH_CHECK_VALUE(
      !spans || (idle && verdict && counters), who, ": expected idle, verdict and counters together with spans, got spans alone");
  if (spans) {
    arguments.spans = check_shared(who, *spans, *idle, *verdict, applied, *counters, sent_round, device);
    arguments.scale = scale;
    arguments.deed = static_cast<uint64_t>(deed);
  }
  arguments.gradient = gradient.const_data_ptr();
  arguments.residual = residual.mutable_data_ptr();
  arguments.payload = payload.mutable_data_ptr<uint8_t>();
  check_aligned(who, "gradient", arguments.gradient);
  check_aligned(who, "residual", arguments.residual);
  check_aligned(who, "payload", arguments.payload);
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);
  arguments.chunks = checked_chunks(who, arguments.layout, chunk, chunk_k);
  arguments.choose = choose;
  if (!arguments.chunks && !arguments.is_whole()) arguments.sampling = sampling_of(numel, k);

  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  const int64_t workspace_bytes = compress_workspace_bytes(arguments.layout, feedback.has_value(), arguments.sampling);
  compress_workspaces().with(who, stream, workspace_bytes, kZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_compress(arguments, stream);
  });
}

void aggregate_cuda(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback,
    const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& idle, const std::optional<at::Tensor>& verdict,
    const std::optional<at::Tensor>& status, int64_t k, int64_t rank, c10::string_view distortion, int64_t step, int64_t plan,
    int64_t round) {
  constexpr const char* who = "aggregate_";
  AggregateLaunch arguments{.layout = check_bucket(who, gradient, k, count_spans(who, spans, gradient.numel()))};
  const at::Device device = gradient.device();
  check_countable(who, gradient.numel());
  check_rows(who, "payloads", payloads, arguments.layout.bytes);
  check_on_device(who, "payloads", payloads, device);
  arguments.workers = payloads.size(0);
  arguments.payloads = payloads.const_data_ptr<uint8_t>();
  arguments.distortion = distortion_of(who, distortion);
  if (feedback) {
    check_feedback_rows(who, *feedback, accumulate_dtype(gradient.scalar_type()), arguments.layout, rank, arguments.workers);
    check_on_device(who, "feedback", *feedback, device);
    arguments.feedback = feedback->mutable_data_ptr();
    arguments.first_feedback_worker = rank;
    arguments.feedback_workers = feedback->size(0);
  }
  TORCH_CHECK_VALUE(!spans || (idle && verdict), who, ": expected idle and verdict together with spans, got spans alone");
  if (spans) {
    check_flags(who, "idle", *idle, arguments.layout.spans);
    check_on_device(who, "spans", *spans, device);
    check_on_device(who, "idle", *idle, device);
    arguments.span_ends = spans->const_data_ptr<int64_t>();
    arguments.idle = idle->mutable_data_ptr<uint8_t>();
    arguments.verdict = entry_of(who, *verdict, round, device);
    arguments.round = round;
  }
  arguments.worst_status = worst_status_of(who, status, device);
  arguments.gradient = gradient.mutable_data_ptr();
  check_aligned(who, "gradient", arguments.gradient);
  check_aligned(who, "payloads", arguments.payloads);
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);

  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  aggregate_workspaces().with(who, stream, aggregate_workspace_bytes(arguments.layout), kAggregateZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_aggregate(arguments, stream);
  });
}

void measure_cuda(const at::Tensor& gradient, const at::Tensor& payloads, const at::Tensor& squared_norm, int64_t k, int64_t spans) {
  constexpr const char* who = "measure_";
  const at::Device device = gradient.device();
  check_countable(who, gradient.numel());
  check_span_count(who, spans);
  MeasureLaunch arguments{.layout = check_bucket(who, gradient, k, spans)};
  check_rows(who, "payloads", payloads, arguments.layout.bytes);
  check_vector(who, "squared_norm", squared_norm, at::kDouble, 1);
  check_on_device(who, "payloads", payloads, device);
  check_on_device(who, "squared_norm", squared_norm, device);
  arguments.payloads = payloads.const_data_ptr<uint8_t>();
  arguments.workers = payloads.size(0);
  arguments.gradient = gradient.const_data_ptr();
  arguments.squared_norm = squared_norm.mutable_data_ptr<double>();
  check_aligned(who, "payloads", arguments.payloads);

  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  measure_workspaces().with(who, stream, measure_workspace_bytes(arguments.layout), kMeasureZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_measure(arguments, stream);
  });
}

void judge_cuda(const at::Tensor& tensor, const at::Tensor& verdict, int64_t round) {
  constexpr const char* who = "judge_";
  const at::Device device = tensor.device();
  JudgeLaunch arguments{.numel = tensor.numel(), .type = value_type_of(who, tensor.scalar_type()), .round = round};
  TORCH_CHECK_VALUE(tensor.is_contiguous(), who, ": expected a contiguous tensor, got strides ", tensor.strides());
  arguments.values = tensor.const_data_ptr();
  arguments.verdict = entry_of(who, verdict, round, device);
  if (arguments.verdict == nullptr) return;
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_judge(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

// `sent` is written with spans alone, and not by what masks.
void settle(
    const char* who, const char* name, const at::Tensor& residual, const at::Tensor& sent, at::ScalarType dtype, const SpansLaunch& spans,
    bool masks = false) {
  const at::Device device = residual.device();
  check_countable(who, residual.numel());
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  check_payload_tensor(who, name, sent, device);
  const SettleLaunch arguments{
      .sent = sent.mutable_data_ptr<uint8_t>(),
      .sent_bytes = sent.numel(),
      .type = value_type_of(who, dtype),
      .numel = residual.numel(),
      .residual = residual.mutable_data_ptr(),
      .spans = spans,
      .masks = masks};
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_settle(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void settle_cuda(
    const at::Tensor& residual, const at::Tensor& sent, const at::Tensor& spans, const at::Tensor& idle, const at::Tensor& verdict,
    const std::optional<at::Tensor>& applied, const at::Tensor& counters, at::ScalarType dtype, int64_t sent_round) {
  constexpr const char* who = "settle_";
  count_spans(who, spans, residual.numel());
  settle(who, "sent", residual, sent, dtype, check_shared(who, spans, idle, verdict, applied, counters, sent_round, residual.device()));
}

void mask_cuda(
    const at::Tensor& velocity, const at::Tensor& sent, const at::Tensor& spans, const at::Tensor& idle, const at::Tensor& verdict,
    const std::optional<at::Tensor>& applied, at::ScalarType dtype, int64_t sent_round) {
  constexpr const char* who = "mask_";
  count_spans(who, spans, velocity.numel());
  settle(
      who, "sent", velocity, sent, dtype, check_flags_of_spans(who, spans, idle, verdict, applied, sent_round, velocity.device()),
      /*masks=*/true);
}

void correct_cuda(
    const at::Tensor& gradient, const at::Tensor& given, const std::optional<at::Tensor>& velocity, const at::Tensor& spans,
    double momentum, bool nesterov, double largest_norm) {
  constexpr const char* who = "correct_";
  const at::Device device = gradient.device();
  const at::ScalarType dtype = gradient.scalar_type();
  CorrectLaunch arguments{
      .type = value_type_of(who, dtype),
      .numel = gradient.numel(),
      .spans = count_spans(who, spans, gradient.numel()),
      .momentum = momentum,
      .nesterov = nesterov,
      .largest_norm = largest_norm};
  check_countable(who, arguments.numel);
  check_vector(who, "gradient", gradient, dtype, arguments.numel);
  check_vector(who, "given", given, dtype, arguments.numel);
  check_on_device(who, "given", given, device);
  check_on_device(who, "spans", spans, device);
  if (velocity) {
    check_vector(who, "velocity", *velocity, accumulate_dtype(dtype), arguments.numel);
    check_on_device(who, "velocity", *velocity, device);
    arguments.velocity = velocity->mutable_data_ptr();
    check_aligned(who, "velocity", arguments.velocity);
  }
  arguments.gradient = gradient.const_data_ptr();
  arguments.given = given.mutable_data_ptr();
  arguments.span_ends = spans.const_data_ptr<int64_t>();
  check_aligned(who, "gradient", arguments.gradient);
  check_aligned(who, "given", arguments.given);
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  correct_workspaces().with(who, stream, correct_workspace_bytes(arguments.numel), kCorrectZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_correct(arguments, stream);
  });
}

void put_back_cuda(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  settle("put_back_", "payload", residual, payload, dtype, {});
}

void to_wire_cuda(
    const at::Tensor& residual, const at::Tensor& payload, const at::Tensor& wire, at::ScalarType dtype, at::ScalarType wire_dtype,
    bool elias_fano, int64_t k, int64_t spans) {
  constexpr const char* who = "to_wire_";
  const at::Device device = residual.device();
  const auto [layout, wire_layout] = check_wire(who, residual.numel(), k, spans, dtype, {wire_dtype, elias_fano});
  check_countable(who, residual.numel());
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  check_vector(who, "payload", payload, at::kByte, layout.bytes);
  check_vector(who, "wire", wire, at::kByte, wire_layout.bytes);
  check_on_device(who, "payload", payload, device);
  check_on_device(who, "wire", wire, device);
  ToWireLaunch arguments{
      .layout = layout,
      .wire = wire_layout,
      .payload = payload.mutable_data_ptr<uint8_t>(),
      .residual = residual.mutable_data_ptr(),
      .bytes = wire.mutable_data_ptr<uint8_t>()};
  check_aligned(who, "payload", arguments.payload);
  check_aligned(who, "wire", arguments.bytes);
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  to_wire_workspaces().with(who, stream, to_wire_workspace_bytes(layout, wire_layout), 0, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_to_wire(arguments, stream);
  });
}

void from_wire_cuda(
    const at::Tensor& wire, const at::Tensor& payloads, at::ScalarType dtype, at::ScalarType wire_dtype, bool elias_fano, int64_t numel,
    int64_t k, int64_t spans) {
  constexpr const char* who = "from_wire_";
  const at::Device device = payloads.device();
  const auto [layout, wire_layout] = check_wire(who, numel, k, spans, dtype, {wire_dtype, elias_fano});
  check_countable(who, numel);
  check_wire_rows(who, wire, wire_layout, payloads, layout);
  check_on_device(who, "wire", wire, device);
  FromWireLaunch arguments{
      .layout = layout,
      .wire = wire_layout,
      .bytes = wire.const_data_ptr<uint8_t>(),
      .workers = wire.size(0),
      .payloads = payloads.mutable_data_ptr<uint8_t>()};
  check_aligned(who, "wire", arguments.bytes);
  check_aligned(who, "payloads", arguments.payloads);
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  const int64_t workspace_bytes = from_wire_workspace_bytes(layout, wire_layout, arguments.workers);
  from_wire_workspaces().with(who, stream, workspace_bytes, 0, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_from_wire(arguments, stream);
  });
}

// A change of layout is rare: through the host, which waits for the device.
at::Tensor encode_cuda(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan, int64_t spans) {
  return encode(indices.cpu(), values.cpu(), numel, step, plan, spans).to(indices.device());
}

std::tuple<at::Tensor, at::Tensor> decode_cuda(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype) {
  const auto [indices, values] = decode(payload.cpu(), numel, k, dtype);
  return {indices.to(payload.device()), values.to(payload.device())};
}

}  // namespace

bool has_cuda_kernels() { return true; }

TORCH_LIBRARY_IMPL(regtopk, CUDA, library) {
  library.impl("compress_", &compress_cuda);
  library.impl("aggregate_", &aggregate_cuda);
  library.impl("measure_", &measure_cuda);
  library.impl("correct_", &correct_cuda);
  library.impl("mask_", &mask_cuda);
  library.impl("judge_", &judge_cuda);
  library.impl("settle_", &settle_cuda);
  library.impl("put_back_", &put_back_cuda);
  library.impl("to_wire_", &to_wire_cuda);
  library.impl("from_wire_", &from_wire_cuda);
  library.impl("encode", &encode_cuda);
  library.impl("decode", &decode_cuda);
}

}  // namespace regtopk
