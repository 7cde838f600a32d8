#include "ddp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <limits>

#include "../exchange/agreement.h"
#include "../exchange/dense.h"
#include "../ops/checks.h"

namespace regtopk {
namespace {

Transport::FuturePtr completed(const at::Tensor& buffer) {
  auto future = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get());
  future->markCompleted(buffer);
  return future;
}

}  // namespace

DdpExchange::DdpExchange(Options options, std::shared_ptr<Clock> clock, Owner owner)
    : worker_(std::make_shared<Worker>(std::move(options), "sparse_hook", std::move(clock))),
      owner_(std::move(owner)),
      agreed_density_(worker_->options.schedule ? std::numeric_limits<double>::quiet_NaN() : worker_->density()) {}

DdpExchange::~DdpExchange() { close(); }

Transport& DdpExchange::transport() {
  {
    const std::lock_guard lock(open_mutex_);
    TORCH_CHECK(!closed_, worker_->who, ": expected an open exchange, got one that was closed; construct a new state");
    if (!transport_) {
      transport_ = owner_.open([worker = worker_] { return describe_deed(worker->deed()); });
      worker_->rank = transport_->rank();
      worker_->workers = transport_->workers();
      worker_->who = c10::str("rank ", worker_->rank, ": sparse_hook");
    }
  }
  return *transport_;
}

Worker& DdpExchange::idle_worker() {
  if (transport_) transport_->wait_idle();
  worker_->note_applied(owner_.applied);
  return *worker_;
}

DdpExchange::FuturePtr DdpExchange::run(c10d::GradBucket& ddp_bucket) {
  RECORD_FUNCTION("regtopk::exchange", std::vector<c10::IValue>());
  const at::NoGradGuard no_grad;
  const at::Tensor& buffer = ddp_bucket.getBufferRef();
  if (buffer.numel() == 0 && !buffer.is_sparse()) return completed(buffer);
  transport();
  const std::shared_ptr<Plan> plan = enter(bucket_of(ddp_bucket), ddp_bucket);
  Transport::Bucket moved;
  moved.result = buffer;
  moved.step = worker_->steps.step();
  moved.count_seconds = [worker = worker_](double seconds) { worker->statistics.exchange_seconds += seconds; };
  if (!plan || is_dense()) {
    const double bytes = dense::send(*worker_, plan.get(), buffer);
    moved.finish = [worker = worker_, buffer, bytes] { dense::receive(*worker, buffer, bytes); };
    moved.fail = [] {};
    return transport_->all_reduce(std::move(moved));
  }
  const own_support::Sent sent = own_support::send(*worker_, *plan, buffer);
  own_support::make_room(*worker_, *plan, /*rows=*/1);
  moved.finish = [worker = worker_, plan, sent, buffer] { own_support::receive({{*worker, *plan, sent.payload}}, buffer); };
  moved.fail = [worker = worker_, plan, sent] { own_support::fail(*worker, *plan, sent.payload); };
  return transport_->gather(sent.message, plan->received, std::move(moved));
}

Bucket DdpExchange::bucket_of(const c10d::GradBucket& ddp_bucket) {
  const at::Tensor& buffer = ddp_bucket.getBuffer();
  Bucket bucket{
      .layout = {{}, buffer.scalar_type(), buffer.device()},
      .index = static_cast<int64_t>(ddp_bucket.getIndex()),
      .scale = 1.0,
      .keeps = !buffer.is_sparse()};
  try {
    if (owner_.scale) bucket.scale = owner_.scale();
    const std::vector<at::Tensor> parameters = ddp_bucket.getParameters();
    bucket.layout.spans.reserve(parameters.size());
    for (const at::Tensor& parameter : parameters) {
      bucket.layout.spans.push_back({key_of(parameter), parameter.numel()});
      // DDP hands complex gradients over as twice as many real ones; only the parameter tells.
      if (parameter.is_complex()) value_type_of(worker_->who.c_str(), parameter.scalar_type());
    }
    worker_->check(bucket);
    TORCH_CHECK_VALUE(
        !bucket.keeps || bucket.layout.numel() == buffer.numel(), worker_->who, ": expected a bucket that holds its parameters' ",
        bucket.layout.numel(), " entries, got ", buffer.numel());
  } catch (const std::exception& error) {
    // What the step's other buckets have sent returns, unless an optimizer steps all the same.
    bucket.scale = worker_->steps.scale();  // what failed may be the scale
    if (!worker_->begins_step(bucket)) worker_->steps.clock().make_void(worker_->steps.round());
    transport_->announce_failure(error.what());
    throw;
  }
  return bucket;
}

