#include "worker.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "../core/payload.h"
#include "../ops/checks.h"

namespace regtopk {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

PayloadHeader header_of(const at::Tensor& payload) {
  PayloadHeader header;
  std::memcpy(&header, payload.const_data_ptr<uint8_t>(), sizeof header);
  return header;
}

}  // namespace

Worker::Worker(Options options, std::string who, int64_t rank, int64_t workers)
    : options_(std::move(options)), who_(std::move(who)), rank_(rank), workers_(workers) {}

int64_t Worker::step() const {
  const std::lock_guard lock(mutex_);
  return step_;
}

void Worker::set_step(int64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
  step_begun_ = false;
}

void Worker::note_parameters(const Layout& layout) {
  const auto seen = [this](const Parameter& parameter) { return seen_.contains(parameter.key); };
  if (!step_begun_ || std::any_of(layout.parameters.begin(), layout.parameters.end(), seen)) {
    settle();
    seen_.clear();
    step_begun_ = true;
    ++step_;
    ++statistics_.steps;
  }
  for (const Parameter& parameter : layout.parameters) seen_.insert(parameter.key);
}

void Worker::settle() {
  for (const auto& plan : store_.plans()) {
    if (void_step_ >= 0 && plan->sent_step == void_step_) plan->in_vain = true;
    if (plan->in_vain) statistics_.history_dropped += plan->forget();
  }
  void_step_ = -1;
}

void Worker::check_exchangeable(const at::Tensor& gradient) const {
  value_type_of(who_.c_str(), gradient.scalar_type());
  // The exchange reads payload headers on the host and its groups are gloo's.
  TORCH_CHECK_VALUE(
      gradient.is_cpu(), who_, ": expected gradients on the CPU, got ", gradient.device(), "; this version exchanges CPU gradients over gloo");
}

std::shared_ptr<Plan> Worker::begin(const Layout& layout) {
  const std::lock_guard lock(mutex_);
  note_parameters(layout);
  return store_.plan_for(who_, layout, [this](int64_t numel) {
    const double wanted = std::floor(options_.density * static_cast<double>(numel) + 0.5);
    return std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, numel);
  });
}

void Worker::begin_without_plan(const Layout& layout) {
  const std::lock_guard lock(mutex_);
  note_parameters(layout);
}

CompressOptions Worker::operator_options(const Plan& plan) const { return {plan.k, options_.mu, options_.distortion}; }

at::Tensor Worker::compress(Plan& plan, const at::Tensor& gradient) {
  const Clock::time_point start = Clock::now();
  const at::Tensor payload =
      at::empty({payload_bytes(plan.numel, plan.k, plan.layout.dtype)}, gradient.options().dtype(at::kByte));
  const auto optional = [](const at::Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; };
  compress_(gradient, plan.residual, payload, optional(plan.sent), optional(plan.feedback), operator_options(plan), step(), plan.hash);
  count_seconds(&Statistics::compress_seconds, seconds_since(start));
  return payload;
}

at::Tensor Worker::aggregate(
    const Plan& plan, const at::Tensor& own_payload, const at::Tensor& payloads, const at::Tensor& gradient, int64_t first, int64_t count) {
  const Clock::time_point start = Clock::now();
  std::optional<at::Tensor> feedback;
  if (options_.regularised) feedback = at::empty({count, plan.k}, plan.residual.options());
  const int64_t step = static_cast<int64_t>(header_of(own_payload).step);
  aggregate_(gradient, payloads, feedback, operator_options(plan), first, step, plan.hash);
  count_seconds(&Statistics::aggregate_seconds, seconds_since(start));
  return feedback.value_or(at::Tensor());
}

void Worker::finish(Plan& plan, const at::Tensor& payload, const at::Tensor& feedback, const at::Tensor& payloads) {
  bool is_void = false;
  for (int64_t rank = 0; rank < workers_; ++rank) is_void |= (header_of(payloads[rank]).flags & kFlagNonFinite) != 0;
  const PayloadHeader own = header_of(payload);
  const double bucket_bytes = static_cast<double>(plan.numel * static_cast<int64_t>(c10::elementSize(plan.layout.dtype)));

  const std::lock_guard lock(mutex_);
  const int64_t step = static_cast<int64_t>(own.step);
  plan.remember(payload, feedback, step);
  if (is_void && void_step_ != step) {
    void_step_ = step;
    ++statistics_.void_steps;
  }
  statistics_.entries += plan.numel;
  statistics_.sent_entries += plan.k;
  statistics_.repeated += static_cast<int64_t>(own.repeated);
  statistics_.displaced += static_cast<int64_t>(own.displaced);
  statistics_.bytes_sent += static_cast<double>((workers_ - 1) * payload.numel());
  statistics_.bytes_dense += 2.0 * static_cast<double>(workers_ - 1) / static_cast<double>(workers_) * bucket_bytes;
}

void Worker::finish_in_vain(Plan& plan, const at::Tensor& payload) {
  const std::lock_guard lock(mutex_);
  plan.remember(payload, at::Tensor(), static_cast<int64_t>(header_of(payload).step));
  plan.in_vain = true;
}

void Worker::finish_dense(Plan* plan, double bucket_bytes) {
  const double ring_bytes = 2.0 * static_cast<double>(workers_ - 1) / static_cast<double>(workers_) * bucket_bytes;
  const std::lock_guard lock(mutex_);
  if (plan != nullptr) statistics_.history_dropped += plan->forget();
  ++statistics_.dense_buckets;
  statistics_.bytes_sent += ring_bytes;
  statistics_.bytes_dense += ring_bytes;
}

void Worker::count_seconds(double Statistics::* which, double seconds) {
  const std::lock_guard lock(mutex_);
  statistics_.*which += seconds;
}

Statistics Worker::statistics() const {
  const std::lock_guard lock(mutex_);
  Statistics statistics = statistics_;
  statistics.rebuilds = store_.rebuilds();
  statistics.history_dropped += store_.history_dropped();
  return statistics;
}

double Worker::residual_norm() const {
  const std::lock_guard lock(mutex_);
  double sum_of_squares = 0;
  for (const auto& [key, piece] : store_.pieces()) {
    const double norm = at::linalg_vector_norm(piece.residual, 2, std::nullopt, false, at::kDouble).item<double>();
    sum_of_squares += norm * norm;
  }
  return std::sqrt(sum_of_squares);
}

std::unordered_map<ParameterKey, Piece> Worker::export_pieces() {
  const std::lock_guard lock(mutex_);
  settle();
  auto pieces = store_.pieces();
  for (auto& [key, piece] : pieces) piece = piece.clone();
  return pieces;
}

void Worker::import_pieces(std::unordered_map<ParameterKey, Piece> pieces) {
  const std::lock_guard lock(mutex_);
  store_.import_pieces(std::move(pieces));
  seen_.clear();
  step_begun_ = false;
  void_step_ = -1;
}

}  // namespace regtopk
