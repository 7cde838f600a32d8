// The ends of buckets on devices, each with what the verdict said of its round by then. A report (report.h) is asked for behind all that
// a stream has to do; of an end the host hears as soon as it has come to pass, while the device does what it was given afterwards.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

namespace regtopk {

class Ends {
 public:
  // Somebody waits for them: from now on they are noted.
  void watch() { is_watched_ = true; }
  // A bucket of that round has ended with what the current stream of the verdict's device has to do. Nothing on the CPU.
  void note(const at::Tensor& verdict, int64_t round);

  struct News {
    std::vector<int64_t> void_rounds;
    bool are_all;  // no end is on its way still
  };
  // What has come to pass since the last time.
  News hear();

 private:
  struct End {
    int64_t round;
    at::Tensor entry;  // of the verdict, in memory of the host
    c10::Event passed;
  };
  std::atomic<bool> is_watched_ = false;
  std::mutex mutex_;
  std::deque<End> pending_;
};

}  // namespace regtopk
