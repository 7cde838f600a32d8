#include "worker.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <utility>

#include "../ops/checks.h"
#include "shared_support.h"

namespace regtopk {

Worker::Worker(Options options_given, std::string who_given, std::shared_ptr<Clock> clock)
    : options(std::move(options_given)),
      who(std::move(who_given)),
      steps(std::move(clock)),
      density_(options.adaptive ? options.adaptive->mean : options.density) {
  if (options.adaptive) steps.clock().watch_ends();
}

double Worker::density_of(int64_t step) const {
  if (!options.schedule) return density_;
  const double density = options.schedule(step);
  TORCH_CHECK_VALUE(
      density > 0 && density <= 1, who, ": expected a density with 0 < density <= 1 of its schedule, got ", density, " for step ", step,
      "; return a fraction, 0.001 keeps one entry in 1000");
  return density;
}

int64_t Worker::share_of(double density, int64_t entries) const {
  const double wanted = std::floor(density * static_cast<double>(entries) + 0.5);
  return std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, entries);
}

int64_t Worker::entries_to_send(double density, int64_t numel) const {
  if (options.chunk == 0) return share_of(density, numel);
  const int64_t rest = numel % options.chunk;
  return numel / options.chunk * share_of(density, options.chunk) + (rest > 0 ? share_of(density, rest) : 0);
}

Wire Worker::wire_of(at::ScalarType gradient_dtype) const {
  const at::ScalarType wanted = options.wire_dtype.value_or(gradient_dtype);
  return {c10::elementSize(wanted) < c10::elementSize(gradient_dtype) ? wanted : gradient_dtype, options.elias_fano};
}

void Worker::check(const Bucket& bucket) const {
  // Inside these bounds a residual keeps its bits through changes of the scale by powers of two: its entries stay normal.
  constexpr double kLargest = 0x1p64;
  TORCH_CHECK_VALUE(
      bucket.scale >= 1 / kLargest && bucket.scale <= kLargest, who, ": expected a gradient scale between 2^-64 and 2^64, got ",
      bucket.scale, "; if the GradScaler came here by skipping step after step, look for NaN in the model's parameters");
  TORCH_CHECK_VALUE(
      bucket.keeps || !options.corrects(), who,
      ": expected dense gradients with momentum= or clip_norm=, got sparse ones; give the momentum to the optimizer");
  if (!bucket.keeps) return;
  value_type_of(who.c_str(), bucket.layout.dtype);
  TORCH_CHECK_VALUE(
      !report.is_placed() || report.device() == bucket.layout.device, who, ": expected all gradients on ", report.device(),
      ", got some on ", bucket.layout.device, "; a state serves a model on one device");
  const at::Device device = bucket.layout.device;
  TORCH_CHECK_VALUE(
      has_kernels(device), who, ": expected gradients on the CPU", has_cuda_kernels() ? " or a CUDA device" : "", ", got ", device,
      "; this build has no kernels for it");
  TORCH_CHECK_VALUE(
      bucket.layout.device.is_cpu() || options.chunk <= kLargestChunkOfDevice, who,
      ": expected gradients on the CPU with chunk=", options.chunk, ", got ", bucket.layout.device,
      "; a device's kernels take chunks of at most ", kLargestChunkOfDevice, " entries");
  Layout room;
  const Layout& kept = kept_of(bucket.layout, room);
  if (!store_.find(kept, bucket.index)) store_.check_sizes(who, kept);
}

const Layout& Worker::kept_of(const Layout& whole, Layout& room) const {
  if (options.host_ranks == 1) return whole;
  room = whole;
  for (Span& span : room.spans) span.numel = part_of(span.numel, place, options.host_ranks).numel;
  return room;
}

bool Worker::begins_step(const Bucket& bucket) const {
  const int64_t round = steps.round();
  bool seen =
      std::any_of(bucket.layout.spans.begin(), bucket.layout.spans.end(), [this](const Span& span) { return seen_.contains(span.key); });
  if (!seen && bucket.keeps) {
    Layout room;
    const auto plan = store_.find(kept_of(bucket.layout, room), bucket.index);
    seen = plan ? plan->round == round && round >= 0 : store_.was_exchanged(bucket.layout, round);
  }
  return steps.begins(bucket.index, bucket.scale, seen);
}

std::shared_ptr<Plan> Worker::enter(const Bucket& bucket, const MakeOwners& owners, const AppliedKeys& applied) {
  if (begins_step(bucket)) {
    hear();
    begin_step(bucket.scale, applied);
  }
  steps.note(bucket.index);
  if (!bucket.keeps) {
    for (const Span& span : bucket.layout.spans) seen_.insert(span.key);
    return nullptr;
  }
  Layout room;
  const Layout& layout = kept_of(bucket.layout, room);
  std::shared_ptr<Plan> plan = store_.find(layout, bucket.index);
  if (!report.is_placed()) report.place_on(bucket.layout.device);
  const bool is_new = !plan;
  if (is_new) {
    Store::Garbage garbage;  // freed after the lock is
    const std::lock_guard lock(mutex_);
    plan = store_.make(layout, owners(), steps.clock().verdict(layout.device), report.counters(), options.momentum > 0, garbage);
    plan->masks = options.mask_momentum;
    publish_counts();
  }
  plan->begin(steps.round());
  if (options.adaptive) plan->squared_norm.place_on(layout.device);
  if (plan->numel == 0) return plan;  // parameters of fewer entries than the host has ranks
  if (set_form(*plan, bucket.dense) || is_new) publish_dense();
  return plan;
}

