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

void Report::place_on(at::Device device) {
  const std::lock_guard lock(mutex_);
  placed_ = true;
  if (device.is_cpu()) return;
  counters_ = at::zeros({3}, at::TensorOptions().dtype(at::kLong).device(device));
  status_ = at::full({1}, kNothing, counters_.options());
}

void Report::ask(const at::Tensor& verdict, int64_t round) {
  const std::lock_guard lock(mutex_);
  if (device().is_cpu()) return;
  if (round > last_asked_) waiting_.push_back(round);
  last_asked_ = std::max(last_asked_, round);
  if (is_under_way_) return;
  if (!copy_.defined()) {
    copy_ = at::empty({3 + 1 + kVerdictRounds}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    copied_.emplace(device().type());
  }
  copy_.narrow(0, 0, 3).copy_(counters_, /*non_blocking=*/true);
  copy_.narrow(0, 3, 1).copy_(status_, /*non_blocking=*/true);
  copy_.narrow(0, 4, kVerdictRounds).copy_(verdict, /*non_blocking=*/true);
  copied_->record(c10::impl::VirtualGuardImpl(device().type()).getStream(device()));
  status_.fill_(kNothing);  // what is found from now on is news
  asked_ = std::exchange(waiting_, {});
  is_under_way_ = true;
}

Report::News Report::hear(bool wait) {
  const std::lock_guard lock(mutex_);
  News news;
  if (!is_under_way_) return news;
  if (wait) copied_->synchronize();
  if (wait || copied_->query()) take_in(news);
  return news;
}

void Report::take_in(News& news) {
  is_under_way_ = false;
  const int64_t* const values = copy_.const_data_ptr<int64_t>();
  std::copy(values, values + 3, sums_.begin());
  news.status = values[3];
  for (const int64_t round : asked_) {
    if (values[4 + round % kVerdictRounds] == round) news.void_rounds.push_back(round);
  }
  asked_.clear();
}

std::array<int64_t, 3> Report::sums() const {
  const std::lock_guard lock(mutex_);
  if (!device().is_cpu()) return sums_;
  // Operators on other threads add to them atomically meanwhile.
  std::array<int64_t, 3> sums;
  for (int64_t i = 0; i < 3; ++i) sums[i] = std::atomic_ref(counters_.mutable_data_ptr<int64_t>()[i]).load(std::memory_order_relaxed);
  return sums;
}

}  // namespace regtopk
