// What the ways in with a process group have in common: one bucket in, a future of its average out. A front end says what a
// bucket is and when a step begins.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "../exchange/agreement.h"
#include "../exchange/scheme.h"
#include "../transport/transport.h"

namespace regtopk {

class GroupExchange {
 public:
  using FuturePtr = Transport::FuturePtr;
  // What its owner, in another language, supplies; each may take that language's lock.
  struct Owner {
    using OwnCalls = std::function<std::string()>;
    std::function<std::shared_ptr<Transport>(const std::string& caller, OwnCalls own_calls)> open;  // at the first use
    std::function<double()> scale;        // what the gradients of the step under way were multiplied by; may be empty
    Worker::AppliedKeys applied;
  };

  GroupExchange(Options options, std::shared_ptr<Clock> clock, Owner owner);
  // Closes; the GIL must not be held.
  ~GroupExchange();

  // Says which way in is used, in the words that begin messages: the same one ever after, ValueError for another.
  void use(const std::string& caller);
  // What a bucket's gradients were multiplied by.
  double scale() const { return owner_.scale ? owner_.scale() : 1.0; }

  // Exchanges one bucket. The future holds `average`, which may be the memory of `gradient`; else that is only read. `describe` is
  // asked where the ranks compare their buckets: the bucket in words. Of a rank that is `absent`, which contributes nothing, the
  // gradient is zero.
  FuturePtr exchange(
      const Bucket& bucket, const at::Tensor& gradient, const at::Tensor& average, const Worker::MakeOwners& owners,
      const std::function<Fingerprint()>& describe, bool absent = false);

  // A step of one bucket that has no entries: it is compared, counted and judged as others, and nothing travels.
  void exchange_nothing(const Bucket& bucket, const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe);

  // Of lists that take turns, ranks compare which one this is: on its way, where each of them is one bucket, of which it returns whether that
  // is so; else here.
  bool begin_list(uint64_t list, bool is_whole);
  void end_list() { previous_ = 0; }

  // Dense all-reduce instead of payloads, and back; residuals stay. Takes effect at the next bucket, on all ranks or none.
  void set_dense(bool dense);
  // Says that the last step was not applied: what was sent in it returns.
  void skipped(Deed deed = Deed::kSkipped);
  void did(Deed deed) { worker_->did(deed); }

  // The open transport, once nothing is pending on it.
  Transport& transport();
  // The worker, once no bucket is pending.
  Worker& idle_worker();
  Worker& worker() const { return *worker_; }
  std::shared_ptr<Worker> keep_worker() const { return worker_; }
  bool is_open() const { return transport_ != nullptr; }

  // Fails what is pending, gives the groups back and refuses further buckets. The GIL must not be held. Idempotent. Ranks that wait for this
  // one are told, if it is not the end of the process, where the group's store may be gone.
  void close(bool tells = false);

 private:
  // The dense parameters of a bucket and the others, as two buckets with copies of their parts.
  FuturePtr exchange_in_parts(
      const Bucket& bucket, const std::vector<bool>& dense, const at::Tensor& gradient, const at::Tensor& average,
      const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe, bool absent);
  FuturePtr exchange_as_one(
      const Bucket& bucket, const at::Tensor& gradient, const at::Tensor& average, const Worker::MakeOwners& owners,
      const std::function<Fingerprint()>& describe, bool absent);
  FuturePtr move(const Bucket& bucket, std::vector<Transport::Stage> stages, Transport::Bucket moved);
  // Says once where a bucket would send less with all its entries.
  void advise(const Plan& plan);
  // The plan for the bucket, on which all ranks have agreed; null where it keeps nothing.
  std::shared_ptr<Plan> enter(const Bucket& bucket, const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe);
  // Before a payload travels: what ranks have to have in common is compared where it may have changed.
  void agree_before(const Bucket& bucket, Plan* plan, bool begins, const std::function<Fingerprint()>& describe);
  void forget_agreements();
  void agree_on(const Bucket& bucket, int64_t hash, const Fingerprint& description);
  bool is_dense() const { return dense_ || worker_->is_dense_step(); }

  std::string caller_ = "sparse_hook";  // before the worker, which is told
  // Shared with pending buckets, which may outlive this object by a moment.
  const std::shared_ptr<Worker> worker_;
  std::shared_ptr<Transport> transport_;  // null before the first use, and after close()
  std::mutex open_mutex_;
  Owner owner_;
  bool used_ = false;
  bool closed_ = false, dense_ = false;  // paused
  bool dense_step_ = false;              // of the last bucket
  bool advised_ = false;
  double agreed_density_;                // NaN before the first step of a schedule
  std::pair<uint64_t, int64_t> alone_;   // what this rank may have done alone, at the beginning of the last step
  std::unordered_set<int64_t> agreed_;  // layouts and kinds of bucket, hashed, that were agreed on under these options
  // And which of them came behind which, hashed together. One that comes behind another than ever before is agreed on anew: where a rank has
  // left a step half done, or has other buckets than the others, payloads of unequal size would meet. All of this is equal on ranks that have
  // agreed so far.
  std::unordered_set<int64_t> turns_;
  int64_t previous_ = 0;  // the last bucket; 0 between lists
  bool all_are_new_ = false;  // buckets of the step under way
  struct List {
    std::string words;
    bool is_whole;
  };
  using Lists = std::unordered_map<uint64_t, List>;
  std::shared_ptr<Lists> lists_ =
      std::make_shared<Lists>();  // that were agreed on, in words; shared with pending buckets, and replaced instead of changed
};

}  // namespace regtopk
