#include "steps.h"

#include <utility>

#include "../ops/operators.h"

namespace regtopk {
namespace {

std::atomic<int64_t> workers_so_far = 0;

}  // namespace

Clock::Clock() : verdict_(make_verdict(at::kCPU)) {}

int64_t Clock::begin(int64_t worker) {
  const std::lock_guard lock(mutex_);
  if (round_ < 0 || begun_.contains(worker)) {
    ++round_;
    begun_.clear();
  }
  begun_.insert(worker);
  return round_;
}

bool Clock::is_void(int64_t round) const { return regtopk::is_void(verdict_, round); }

at::Tensor Clock::verdict(at::Device device) {
  if (device.is_cpu()) return verdict_;
  const std::lock_guard lock(mutex_);
  at::Tensor& verdict = on_devices_[device];
  if (!verdict.defined()) verdict = verdict_.to(device);
  return verdict;
}

void Clock::hear_void(int64_t round) {
  if (round >= 0) verdict_.select(0, round % kVerdictRounds).fill_(round);
}

void Clock::make_void(int64_t round) {
  ++times_made_void_;
  if (round < 0) return;
  hear_void(round);
  const std::lock_guard lock(mutex_);
  for (const auto& [device, verdict] : on_devices_) verdict.select(0, round % kVerdictRounds).fill_(round);
}

void Clock::note_end(at::Device device, int64_t round) {
  if (device.is_cpu()) return;
  hear_ends();  // so that they are few, whoever waits for them
  ends_.note(verdict(device), round);
}

bool Clock::hear_ends() {
  const std::lock_guard lock(hearing_);
  const Ends::News news = ends_.hear();
  for (const int64_t round : news.void_rounds) hear_void(round);
  return news.are_all;
}

Steps::Steps(std::shared_ptr<Clock> clock) : clock_(std::move(clock)), worker_(workers_so_far++) {}

void Steps::begin(double scale) {
  scale_ = scale;
  begun_ = true;
  last_index_ = -1;
  ++step_;
  round_ = clock_->begin(worker_);
}

void Steps::restart(int64_t step) {
  step_ = step;
  round_ = -1;
  scale_ = 1;
  begun_ = false;
}

}  // namespace regtopk
