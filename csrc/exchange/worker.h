// One worker's side of the exchange, without a network: what it keeps, which step it is in, what it has counted. A front
// end has one of these, the local exchange one per simulated worker; schemes work on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../core/deed.h"
#include "../memory/report.h"
#include "../memory/store.h"
#include "density.h"
#include "statistics.h"
#include "steps.h"

namespace regtopk {

struct Options {
  bool regularised = true;  // RegTop-k, else Top-k
  double density = 0.001;   // k / J
  double mu = 5.0;
  std::string distortion = "previous";
  double decay = 1.0;       // of the residual, each step
  int64_t dense_steps = 0;  // the first ones, without compression
  std::optional<at::ScalarType> wire_dtype;  // of the values that travel, where it has fewer bytes than the gradients'
  bool elias_fano = false;  // the index code
  bool leader = false;      // chooses for all ranks, else each for itself
  int64_t chunk = 0;        // consecutive entries that each send k / J of theirs; 0: a bucket's as a whole
  double momentum = 0;      // the velocity u = momentum u + g is given instead of g
  bool nesterov = false;    // g + momentum u is
  bool mask_momentum = false;  // what is sent and applied leaves u
  double clip_norm = 0;     // of a bucket's g, divided by the root of the number of workers; 0: any
  bool dense_auto = false;  // a bucket sends all its entries where chosen ones would take no fewer bytes
  // Which parameters do, by their keys and sizes, if it is not empty; may take another language's lock.
  std::function<std::vector<bool>(const std::vector<ParameterKey>& keys, const std::vector<int64_t>& numels)> dense_rule;
  int64_t host_ranks = 1;   // ranks of a host, which send their mean as one; 1: each rank for itself
  int64_t local_rank = -1;  // among them, where something else than the rank says it
  std::function<double(int64_t step)> schedule;  // the density of a step, instead of `density`; may take another language's lock
  std::optional<AdaptiveDensity> adaptive;  // instead of `density`

  bool corrects() const { return momentum > 0 || clip_norm > 0; }
};

// One bucket as a front end hands it over.
struct Bucket {
  Layout layout;
  int64_t index;       // its place among the buckets of a step
  double scale;        // what its gradients were multiplied by
  bool keeps = true;   // whether there are residuals to keep for it: not for sparse tensors
  bool dense = false;  // by the user's rule: it sends all its entries
  uint64_t list = 0;       // of tensors, which come when the caller says so and not when a model does: which one
  bool is_whole_list = false;
};

class Worker {
 public:
  // The parameters of this worker that an optimizer has applied since its last step began; asked for after a void step alone.
  using AppliedKeys = std::function<std::vector<ParameterKey>()>;
  using MakeOwners = std::function<std::vector<Owner>()>;

  // `who` begins the messages of errors that are not an operator's.
  Worker(Options options, std::string who, std::shared_ptr<Clock> clock);

  const Options options;
  std::string who;  // begins messages
  std::chrono::milliseconds limit = std::chrono::minutes(10);  // of all that waits: the transport's, where there is one
  int64_t rank = 0, workers = 1;  // among those who send each other payloads: hosts, where there are levels. Set before the first bucket
  int64_t place = 0;              // on the host
  int64_t ranks() const { return workers * options.host_ranks; }
  Steps steps;
  Statistics statistics;
  Report report;

  // Raises TypeError or ValueError unless gradients of that bucket can be exchanged.
  void check(const Bucket& bucket) const;
  bool begins_step(const Bucket& bucket) const;
  // Of the step under way.
  double density() const { return density_; }
  // Of a bucket that has come back, what the next step's density depends on; `bytes_of` k entries in the plan's bucket.
  void measure(const Plan& plan, const Number& squared_norm, const std::function<double(int64_t k)>& bytes_of);
  void begin_measuring_anew() { measures_anew_ = true; }  // with the next step; any thread may say so
  DensityControl density_control;                        // of an adaptive one
  bool is_dense_step() const { return steps.step() < options.dense_steps; }
  // What the user's rule says of each span; it is asked once for a parameter.
  std::vector<bool> ruled_dense(const Layout& layout, const MakeOwners& owners);
  // The buckets that send all their entries at present: their parameters, entries, and why. Any thread may ask.
  using DenseBuckets = std::vector<std::tuple<std::vector<ParameterKey>, int64_t, std::string>>;
  DenseBuckets dense_buckets() const;
  // The plan for a bucket that is about to be exchanged; null where it keeps nothing. Where it begins a step, the residuals
  // take on its scale.
  std::shared_ptr<Plan> enter(const Bucket& bucket, const MakeOwners& owners, const AppliedKeys& applied);

  // While this lives no plan is taken apart, on whatever thread: for who compresses on another than the front end's.
  std::unique_lock<std::mutex> hold_plans() { return std::unique_lock(mutex_); }

  // Takes in what a device has found out by now, or, with `wait`, of all steps so far, this last one included. ValueError, once,
  // where a payload was damaged.
  void hear(bool wait = false);

  // After a void step: learns which parameters an optimizer has stepped on all the same. Before anything returns.
  void note_applied(const AppliedKeys& applied);

  // These are in units of the gradient before scaling. Between steps only.
  double residual_norm();  // taken in fp64; reads every residual
  Pieces copy_pieces();
  // Of an AdaptiveDensity, else empty.
  std::vector<double> density_state();
  void replace_pieces(Pieces pieces, int64_t step, const std::vector<double>& density_state);
  void clear(const std::vector<ParameterKey>& keys);

  // How often what a step gave has come into a parameter's residual, whatever became of the bucket then. Any thread.
  std::map<ParameterKey, int64_t> times_given();

  // What this rank alone did, for its messages.
  void did(Deed deed) { deed_ = next_deed(deed_, deed); }
  uint64_t deed() const { return deed_; }

 private:
  // What is kept of a bucket here: all of it, or with levels, in `room`, a part of each parameter.
  const Layout& kept_of(const Layout& whole, Layout& room) const;
  void wait_until(const std::function<bool()>& is_so) const;
  void wait_for_report() const;
  void take_in_measured();
  double density_of(int64_t step) const;
  int64_t entries_to_send(double density, int64_t numel) const;
  int64_t share_of(double density, int64_t entries) const;
  Wire wire_of(at::ScalarType gradient_dtype) const;
  // Returns whether the plan has become dense or ceased to be.
  bool set_form(Plan& plan, bool ruled_dense);
  void publish_dense();
  void begin_step(double scale, const AppliedKeys& applied);
  void publish_counts();
  bool feedback_has_scale() const { return options.regularised && options.distortion == "current"; }

  // Guards the store. Nobody waits for it with the GIL, and nothing is freed under it.
  std::mutex mutex_;
  Store store_;
  double density_;
  mutable std::mutex dense_mutex_;  // for a moment each
  DenseBuckets dense_buckets_;
  std::atomic<bool> measures_anew_ = false;
  struct Measured {
    Number squared_norm;
    double scale, sent_bytes, mean_bytes;
  };
  std::vector<Measured> measured_;  // of the step under way, in the order in which the buckets came back: the same on every rank
  struct Ruled {
    Owner owner;  // keeps its key from being another parameter's
    int64_t numel;
    bool dense;
  };
  std::unordered_map<ParameterKey, Ruled> ruled_;
  std::unordered_set<ParameterKey> seen_;  // in this step, of buckets that keep nothing
  std::atomic<uint64_t> deed_ = 0;
};

}  // namespace regtopk
