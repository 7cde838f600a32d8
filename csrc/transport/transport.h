// What moves bytes between the ranks of a model. A scheme asks for a collective and says what is to be done with what it
// brings; a transport decides who issues it, in which order, and on which thread or stream the rest is done.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace regtopk {

class Transport {
 public:
  using FuturePtr = c10::intrusive_ptr<c10::ivalue::Future>;

  // What is done with a collective of one bucket.
  struct Bucket {
    at::Tensor result;             // what the future holds in the end
    int64_t step;                  // for messages
    std::function<void(double)> count_seconds;  // from issuing it until its arrival was seen
    std::function<void()> finish;  // when it has arrived; may throw, which is the future's error
    std::function<void()> fail;    // instead of finish, or after it threw
  };

  virtual ~Transport() = default;
  virtual int64_t rank() const = 0;
  virtual int64_t workers() const = 0;

  // Puts `payload` of every rank into the rows of `received` [ranks, bytes]. Issued before this returns.
  virtual FuturePtr gather(const at::Tensor& payload, const at::Tensor& received, Bucket bucket) = 0;
  // Adds up `bucket.result` of every rank, in place. Issued before this returns.
  virtual FuturePtr all_reduce(Bucket bucket) = 0;

  // These wait. `caller` is who a message is from; `activity` says what is waited for, in words that are the same on every rank.
  virtual std::vector<std::string> gather_texts(const std::string& own, const std::string& caller, const std::string& activity) = 0;
  virtual void add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) = 0;

  // Says to the other ranks why this one does not take part in what they are about to do.
  virtual void announce_failure(const std::string& why) = 0;
  // Waits until no bucket is pending; raises DistBackendError if one still is after the timeout.
  virtual void wait_idle() = 0;
  // Fails what is pending and lets go of everything. Idempotent.
  virtual void close() = 0;
};

}  // namespace regtopk
