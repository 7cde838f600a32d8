// What operators have found out in small tensors on the buckets' device, as far as the host has heard of it: sums, damaged
// payloads, void rounds. On the CPU that is all there is to know; from another device it comes by copies that nobody waits for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace regtopk {

class Report {
 public:
  // The device of the buckets: decided by the first one.
  void place_on(at::Device device);
  bool is_placed() const;
  at::Device device() const;
  // As ops/library.cpp says. A status is undefined on the CPU, where operators raise: of the payloads of workers, of the rows of a host's
  // ranks, and both.
  const at::Tensor& counters() const { return counters_; }
  const at::Tensor& status() const { return of_workers_; }
  const at::Tensor& status_in_host() const { return in_host_; }
  const at::Tensor& statuses() const { return statuses_; }

  // Of a round, which may be asked about again unless it has ended: the copy begins behind what the current stream has to do, or
  // with the next one's while another copy is under way. Nothing on the CPU.
  void ask(const at::Tensor& verdict, int64_t round, bool ended = true);

  struct News {
    std::vector<int64_t> void_rounds;
    int64_t status = kNothing, status_in_host = kNothing;
  };
  static constexpr int64_t kNothing = -1;
  // What has arrived since the last time.
  News hear();
  // Whether a copy is on its way still.
  bool is_under_way() const;
  // The sums, as far as heard.
  std::array<int64_t, 3> sums() const;

 private:
  void take_in(News& news);

  mutable std::mutex mutex_;
  bool placed_ = false;
  at::Device device_ = at::kCPU;
  at::Tensor counters_ = at::zeros({3}, at::kLong), statuses_, of_workers_, in_host_;
  // Of devices other than the CPU: a copy in memory of the host, and the event behind it.
  at::Tensor copy_;
  std::optional<c10::Event> copied_;
  bool is_under_way_ = false;
  int64_t last_ended_ = -1, last_void_ = -1;  // rounds
  std::vector<int64_t> asked_, waiting_;  // rounds that the copy under way tells of, and those that the next one will
  std::array<int64_t, 3> sums_{};
};

}  // namespace regtopk
