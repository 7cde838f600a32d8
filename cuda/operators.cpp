// Registers the kernels as the CUDA implementation of the operators; built in place of csrc/ops/without_cuda.cpp.
//
// The tensor contracts are those of the CPU operators, from the one place that has them. What only the bytes of a payload
// can tell is checked on the device (launch.h), because nothing here waits for it.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>
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
  // The error may be that of a kernel that ran before: the CUDA runtime reports it to whoever asks next.
  TORCH_CHECK(
      error == cudaSuccess, who, ": expected the kernels to launch, got ", cudaGetErrorString(error),
      "; the kernels may have failed to launch, or an earlier kernel of this process failed");
}

bool is_capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// The workspaces of one operator. One is kept for each stream and grows to what its largest bucket needs: calls on a stream
// come one after the other, and each leaves the zeros that the next one expects (launch.h). A captured call takes one of its
// own from the graph's memory and zeroes it in the graph, because the graph may be replayed on any stream.
class Workspaces {
 public:
  // Calls launch(address) and checks what it returns. No other thread launches meanwhile: kernels of two calls that share a
  // workspace must not be mixed on the stream.
  template <typename Launch>
  void with(const char* who, const c10::cuda::CUDAStream& stream, int64_t bytes, int64_t zeroed_bytes, const Launch& launch) {
    if (is_capturing()) {
      const at::Tensor workspace = make(stream.device(), bytes, zeroed_bytes);
      check_launched(who, launch(workspace.mutable_data_ptr()));
      return;
    }
    const std::lock_guard lock(mutex_);
    at::Tensor& kept = kept_[{stream.device_index(), stream.id()}];
    if (!kept.defined() || kept.numel() < bytes) kept = make(stream.device(), bytes, zeroed_bytes);
    const cudaError_t error = launch(kept.mutable_data_ptr());
    if (error != cudaSuccess) kept.reset();  // its zeros may be gone
    check_launched(who, error);
  }

 private:
  static at::Tensor make(const at::Device& device, int64_t bytes, int64_t zeroed_bytes) {
    at::Tensor workspace = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    workspace.narrow(0, 0, zeroed_bytes).zero_();
    return workspace;
  }

  std::mutex mutex_;
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, at::Tensor> kept_;
};

// Never freed: the CUDA runtime may be gone at exit.
Workspaces& compress_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}
Workspaces& aggregate_workspaces() {
  static auto* const workspaces = new Workspaces;
  return *workspaces;
}

// One word per device: the lowest status of all calls of aggregate_, kPayloadsValid while every payload was valid. It stays
// allocated for the life of the process. A reader that waits for the stream anyway, such as stats() or check(), copies it
// from here. The first call on a device fills it and waits until it is filled, for the calls on other streams; so the first
// call is refused in a graph capture, whose replays would fill the word again.
unsigned long long* worst_status_on(const char* who, const at::Device& device) {
  static std::mutex mutex;
  static auto* const words = new std::vector<at::Tensor>;  // never freed: the CUDA runtime may be gone at exit
  const std::lock_guard lock(mutex);
  const size_t index = static_cast<size_t>(device.index());
  if (words->size() <= index) words->resize(index + 1);
  at::Tensor& word = (*words)[index];
  if (!word.defined()) {
    TORCH_CHECK(
        !is_capturing(), who, ": expected a first call on ", device,
        " before a graph capture, got one inside it; call it once, then capture");
    static_assert(kPayloadsValid == ~0ull);
    const at::Tensor filled = at::full({1}, -1, at::TensorOptions().dtype(at::kLong).device(device));
    check_launched(who, cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream(device.index())));
    word = filled;
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
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  const int64_t workspace_bytes = compress_workspace_bytes(arguments.layout, feedback.has_value(), arguments.sampling);
  compress_workspaces().with(who, stream, workspace_bytes, kZeroedBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_compress(arguments, stream);
  });
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
  arguments.worst_status = worst_status_on(who, device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  aggregate_workspaces().with(who, stream, kAggregateWorkspaceBytes, kAggregateWorkspaceBytes, [&](void* workspace) {
    arguments.workspace = workspace;
    return launch_aggregate(arguments, stream);
  });
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
