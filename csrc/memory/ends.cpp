#include "ends.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

#include "../ops/operators.h"

namespace regtopk {

void Ends::note(const at::Tensor& verdict, int64_t round) {
  const at::Device device = verdict.device();
  if (!is_watched_ || device.is_cpu() || round < 0) return;
  End end{round, at::empty({1}, verdict.options().device(at::kCPU).pinned_memory(true)), c10::Event(device.type())};
  end.entry.copy_(verdict.narrow(0, round % kVerdictRounds, 1), /*non_blocking=*/true);
  end.passed.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  const std::lock_guard lock(mutex_);
  pending_.push_back(std::move(end));
}

Ends::News Ends::hear() {
  const std::lock_guard lock(mutex_);
  News news;
  for (; !pending_.empty() && pending_.front().passed.query(); pending_.pop_front()) {
    const End& end = pending_.front();
    if (end.entry.item<int64_t>() == end.round) news.void_rounds.push_back(end.round);
  }
  news.are_all = pending_.empty();
  return news;
}

}  // namespace regtopk
