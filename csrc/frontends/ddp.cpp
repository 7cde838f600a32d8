#include "ddp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include "../ops/checks.h"

namespace regtopk {
namespace {

GroupExchange::FuturePtr completed(const at::Tensor& buffer) {
  auto future = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get());
  future->markCompleted(buffer);
  return future;
}

Bucket bucket_of(GroupExchange& exchange, const c10d::GradBucket& ddp_bucket, const std::vector<at::Tensor>& parameters) {
  Worker& worker = exchange.worker();
  const at::Tensor& buffer = ddp_bucket.getBuffer();
  Bucket bucket{
      .layout = {{}, buffer.scalar_type(), buffer.device()},
      .index = static_cast<int64_t>(ddp_bucket.getIndex()),
      .scale = 1.0,
      .keeps = !buffer.is_sparse()};
  try {
    bucket.scale = exchange.scale();
    bucket.layout.spans.reserve(parameters.size());
    for (const at::Tensor& parameter : parameters) {
      bucket.layout.spans.push_back({key_of(parameter), parameter.numel()});
      // DDP hands complex gradients over as twice as many real ones; only the parameter tells.
      if (parameter.is_complex()) value_type_of(worker.who.c_str(), parameter.scalar_type());
    }
    worker.check(bucket);
    TORCH_CHECK_VALUE(
        !bucket.keeps || bucket.layout.numel() == buffer.numel(), worker.who, ": expected a bucket that holds its parameters' ",
        bucket.layout.numel(), " entries, got ", buffer.numel());
  } catch (const std::exception& error) {
    // What the step's other buckets have sent returns, unless an optimizer steps all the same.
    bucket.scale = worker.steps.scale();  // what failed may be the scale
    if (!worker.begins_step(bucket)) worker.steps.clock().make_void(worker.steps.round());
    exchange.transport().announce_failure(plain_text(error));
    throw;
  }
  return bucket;
}

}  // namespace

GroupExchange::FuturePtr run(GroupExchange& exchange, c10d::GradBucket& ddp_bucket) {
  RECORD_FUNCTION("regtopk::exchange", std::vector<c10::IValue>());
  const at::NoGradGuard no_grad;
  const at::Tensor& buffer = ddp_bucket.getBufferRef();
  if (buffer.numel() == 0 && !buffer.is_sparse()) return completed(buffer);
  exchange.use("sparse_hook");
  exchange.transport();
  const std::vector<at::Tensor> parameters = ddp_bucket.getParameters();
  const Bucket bucket = bucket_of(exchange, ddp_bucket, parameters);
  const auto owners = [&] { return std::vector<Owner>(parameters.begin(), parameters.end()); };
  const auto describe = [&]() -> Fingerprint {
    return {
        {"bucket",
         c10::str(
             parameters.size(), " parameters with ", bucket.layout.numel(), " entries", ddp_bucket.isLast() ? ", the last bucket" : "")}};
  };
  return exchange.exchange(bucket, buffer, buffer, owners, describe);
}

}  // namespace regtopk
