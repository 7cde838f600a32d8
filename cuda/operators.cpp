// Registers the kernels as the CUDA implementation of the operators; built in place of csrc/ops/without_cuda.cpp.
//
// The tensor contracts are those of the CPU operators, from the one place that has them. What only the bytes of a payload
// can tell is checked on the device (launch.h), because nothing here waits for it.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <mutex>
#include <vector>

#include "../csrc/ops/checks.h"
#include "../csrc/ops/operators.h"
#include "launch.h"

namespace regtopk {
namespace {

void check_on_device(const char* who, const char* name, const at::Tensor& tensor, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, who, ": expected ", name, " on ", device, " like the gradient, got ", tensor.device());
}

void check_aligned(const char* who, const char* name, const void* pointer) {
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0, who, ": expected ", name, " at a multiple of ", kAlignment,
      " bytes, got an address ", reinterpret_cast<uintptr_t>(pointer) % kAlignment,
      " beyond one; pass a tensor with memory of its own, not a slice");
}

void check_no_spans(const char* who, const std::optional<at::Tensor>& spans) {
  TORCH_CHECK_NOT_IMPLEMENTED(!spans, who, ": expected a bucket without spans on CUDA, got spans; this version exchanges CPU gradients");
}

void check_countable(const char* who, int64_t numel) {
  TORCH_CHECK_VALUE(numel <= kMaxEntries, who, ": expected at most 2^32 - 1 gradient entries on CUDA, got ", numel);
}

void check_launched(const char* who, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, who, ": expected the kernels to launch, got ", cudaGetErrorString(error));
}