bool Worker::set_form(Plan& plan, bool ruled_dense) {
  const Wire wire = wire_of(plan.layout.dtype);
  std::string why;
  if (ruled_dense) why = "the rule";
  else if (options.dense_auto && workers > 1) {
    const int64_t k = entries_to_send(options.adaptive ? options.adaptive->mean : density_, plan.numel);
    const double chosen = bytes_of_chosen(*this, plan, k, wire), all = shared_support::bytes_of_all(*this, plan);
    if (chosen >= all) why = c10::str("auto: ", static_cast<int64_t>(all), " bytes a step against ", static_cast<int64_t>(chosen));
  }
  const bool is_news = why != plan.why_dense;
  plan.why_dense = std::move(why);
  const double density = plan.is_dense() ? 1 : density_;
  plan.set_message(entries_to_send(density, plan.numel), plan.is_dense() ? Wire{plan.layout.dtype, false} : wire);
  plan.chunk_k = options.chunk == 0 ? 0 : share_of(density, options.chunk);
  return is_news;
}

std::vector<bool> Worker::ruled_dense(const Layout& layout, const MakeOwners& owners) {
  std::vector<ParameterKey> keys;
  std::vector<int64_t> numels;
  std::vector<size_t> places;
  for (size_t i = 0; i < layout.spans.size(); ++i) {
    const auto known = ruled_.find(layout.spans[i].key);
    if (known != ruled_.end() && known->second.numel == layout.spans[i].numel) continue;  // else another tensor has the name now
    keys.push_back(layout.spans[i].key);
    numels.push_back(layout.spans[i].numel);
    places.push_back(i);
  }
  if (!keys.empty()) {
    std::erase_if(ruled_, [](const auto& known) { return known.second.owner.is_gone(); });
    std::vector<Owner> all = owners();
    const std::vector<bool> answers = options.dense_rule(keys, numels);
    for (size_t i = 0; i < keys.size(); ++i) ruled_[keys[i]] = {std::move(all[places[i]]), numels[i], answers.at(i)};
  }
  std::vector<bool> dense;
  for (const Span& span : layout.spans) dense.push_back(ruled_.at(span.key).dense);
  return dense;
}

void Worker::publish_dense() {
  const std::lock_guard lock(dense_mutex_);
  dense_buckets_.clear();
  for (const auto& plan : store_.plans()) {
    if (!plan->is_dense()) continue;
    std::vector<ParameterKey> keys;
    for (const Span& span : plan->layout.spans) keys.push_back(span.key);
    dense_buckets_.emplace_back(std::move(keys), plan->numel, plan->why_dense);
  }
}

Worker::DenseBuckets Worker::dense_buckets() const {
  const std::lock_guard lock(dense_mutex_);
  return dense_buckets_;
}

std::map<ParameterKey, int64_t> Worker::times_given() {
  const auto lock = hold_plans();
  std::map<ParameterKey, int64_t> times;
  for (const auto& plan : store_.plans()) {
    for (const Span& span : plan->layout.spans) times[span.key] += plan->times_given;
  }
  return times;
}

void Worker::note_applied(const AppliedKeys& applied) {
  // A device has not yet said whether it is void.
  if (!applied || (report.device().is_cpu() && !steps.is_void())) return;
  std::unordered_set<ParameterKey> keys;
  for (const ParameterKey key : applied()) keys.insert(key);
  const std::lock_guard lock(mutex_);
  for (const auto& plan : store_.plans()) {
    if (!plan->sent.defined() || plan->sent_round != steps.round()) continue;
    std::vector<uint8_t> flags;
    for (const Span& span : plan->layout.spans) flags.push_back(keys.contains(span.key) ? 1 : 0);
    plan->set_applied(std::move(flags));
  }
}

