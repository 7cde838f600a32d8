#include "report.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "../ops/operators.h"

namespace regtopk {
namespace {

constexpr int64_t kStatusesAt = 3, kVerdictAt = kStatusesAt + 2;  // in the copy, behind the counters

}  // namespace

void Report::place_on(at::Device device) {
  const std::lock_guard lock(mutex_);
  placed_ = true;
  device_ = device;
  if (device.is_cpu()) return;
  counters_ = at::zeros({3}, at::TensorOptions().dtype(at::kLong).device(device));
  statuses_ = at::full({2}, kNothing, counters_.options());
  of_workers_ = statuses_.narrow(0, 0, 1);
  in_host_ = statuses_.narrow(0, 1, 1);
}

bool Report::is_placed() const {
  const std::lock_guard lock(mutex_);
  return placed_;
}

at::Device Report::device() const {
  const std::lock_guard lock(mutex_);
  return device_;
}

bool Report::is_under_way() const {
  const std::lock_guard lock(mutex_);
  return is_under_way_ && !copied_->query();
}

void Report::ask(const at::Tensor& verdict, int64_t round, bool ended) {
  const std::lock_guard lock(mutex_);
  if (device_.is_cpu()) return;
  if (round > last_ended_) waiting_.push_back(round);
  if (ended) last_ended_ = std::max(last_ended_, round);
  if (is_under_way_) return;
  if (!copy_.defined()) {
    copy_ = at::empty({kVerdictAt + kVerdictRounds}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    copied_.emplace(device_.type());
  }
  copy_.narrow(0, 0, 3).copy_(counters_, /*non_blocking=*/true);
  copy_.narrow(0, kStatusesAt, 2).copy_(statuses_, /*non_blocking=*/true);
  copy_.narrow(0, kVerdictAt, kVerdictRounds).copy_(verdict, /*non_blocking=*/true);
  copied_->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  statuses_.fill_(kNothing);  // what is found from now on is news
  asked_ = std::exchange(waiting_, {});
  is_under_way_ = true;
}

Report::News Report::hear() {
  const std::lock_guard lock(mutex_);
  News news;
  if (is_under_way_ && copied_->query()) take_in(news);
  return news;
}

void Report::take_in(News& news) {
  is_under_way_ = false;
  const int64_t* const values = copy_.const_data_ptr<int64_t>();
  std::copy(values, values + 3, sums_.begin());
  news.status = values[kStatusesAt];
  news.status_in_host = values[kStatusesAt + 1];
  for (const int64_t round : asked_) {
    if (values[kVerdictAt + round % kVerdictRounds] != round || round <= last_void_) continue;
    news.void_rounds.push_back(round);
    last_void_ = round;
  }
  asked_.clear();
}

std::array<int64_t, 3> Report::sums() const {
  const std::lock_guard lock(mutex_);
  if (!device_.is_cpu()) return sums_;
  // Operators on other threads add to them atomically meanwhile.
  std::array<int64_t, 3> sums;
  for (int64_t i = 0; i < 3; ++i) sums[i] = std::atomic_ref(counters_.mutable_data_ptr<int64_t>()[i]).load(std::memory_order_relaxed);
  return sums;
}

}  // namespace regtopk