at::Tensor workspace_on(const at::Device& device, int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// One word per device: the lowest status of all calls of aggregate_, kPayloadsValid while every payload was valid. It stays
// allocated for the life of the process. A reader that waits for the stream anyway, such as stats() or check(), copies it
// from here. The first call on a device fills it, so that call must not be part of a captured graph.
unsigned long long* worst_status_on(const at::Device& device) {
  static std::mutex mutex;
  static auto* const words = new std::vector<at::Tensor>;  // never freed: the CUDA runtime may be gone at exit
  const std::lock_guard lock(mutex);
  const size_t index = static_cast<size_t>(device.index());
  if (words->size() <= index) words->resize(index + 1);
  at::Tensor& word = (*words)[index];
  if (!word.defined()) {
    static_assert(kPayloadsValid == ~0ull);
    word = at::full({1}, -1, at::TensorOptions().dtype(at::kLong).device(device));
  }
  return reinterpret_cast<unsigned long long*>(word.mutable_data_ptr<int64_t>());
}

void compress_cuda(
    const at::Tensor& gradient, const at::Tensor& residual, const at::Tensor& payload, const std::optional<at::Tensor>& sent,
    const std::optional<at::Tensor>& feedback, const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t k, double mu,
    c10::string_view distortion, int64_t step, int64_t plan, double, int64_t, int64_t, bool, at::OptionalIntArrayRef) {
  constexpr const char* who = "compress_";
  check_no_spans(who, spans);
  CompressLaunch arguments{.layout = check_bucket(who, gradient, k), .sampling = {}};
  const int64_t numel = gradient.numel();
  const at::Device device = gradient.device();
  const at::ScalarType accumulate = accumulate_dtype(gradient.scalar_type());
  check_countable(who, numel);
  check_vector(who, "residual", residual, accumulate, numel);
  check_vector(who, "payload", payload, at::kByte, arguments.layout.bytes);
  check_on_device(who, "residual", residual, device);
  check_on_device(who, "payload", payload, device);
  arguments.distortion = distortion_of(who, distortion);
  arguments.mu = checked_mu(who, mu);
  TORCH_CHECK_VALUE(!feedback || sent, who, ": expected feedback together with the payload it belongs to, got feedback alone");
  if (sent) {
    check_vector(who, "sent", *sent, at::kByte, sent->numel());
    check_on_device(who, "sent", *sent, device);
    TORCH_CHECK_VALUE(
        sent->numel() >= static_cast<int64_t>(sizeof(PayloadHeader)), who, ": expected sent of at least ", sizeof(PayloadHeader),
        " bytes, got ", sent->numel());
    TORCH_CHECK_VALUE(!sent->is_alias_of(payload), who, ": expected payload and sent in different memory, got the same");
    arguments.sent = sent->const_data_ptr<uint8_t>();
    arguments.sent_bytes = sent->numel();
    check_aligned(who, "sent", arguments.sent);
  }
  if (feedback) {
    check_vector(who, "feedback", *feedback, accumulate, feedback->numel());
    check_on_device(who, "feedback", *feedback, device);
    arguments.feedback = feedback->const_data_ptr();
    arguments.feedback_entries = feedback->numel();
  }
  arguments.gradient = gradient.const_data_ptr();
  arguments.residual = residual.mutable_data_ptr();
  arguments.payload = payload.mutable_data_ptr<uint8_t>();
  check_aligned(who, "gradient", arguments.gradient);
  check_aligned(who, "residual", arguments.residual);
  check_aligned(who, "payload", arguments.payload);
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);
  arguments.sampling = sampling_of(numel, k);

  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor workspace = workspace_on(device, compress_workspace_bytes(arguments.layout, feedback.has_value(), arguments.sampling));
  arguments.workspace = workspace.mutable_data_ptr();
  check_launched(who, launch_compress(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void aggregate_cuda(
    const at::Tensor& gradient, const at::Tensor& payloads, const std::optional<at::Tensor>& feedback,
    const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t k, int64_t rank,
    c10::string_view distortion, int64_t step, int64_t plan, int64_t) {
  constexpr const char* who = "aggregate_";
  check_no_spans(who, spans);
  AggregateLaunch arguments{.layout = check_bucket(who, gradient, k)};
  const at::Device device = gradient.device();
  check_countable(who, gradient.numel());
  check_payloads(who, payloads, arguments.layout);
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
  arguments.gradient = gradient.mutable_data_ptr();
  check_aligned(who, "gradient", arguments.gradient);
  check_aligned(who, "payloads", arguments.payloads);
  arguments.step = static_cast<uint64_t>(step);
  arguments.plan = static_cast<uint64_t>(plan);

  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor workspace = workspace_on(device, kAggregateWorkspaceBytes);
  arguments.workspace = workspace.mutable_data_ptr();
  arguments.worst_status = worst_status_on(device);
  check_launched(who, launch_aggregate(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
}

void put_back_cuda(const at::Tensor& residual, const at::Tensor& payload, at::ScalarType dtype) {
  constexpr const char* who = "put_back_";
  const at::Device device = residual.device();
  check_countable(who, residual.numel());
  check_vector(who, "residual", residual, accumulate_dtype(dtype), residual.numel());
  check_vector(who, "payload", payload, at::kByte, payload.numel());
  check_on_device(who, "payload", payload, device);
  TORCH_CHECK_VALUE(
      payload.numel() >= static_cast<int64_t>(sizeof(PayloadHeader)), who, ": expected payload of at least ", sizeof(PayloadHeader),
      " bytes, got ", payload.numel());
  const PutBackLaunch arguments{
      .payload = payload.const_data_ptr<uint8_t>(),
      .payload_bytes = payload.numel(),
      .type = value_type_of(who, dtype),
      .numel = residual.numel(),
      .residual = residual.mutable_data_ptr()};
  check_aligned(who, "payload", arguments.payload);
  const c10::cuda::CUDAGuard guard(device);
  check_launched(who, launch_put_back(arguments, c10::cuda::getCurrentCUDAStream(device.index())));
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

TORCH_LIBRARY_IMPL(regtopk, CUDA, library) {
  library.impl("compress_", &compress_cuda);
  library.impl("aggregate_", &aggregate_cuda);
  library.impl("put_back_", &put_back_cuda);
  library.impl("encode", &encode_cuda);
  library.impl("decode", &decode_cuda);
}

}  // namespace regtopk