void Worker::begin_step(double scale, const AppliedKeys& applied) {
  density_ = density_of(steps.step() + 1);  // raises before anything has changed
  take_in_measured();
  note_applied(applied);
  if (report.device().is_cpu()) statistics.void_steps += steps.is_void() ? 1 : 0;
  else report.ask(steps.clock().verdict(report.device()), steps.round());
  const std::lock_guard lock(mutex_);
  for (const auto& plan : store_.plans()) {
    // What was sent is of the old scale; what nobody received, or a verdict that is about to be forgotten, can't wait.
    const bool too_old = plan->sent_round >= 0 && plan->sent_round + kVerdictRounds / 2 < steps.round();
    if (scale != steps.scale() || plan->in_vain || too_old) plan->settle(report.counters());
    if (too_old && plan->sent.defined()) plan->forget_round();
  }
  if (scale != steps.scale()) store_.multiply(scale / steps.scale(), feedback_has_scale());
  if (measures_anew_.exchange(false)) density_control.restore({});
  if (options.adaptive) density_ = density_control.next(*options.adaptive, steps.is_void());
  seen_.clear();
  steps.begin(scale);
  ++statistics.steps;
  publish_counts();
}

void Worker::measure(const Plan& plan, const Number& squared_norm, const std::function<double(int64_t k)>& bytes_of) {
  const int64_t mean = entries_to_send(options.adaptive->mean, plan.numel);
  measured_.push_back({squared_norm, steps.scale(), bytes_of(plan.k()), bytes_of(mean)});
}

// Of a device this waits for the ends of the last step's buckets, and for nothing behind them: what the device was given since, the
// optimizer's step, the forward pass and what there is of the backward pass, keeps it busy meanwhile. The host runs ahead by less than a step.
void Worker::take_in_measured() {
  if (!options.adaptive) return;
  wait_until([this] { return steps.clock().hear_ends(); });
  // A round may be void here alone, where a payload came damaged: to be said before the ranks send messages of unequal sizes.
  if (!report.device().is_cpu() && steps.is_void()) hear(/*wait=*/true);
  for (const auto& [squared_norm, scale, sent_bytes, mean_bytes] : std::exchange(measured_, {}))
    density_control.note(squared_norm.heard() / scale / scale, sent_bytes, mean_bytes);
}

std::vector<double> Worker::density_state() {
  take_in_measured();
  return options.adaptive ? density_control.state(steps.is_void()) : std::vector<double>();
}

void Worker::hear(bool wait) {
  const auto take_in = [this](const Report::News& news) {
    for (const int64_t round : news.void_rounds) {
      steps.clock().hear_void(round);
      ++statistics.void_steps;
    }
    const std::string wrong = describe_statuses(news.status, news.status_in_host, rank, place, options.host_ranks);
    if (wrong.empty()) return;
    if (options.adaptive) {  // other ranks have measured something: the next step begins with a comparison
      begin_measuring_anew();
      steps.clock().make_void(steps.round());
    }
    C10_THROW_ERROR(ValueError, c10::str(who, ": ", wrong));
  };
  if (wait) wait_for_report();
  take_in(report.hear());
  if (!wait) return;
  report.ask(steps.clock().verdict(report.device()), steps.round(), /*ended=*/false);
  wait_for_report();
  take_in(report.hear());
}

void Worker::wait_for_report() const {
  wait_until([this] { return !report.is_under_way(); });
}

void Worker::wait_until(const std::function<bool()>& is_so) const {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!is_so()) {
    TORCH_CHECK(
        std::chrono::steady_clock::now() < deadline, who, ": expected ", report.device(), " to end what it does within ",
        static_cast<double>(limit.count()) / 1000, " s, got no end; a rank that it waits for may be gone");
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

void Worker::publish_counts() {
  statistics.rebuilds = store_.rebuilds;
  statistics.history_dropped = store_.history_dropped;
  statistics.residual_dropped = store_.residual_dropped;
}

double Worker::residual_norm() {
  Store::Garbage garbage;
  const std::lock_guard lock(mutex_);
  const double norm = store_.residual_norm(report.counters(), garbage);
  publish_counts();
  return norm / steps.scale();
}

Pieces Worker::copy_pieces() {
  Store::Garbage garbage;
  const std::lock_guard lock(mutex_);
  Pieces pieces = store_.copy_pieces(report.counters(), garbage);
  publish_counts();
  const double scale = steps.scale();
  if (scale == 1) return pieces;
  for (auto& [key, piece] : pieces) {
    piece.residual.div_(scale);
    if (piece.velocity.defined()) piece.velocity.div_(scale);
    if (feedback_has_scale() && piece.feedback.defined()) piece.feedback.div_(scale);
  }
  return pieces;
}

void Worker::replace_pieces(Pieces pieces, int64_t step, const std::vector<double>& density_state) {
  density_control.restore(density_state);
  measured_.clear();
  Store::Garbage garbage;
  std::unique_lock lock(mutex_);
  store_.replace(std::move(pieces), garbage);
  seen_.clear();
  if (report.device().is_cpu()) statistics.void_steps += steps.is_void() ? 1 : 0;
  else report.ask(steps.clock().verdict(report.device()), steps.round());
  steps.restart(step);
  lock.unlock();
  publish_dense();
}

void Worker::clear(const std::vector<ParameterKey>& keys) {
  const std::lock_guard lock(mutex_);
  store_.clear(keys, report.counters());
  publish_counts();
}

}  // namespace regtopk
