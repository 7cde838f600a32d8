#include "worker.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "../core/payload.h"
#include "../ops/checks.h"
#include "message.h"

namespace regtopk {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

PayloadHeader header_of(const at::Tensor& payload) {
  PayloadHeader header;
  std::memcpy(&header, payload.const_data_ptr<uint8_t>(), sizeof header);
  return header;
}

Messages messages_of(const Plan& plan) { return {plan.layout, payload_bytes(plan.numel, plan.k, plan.layout.dtype)}; }

}  // namespace

Worker::Worker(Options options, std::string who, int64_t rank, int64_t workers)
    : options_(std::move(options)), who_(std::move(who)), rank_(rank), workers_(workers) {}

int64_t Worker::step() const {
  const std::lock_guard lock(mutex_);
  return step_;
}

double Worker::scale() const {
  const std::lock_guard lock(mutex_);
  return scale_;
}

void Worker::set_step(int64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
  step_begun_ = false;
}

void Worker::check_scale(double scale) const {
  // Inside these bounds a residual keeps its bits through changes of the scale by powers of two: its entries stay normal.
  constexpr double kLargest = 0x1p64;
  TORCH_CHECK_VALUE(
      scale >= 1 / kLargest && scale <= kLargest, who_, ": expected a gradient scale between 2^-64 and 2^64, got ", scale,
      "; if the GradScaler came here by skipping step after step, look for NaN in the model's parameters");
}

bool Worker::begins_step(const Layout& layout, int64_t index, double scale) const {
  const std::lock_guard lock(mutex_);
  return is_new_step(layout, index, scale);
}

bool Worker::is_new_step(const Layout& layout, int64_t index, double scale) const {
  // DDP launches buckets in the order of their indices, but may skip any that no rank used: neither the first nor the last is
  // sure to come, nor is a parameter sure to come back in the next step. In the first step of a static graph all say index 0.
  const auto seen = [this](const Parameter& parameter) { return seen_.contains(parameter.key); };
  return !step_begun_ || index < last_index_ || scale != scale_ || std::any_of(layout.parameters.begin(), layout.parameters.end(), seen);
}

void Worker::note_bucket(const Layout& layout, int64_t index, double scale) {
  if (is_new_step(layout, index, scale)) {
    settle();
    if (scale != scale_) store_.multiply(scale / scale_, feedback_has_scale());
    scale_ = scale;
    seen_.clear();
    step_begun_ = true;
    ++step_;
    ++statistics_.steps;
  }
  last_index_ = index;
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

std::shared_ptr<Plan> Worker::begin(const Layout& layout, int64_t index, double scale) {
  check_scale(scale);
  const std::lock_guard lock(mutex_);
  note_bucket(layout, index, scale);
  return store_.plan_for(who_, layout, [this](int64_t numel) {
    const double wanted = std::floor(options_.density * static_cast<double>(numel) + 0.5);
    return std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, numel);
  });
}

void Worker::begin_without_plan(const Layout& layout, int64_t index, double scale) {
  check_scale(scale);
  const std::lock_guard lock(mutex_);
  note_bucket(layout, index, scale);
}

void Worker::end_step() {
  const std::lock_guard lock(mutex_);
  step_begun_ = false;
}

CompressOptions Worker::operator_options(const Plan& plan) const { return {plan.k, options_.mu, options_.distortion}; }

at::Tensor Worker::compress(Plan& plan, const at::Tensor& gradient) {
  const Clock::time_point start = Clock::now();
  const Messages messages = messages_of(plan);
  const at::Tensor message = at::empty({messages.bytes()}, gradient.options().dtype(at::kByte));
  const auto optional = [](const at::Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; };
  compress_(
      gradient, plan.residual, messages.payload_of(message), optional(plan.sent), optional(plan.feedback), operator_options(plan), step(),
      plan.hash);
  messages.write_tail(message, gradient, scale());
  count_seconds(&Statistics::compress_seconds, seconds_since(start));
  return message;
}

