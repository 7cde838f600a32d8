#include "under_way.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <iterator>
#include <thread>
#include <utility>

namespace regtopk {

void UnderWay::begin() {
  const std::lock_guard lock(mutex_);
  ++count_;
}

void UnderWay::end(const at::Tensor& result, Keeps keeps) {
  note(result, std::move(keeps));
  {
    const std::lock_guard lock(mutex_);
    --count_;
  }
  changed_.notify_all();
}

void UnderWay::note(const at::Tensor& result, Keeps keeps) noexcept {
  if (!result.defined() || result.device().is_cpu()) return;
  try {
    const at::Device device = result.device();
    const c10::impl::VirtualGuardImpl guard(device.type());
    const c10::Stream stream = guard.getStream(device);
    if (result.layout() == at::kStrided) guard.recordDataPtrOnStream(result.storage().data_ptr(), stream);
    c10::Event event(device.type());
    event.record(stream);
    const std::lock_guard lock(mutex_);
    ends_.push_back({device, std::move(event), std::move(keeps)});
  } catch (const std::exception&) {
    // As it says in the header.
  }
}

bool UnderWay::wait(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline, [this] { return count_ == 0; });
}

std::vector<UnderWay::End> UnderWay::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(ends_, {});
}

void UnderWay::follow() {
  for (const End& end : take()) end.event.block(c10::impl::VirtualGuardImpl(end.device.type()).getStream(end.device));
}

bool UnderWay::End::has_passed() const noexcept {
  try {
    return event.query();
  } catch (const std::exception&) {
    return true;  // the device is of no more use, or the process is about to end
  }
}

void UnderWay::leave(Clock::time_point deadline) {
  static auto* const all = new std::vector<End>;  // what is left at the end of the process is the operating system's
  static auto* const mutex = new std::mutex;
  std::vector<End> ends = take(), passed;  // let go of without the lock
  const auto sort = [&passed](std::vector<End>& from) {
    std::vector<End> rest;
    for (End& end : from) (end.has_passed() ? passed : rest).push_back(std::move(end));
    from = std::move(rest);
  };
  for (sort(ends); !ends.empty() && Clock::now() < deadline; sort(ends)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::lock_guard lock(*mutex);
  std::move(ends.begin(), ends.end(), std::back_inserter(*all));
  sort(*all);
}

}  // namespace regtopk
