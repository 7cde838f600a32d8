#include "exchange.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include "../ops/checks.h"
#include "agreement.h"
#include "all_gather.h"

namespace regtopk {
namespace {

Layout layout_of(const c10d::GradBucket& bucket) {
  Layout layout{{}, bucket.getBuffer().scalar_type()};
  for (const at::Tensor& parameter : bucket.getParameters()) {
    layout.parameters.push_back({reinterpret_cast<ParameterKey>(parameter.unsafeGetTensorImpl()), parameter.numel(), parameter});
  }
  return layout;
}

std::string round_trip(double value) {
  // The shortest of the usual forms that reads back as the same double.
  for (const int digits : {6, 15, 17}) {
    char text[40];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) return text;
  }
  return "nan";
}

}  // namespace

Exchange::Exchange(
    c10::intrusive_ptr<c10d::ProcessGroup> payload_group, c10::intrusive_ptr<c10d::ProcessGroup> control_group, Options options,
    std::chrono::milliseconds timeout, Scale scale)
    : payload_group_(std::move(payload_group)),
      control_group_(std::move(control_group)),
      timeout_(timeout),
      worker_(std::make_shared<Worker>(
          std::move(options), c10::str("rank ", payload_group_->getRank(), ": sparse_hook"), payload_group_->getRank(),
          payload_group_->getSize())),
      scale_(std::move(scale)) {}

Exchange::~Exchange() { shutdown(); }

void Exchange::agree_on(int64_t plan_hash, const Layout& layout, bool last, bool sparse_tensor) {
  const Options& options = worker_->options();
  agree(
      *control_group_,
      {{"method", options.regularised ? "RegTop-k" : "Top-k"},
       {"density", round_trip(options.density)},
       {"mu", options.regularised ? round_trip(options.mu) : "none"},
       {"distortion", options.regularised ? options.distortion : "none"},
       {"mode", sparse_tensor ? "all-reduce of sparse tensors" : dense_ ? "dense (paused)" : "sparse"},
       {"gradient dtype", c10::toString(layout.dtype)},
       {"bucket", c10::str(layout.parameters.size(), " parameters with ", layout.numel(), " entries", last ? ", the last bucket" : "")},
       {"bucket layout (hash)", std::to_string(plan_hash)},
       {"step", std::to_string(worker_->step())}},
      timeout_);
}

Exchange::FuturePtr Exchange::run(c10d::GradBucket& bucket) {
  TORCH_CHECK(payload_group_, "sparse_hook: expected an open exchange, got one that was shut down");
  RECORD_FUNCTION("regtopk::exchange", std::vector<c10::IValue>());
  const at::NoGradGuard no_grad;
  at::Tensor& buffer = bucket.getBufferRef();
  const Layout layout = layout_of(bucket);
  const auto index = static_cast<int64_t>(bucket.getIndex());
  const double scale = scale_ ? scale_() : 1.0;
  for (const Parameter& parameter : layout.parameters) {
    // DDP hands complex gradients over as twice as many real ones; only the parameter tells.
    if (parameter.owner.is_complex()) value_type_of(worker_->who().c_str(), parameter.owner.scalar_type());
  }

  // DDP has waited for all of the step before, unless one bucket's error let the user go on while others were pending: what
  // those take and return must not be mixed with what this step does.
  if (worker_->begins_step(layout, index, scale)) idle_worker();

  if (buffer.is_sparse()) {
    worker_->begin_without_plan(layout, index, scale);
    const int64_t hash = layout.hash();
    if (agreed_sparse_tensors_.insert(hash).second) agree_on(hash, layout, bucket.isLast(), true);
    return all_reduce(buffer, nullptr);
  }
  TORCH_CHECK_VALUE(
      layout.numel() == buffer.numel(), worker_->who(), ": expected a bucket that holds its parameters' ", layout.numel(),
      " entries, got ", buffer.numel());

  worker_->check_exchangeable(buffer);
  const std::shared_ptr<Plan> plan = worker_->begin(layout, index, scale);
  if (plan->agreed_version != options_version_) {
    agree_on(plan->hash, layout, bucket.isLast(), false);
    plan->agreed_version = options_version_;
  }
  if (dense_) return all_reduce(buffer, plan);

  const at::Tensor message = worker_->compress(*plan, buffer);
  const at::Tensor messages = at::empty({worker_->workers(), message.numel()}, message.options());
  const auto fail = [worker = worker_, plan, message] { worker->finish_in_vain(*plan, message); };
  c10::intrusive_ptr<c10d::Work> work;
  try {
    work = all_gather(*payload_group_, messages, message);
  } catch (...) {
    fail();
    throw;
  }
  return submit(
      work, buffer,
      [worker = worker_, plan, message, messages, buffer] {
        const at::Tensor feedback = worker->aggregate(*plan, message, messages, buffer, worker->rank(), 1);
        worker->finish(*plan, message, feedback.defined() ? feedback[0] : feedback, messages);
      },
      fail);
}

