// What moves bytes between the ranks of a model. A scheme says through which collectives a bucket goes and what is to be done with what
// each brings; a transport decides who issues them, in which order, and on which thread or stream the rest is done.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace regtopk {

class Transport {
 public:
  using FuturePtr = c10::intrusive_ptr<c10::ivalue::Future>;

  struct Collective {
    enum class Kind {
      kGather,     // puts `input` of every rank into the rows of `output`
      kAllReduce,  // adds up `input` of every rank, in place
      kBroadcast,  // `input` of the root to every rank, in place
      kSwap,       // row r of `input` to rank r, into the row of this rank in its `output`
    } kind;
    at::Tensor input;
    at::Tensor output = {};
    int64_t root = 0;
    enum class Among { kAll, kHost, kHosts } among = Among::kAll;  // all ranks, those of a host, or those of one place on their hosts
  };
  struct Stage {
    Collective collective;
    std::function<void()> then;  // when it has arrived
    bool fails_alike = false;    // what it throws it throws on every rank: none goes on to the next stage
  };
  struct Bucket {
    at::Tensor result;           // what the future holds in the end
    int64_t step;                // for messages
    std::function<void(double)> count_seconds;  // from issuing a collective until its arrival was seen
    std::function<void()> fail;  // where the bucket does not come to its end
    std::vector<std::shared_ptr<void>> keeps = {};  // what a device may be using after the host has let go of it
  };

  virtual ~Transport() = default;
  virtual int64_t rank() const = 0;
  virtual int64_t workers() const = 0;
  virtual std::chrono::milliseconds timeout() const = 0;  // of all that waits

  // Takes a bucket through its stages, all ranks through the same. The first collective is issued before this returns. What a `then`
  // throws is the future's error; what this rank would send afterwards is zeros then, which no other rank takes for a message: none waits
  // for it in vain, and each has an error of its own.
  virtual FuturePtr exchange(std::vector<Stage> stages, Bucket bucket) = 0;

  // What follows a bucket's future is a part of the bucket to whoever waits for all of them.
  virtual void also_wait_for(const FuturePtr& /*future*/) {}

  // These wait. `caller` is who a message is from; `activity` says what is waited for, in words that are the same on every rank.
  virtual std::vector<std::string> gather_texts(const std::string& own, const std::string& caller, const std::string& activity) = 0;
  virtual void add_up(const at::Tensor& tensor, const std::string& caller, const std::string& activity) = 0;

  // Says to the other ranks why this one does not take part in what they are about to do.
  virtual void announce_failure(const std::string& why) = 0;
  // Says to the other ranks that this one takes part in nothing any more.
  virtual void announce_close() = 0;
  // Waits until no bucket is pending; raises DistBackendError if one still is after the timeout.
  virtual void wait_idle() = 0;
  // Fails what is pending and lets go of everything. Idempotent.
  virtual void close() = 0;
};

}  // namespace regtopk