std::shared_ptr<Plan> DdpExchange::enter(const Bucket& bucket, const c10d::GradBucket& ddp_bucket) {
  // DDP has waited for all of the step before, unless one bucket's error let the user go on while others were pending: what
  // those take and return must not be mixed with what this step does.
  if (worker_->begins_step(bucket)) transport_->wait_idle();
  const auto owners = [&] {
    std::vector<regtopk::Owner> owners;
    for (const at::Tensor& parameter : ddp_bucket.getParameters()) owners.emplace_back(parameter);
    return owners;
  };
  std::shared_ptr<Plan> plan;
  try {
    plan = worker_->enter(bucket, owners, owner_.applied);
  } catch (const std::exception& error) {
    transport_->announce_failure(error.what());
    throw;
  }
  // Payloads of unequal size would end the processes: where the density changes all ranks compare it before any is sent.
  if (worker_->density() != agreed_density_) {
    agree(*transport_, {{c10::str("density of step ", worker_->steps.step()), round_trip(worker_->density())}});
    agreed_density_ = worker_->density();
  }
  if (worker_->is_dense_step() != dense_step_) {
    dense_step_ = worker_->is_dense_step();
    forget_agreements();
  }
  if (plan && plan->agreed_version == options_version_) return plan;
  const int64_t hash = plan ? plan->hash : bucket.layout.hash() + 1;
  if (!agreed_.contains(hash)) {
    agree_on(bucket, hash, ddp_bucket.isLast());
    agreed_.insert(hash);
  }
  if (plan) plan->agreed_version = options_version_;
  return plan;
}

void DdpExchange::agree_on(const Bucket& bucket, int64_t hash, bool last) {
  const Options& options = worker_->options;
  const Layout& layout = bucket.layout;
  agree(
      *transport_,
      {{"method", options.regularised ? "RegTop-k" : "Top-k"},
       {"density", round_trip(worker_->density())},
       {"decay", round_trip(options.decay)},
       {"dense_steps", std::to_string(options.dense_steps)},
       {"wire dtype", options.wire_dtype ? c10::toString(*options.wire_dtype) : "the gradients'"},
       {"index code", options.elias_fano ? "elias-fano" : "offsets"},
       {"mu", options.regularised ? round_trip(options.mu) : "none"},
       {"distortion", options.regularised ? options.distortion : "none"},
       {"mode", !bucket.keeps ? "all-reduce of sparse tensors"
                : dense_      ? "dense (paused)"
                : dense_step_ ? "dense"
                              : "sparse"},
       {"gradient dtype", c10::toString(layout.dtype)},
       {"bucket", c10::str(layout.spans.size(), " parameters with ", layout.numel(), " entries", last ? ", the last bucket" : "")},
       {"bucket layout (hash)", std::to_string(hash)},
       {"calls of reset, load_state_dict, pause, resume and skipped", describe_deed(worker_->deed())},
       {"step", std::to_string(worker_->steps.step())}});
}

void DdpExchange::forget_agreements() {
  ++options_version_;
  agreed_.clear();
}

void DdpExchange::set_dense(bool dense) {
  if (dense == dense_) return;
  dense_ = dense;
  forget_agreements();
  worker_->did(dense ? Deed::kPause : Deed::kResume);
}

void DdpExchange::skipped() {
  idle_worker();
  worker_->steps.clock().make_void(worker_->steps.round());
  worker_->did(Deed::kSkipped);
}

void DdpExchange::close() {
  std::shared_ptr<Transport> transport;
  {
    const std::lock_guard lock(open_mutex_);
    closed_ = true;
    transport = transport_;
  }
  if (transport) transport->close();
  owner_.open = nullptr;
  owner_.scale = nullptr;  // what was applied may still be asked for: the residual can be saved
}

}  // namespace regtopk