Exchange::FuturePtr Exchange::all_reduce(const at::Tensor& buffer, std::shared_ptr<Plan> plan) {
  // As DDP does without a hook: divide, then sum.
  buffer.div_(static_cast<double>(worker_->workers()));
  std::vector<at::Tensor> tensors{buffer};
  const auto work = payload_group_->allreduce(tensors);
  const int64_t entries = buffer.is_sparse() ? buffer._values().numel() : buffer.numel();
  const double bytes = static_cast<double>(entries * static_cast<int64_t>(buffer.element_size()));
  return submit(work, buffer, [worker = worker_, plan, bytes] { worker->finish_dense(plan.get(), bytes); }, [] {});
}

Exchange::FuturePtr Exchange::submit(
    const c10::intrusive_ptr<c10d::Work>& work, const at::Tensor& buffer, std::function<void()> finish, std::function<void()> fail) {
  const auto issued = Completer::Clock::now();
  const auto arrival = work->getFuture();
  const auto result = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get());
  completer_.submit(
      {.arrived = [arrival] { return arrival->completed(); },
       .deadline = issued + timeout_,
       .complete = [=, worker = worker_, timeout = timeout_](Completer::Outcome outcome) {
         const at::NoGradGuard no_grad;
         at::init_num_threads();  // OpenMP has one per thread: take over what torch.set_num_threads set on the user's
         bool finished = false;
         try {
           worker->count_seconds(
               &Statistics::exchange_seconds, std::chrono::duration<double>(Completer::Clock::now() - issued).count());
           const auto lost = [&](const std::string& why) {
             C10_THROW_ERROR(
                 DistBackendError, c10::str(worker->who(), ": expected the payloads of all ", worker->workers(),
                                            " ranks of step ", worker->step(), " within ", timeout.count() / 1000, " s, got ", why));
           };
           if (outcome == Completer::Outcome::kTimedOut) lost("none of them complete");
           if (outcome == Completer::Outcome::kStopped) lost("a shutdown of this process");
           if (arrival->hasError()) lost(arrival->tryRetrieveErrorMessage());
           finish();
           finished = true;
           result->markCompleted(buffer);
         } catch (...) {
           if (!finished) {
             fail();
             result->setError(std::current_exception());
           }
         }
       }});
  arrival->addCallback([wake = completer_.waker()](c10::ivalue::Future&) { wake(); }, /*uses_future=*/false);
  return result;
}

void Exchange::set_dense(bool dense) {
  if (dense == dense_) return;
  dense_ = dense;
  ++options_version_;
}

Worker& Exchange::idle_worker() {
  if (!completer_.wait_idle(Completer::Clock::now() + timeout_)) {
    C10_THROW_ERROR(
        DistBackendError, c10::str(worker_->who(), ": expected no pending exchange within ", timeout_.count() / 1000, " s, got one"));
  }
  return *worker_;
}

void Exchange::shutdown() {
  if (completer_.stop()) {
    // Destroying a gloo group waits for its outstanding collectives, which may never end. The process is about to end or
    // the exchange failed: the groups are left to the operating system.
    payload_group_.release();
    control_group_.release();
  }
  payload_group_.reset();
  control_group_.reset();
  scale_ = nullptr;
}

}  // namespace regtopk