at::Tensor Worker::aggregate(
    const Plan& plan, const at::Tensor& own_message, const at::Tensor& messages, const at::Tensor& gradient, int64_t first, int64_t count) {
  const Clock::time_point start = Clock::now();
  const Messages form = messages_of(plan);
  for (int64_t rank = 1; rank < workers_; ++rank) {
    const double one = form.scale_of(messages[0]), other = form.scale_of(messages[rank]);
    TORCH_CHECK_VALUE(
        one == other, who_, ": expected the same gradient scale on every rank, got ", one, " on rank 0 and ", other, " on rank ", rank,
        "; give every rank's state a GradScaler with the same arguments, or none");
  }
  std::optional<at::Tensor> feedback;
  if (options_.regularised) feedback = at::empty({count, plan.k}, plan.residual.options());
  const int64_t step = static_cast<int64_t>(header_of(own_message).step);
  aggregate_(gradient, form.payload_of(messages), feedback, operator_options(plan), first, step, plan.hash);
  // DDP throws the result away for a parameter that no rank used, and writes it for one whose gradient happens to be zero.
  // Zero is right for both once finish() takes back what was sent.
  int64_t offset = 0, next = 0;
  for (const int64_t idle : form.idle_parameters(messages)) {
    const auto& parameters = plan.layout.parameters;
    for (; next < idle; ++next) offset += parameters[next].numel;
    gradient.narrow(0, offset, parameters[idle].numel).zero_();
  }
  count_seconds(&Statistics::aggregate_seconds, seconds_since(start));
  return feedback.value_or(at::Tensor());
}

void Worker::finish(Plan& plan, const at::Tensor& message, const at::Tensor& feedback, const at::Tensor& messages) {
  const Messages form = messages_of(plan);
  bool is_void = false;
  for (int64_t rank = 0; rank < workers_; ++rank) is_void |= (header_of(messages[rank]).flags & kFlagNonFinite) != 0;
  const PayloadHeader own = header_of(message);
  const double bucket_bytes = static_cast<double>(plan.numel * static_cast<int64_t>(c10::elementSize(plan.layout.dtype)));

  const std::lock_guard lock(mutex_);
  const int64_t step = static_cast<int64_t>(own.step);
  plan.remember(form.payload_of(message), feedback, step);
  statistics_.history_dropped += plan.take_back(form.idle_parameters(messages));
  if (is_void && void_step_ != step) {
    void_step_ = step;
    ++statistics_.void_steps;
  }
  statistics_.entries += plan.numel;
  statistics_.sent_entries += plan.k;
  statistics_.repeated += static_cast<int64_t>(own.repeated);
  statistics_.displaced += static_cast<int64_t>(own.displaced);
  statistics_.bytes_sent += static_cast<double>((workers_ - 1) * message.numel());
  statistics_.bytes_dense += 2.0 * static_cast<double>(workers_ - 1) / static_cast<double>(workers_) * bucket_bytes;
}

void Worker::finish_in_vain(Plan& plan, const at::Tensor& message) {
  const std::lock_guard lock(mutex_);
  plan.remember(messages_of(plan).payload_of(message), at::Tensor(), static_cast<int64_t>(header_of(message).step));
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
  return std::sqrt(sum_of_squares) / scale_;
}

std::unordered_map<ParameterKey, Piece> Worker::export_pieces() {
  const std::lock_guard lock(mutex_);
  settle();
  auto pieces = store_.pieces();
  for (auto& [key, piece] : pieces) {
    piece = piece.clone();
    if (scale_ == 1) continue;
    piece.residual.div_(scale_);
    if (feedback_has_scale() && piece.feedback.defined()) piece.feedback.div_(scale_);
  }
  return pieces;
}

void Worker::import_pieces(std::unordered_map<ParameterKey, Piece> pieces) {
  const std::lock_guard lock(mutex_);
  store_.import_pieces(std::move(pieces));
  seen_.clear();
  step_begun_ = false;
  void_step_ = -1;
  scale_ = 1;
}

}  // namespace regtopk
