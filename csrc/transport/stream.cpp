#include "stream.h"

#include <ATen/core/grad_mode.h>

#include <chrono>
#include <thread>
#include <utility>

namespace regtopk {

StreamTransport::StreamTransport(
    c10::intrusive_ptr<c10d::Backend> group, at::DeviceType device_type, std::unique_ptr<GlooTransport> gloo, std::string who)
    : who_(std::move(who)), device_type_(device_type), group_(std::move(group)), gloo_(std::move(gloo)) {}

Transport::FuturePtr StreamTransport::gather(const at::Tensor& payload, const at::Tensor& received, Bucket bucket) {
  if (payload.device().type() != device_type_) return gloo_->gather(payload, received, std::move(bucket));
  return issue(std::move(bucket), [&](c10d::Backend& group) { return all_gather(group, received, payload); });
}

Transport::FuturePtr StreamTransport::all_reduce(Bucket bucket) {
  // NCCL adds up no sparse tensors.
  if (bucket.result.device().type() != device_type_ || bucket.result.is_sparse()) return gloo_->all_reduce(std::move(bucket));
  std::vector<at::Tensor> tensors{bucket.result};
  return issue(std::move(bucket), [&](c10d::Backend& group) { return group.allreduce(tensors); });
}

template <typename Collective>
Transport::FuturePtr StreamTransport::issue(Bucket bucket, const Collective& collective) {
  WorkPtr work;
  try {
    c10::intrusive_ptr<c10d::Backend> group;
    {
      const std::lock_guard lock(mutex_);
      TORCH_CHECK(group_, who_, ": expected an open exchange, got one that was closed");
      group = group_;
    }
    work = collective(*group);
  } catch (...) {
    bucket.fail();
    throw;
  }
  const FuturePtr arrival = work->getFuture();
  const auto finish = [who = who_, workers = workers(), bucket = std::move(bucket)](c10::ivalue::Future& arrived) -> c10::IValue {
    const at::NoGradGuard no_grad;
    try {
      if (arrived.hasError()) {
        C10_THROW_ERROR(
            DistBackendError, c10::str(
                                  who, ": expected the payloads of all ", workers, " ranks of step ", bucket.step, ", got ",
                                  arrived.tryRetrieveErrorMessage()));
      }
      bucket.finish();
    } catch (...) {
      bucket.fail();
      throw;
    }
    return bucket.result;
  };
  // Where the backend works on a stream the future is complete as soon as it is issued, and this runs here and now, on a stream
  // that waits for the collective.
  const FuturePtr result = arrival->then(finish, c10::TensorType::get());
  const std::lock_guard lock(mutex_);
  pending_.push_back(result);
  return result;
}

void StreamTransport::wait_idle() {
  std::vector<FuturePtr> pending;
  {
    const std::lock_guard lock(mutex_);
    pending.swap(pending_);
  }
  const auto deadline = std::chrono::steady_clock::now() + gloo_->timeout();
  for (const FuturePtr& future : pending) {
    while (!future->completed()) {  // on a stream it is
      if (std::chrono::steady_clock::now() >= deadline) {
        C10_THROW_ERROR(
            DistBackendError, c10::str(who_, ": expected no pending exchange within ", gloo_->timeout().count() / 1000, " s, got one"));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    future->wait();  // the current stream waits for what it holds, the host does not
  }
  gloo_->wait_idle();
}

void StreamTransport::close() {
  c10::intrusive_ptr<c10d::Backend> group;
  std::vector<FuturePtr> pending;
  {
    const std::lock_guard lock(mutex_);
    group.swap(group_);
    pending.swap(pending_);
  }
  gloo_->close();
}

}  // namespace regtopk
