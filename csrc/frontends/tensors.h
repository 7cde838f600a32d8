// The way in for any list of tensors: one call is one step, all tensors of a dtype are one bucket.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "group.h"

namespace regtopk {

// What a call returns at once.
class Average {
 public:
  bool is_completed() const;
  // The averages, in the order of the tensors. Raises the error of the first bucket that has one.
  std::vector<at::Tensor> wait();
  // Whether the step is void: some average is not finite, or the step was aborted. Waits, on a device for its kernels too.
  bool is_void();

 private:
  friend class TensorsExchange;
  std::vector<GroupExchange::FuturePtr> pending_;
  std::vector<at::Tensor> averages_;
  // Averages that lie one after the other in row-major order, and the tensors elsewhere that are to take them.
  std::vector<std::pair<at::Tensor, at::Tensor>> to_copy_;
  at::Tensor verdict_;
  int64_t round_ = -1;
  std::shared_ptr<Worker> worker_;  // whose memory a device may still have to read, whatever becomes of the exchange
  std::shared_ptr<GroupExchange> exchange_;  // until it has come
  std::mutex mutex_;  // of what wait() takes
};

class TensorsExchange {
 public:
  explicit TensorsExchange(std::shared_ptr<GroupExchange> exchange) : exchange_(std::move(exchange)) {}

  // Dense tensors on one device, each with its key, which is the same on every rank and no address, and the name by which
  // messages call it. `out` takes the averages: none, or a tensor for each, of its shape, dtype and device. The tensors have been
  // read when this returns, but for those that are `out`. Of a rank that is `absent`, which contributes nothing, they are zeros.
  std::shared_ptr<Average> average(
      const std::vector<at::Tensor>& tensors, const std::vector<ParameterKey>& keys, const std::vector<std::string>& names,
      const std::vector<at::Tensor>& out, bool absent);

 private:
  // Where the entries of a bucket are read, and where their averages are written.
  struct Memory {
    at::Tensor given, average;  // may be the same
    bool is_out;                // whether those are the caller's
  };
  // Copies no entry where the parts, or `out`, lie one after the other. `others` are read after this bucket may have been written.
  Memory place(size_t bucket, std::vector<at::Tensor> parts, const std::vector<at::Tensor>& out, const std::vector<at::Tensor>& others);
  // Memory for the entries of a bucket: the last call's, if its caller has let go of all of it.
  at::Tensor memory_for(size_t bucket, int64_t numel, const at::TensorOptions& options);

  const std::shared_ptr<GroupExchange> exchange_;
  std::vector<at::Tensor> memory_;  // of each bucket
};

}  // namespace regtopk
