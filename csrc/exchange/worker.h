// One worker's side of the exchange, without the network: which step it is, what is kept, compress and aggregate.
// The DDP exchange has one of these; the local exchange has N in one process.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../ops/operators.h"
#include "residual_store.h"

namespace regtopk {

struct Options {
  bool regularised = true;  // RegTop-k, else Top-k
  double density = 0.001;   // k / J
  double mu = 5.0;
  std::string distortion = "previous";
};

// Sums since construction, of this worker. Bytes are what this worker puts on the network: (N - 1) payloads per
// all-gather, 2 (N - 1) / N buckets per ring all-reduce.
struct Statistics {
  int64_t steps = 0, void_steps = 0, rebuilds = 0, history_dropped = 0;
  int64_t dense_buckets = 0;  // buckets that went through a dense all-reduce: paused, or sparse tensors
  int64_t entries = 0, sent_entries = 0, repeated = 0, displaced = 0;
  double bytes_sent = 0, bytes_dense = 0;
  double compress_seconds = 0, exchange_seconds = 0, aggregate_seconds = 0;
};

class Worker {
 public:
  // `who` begins the messages of errors that are not an operator's.
  Worker(Options options, std::string who, int64_t rank, int64_t workers);

  const Options& options() const { return options_; }
  const std::string& who() const { return who_; }
  int64_t rank() const { return rank_; }
  int64_t workers() const { return workers_; }
  int64_t step() const;
  double scale() const;             // of the residuals: that of the gradients of the step
  void set_step(int64_t step);  // the number of the last step done

  // Raises TypeError or ValueError unless a bucket's gradient has a dtype and a device that can be exchanged.
  void check_exchangeable(const at::Tensor& gradient) const;
  // Whether a bucket begins a step: see begin().
  bool begins_step(const Layout& layout, int64_t index, double scale) const;
  // The plan for a bucket that is about to be exchanged; `index` is what DDP says is its place among the buckets of a step,
  // `scale` what its gradients were multiplied by. A step begins when the index falls, a parameter already seen comes back or
  // the scale is another one; what a void step sent then returns to the residuals, and the residuals take on the scale.
  std::shared_ptr<Plan> begin(const Layout& layout, int64_t index, double scale);
  // Counts a bucket that holds no plan (sparse tensors), so that steps are recognised.
  void begin_without_plan(const Layout& layout, int64_t index, double scale);
  // Says that the next bucket begins a step.
  void end_step();

  // From the bucket's gradient to this worker's message, a new tensor of bytes; the gradient is only read.
  at::Tensor compress(Plan& plan, const at::Tensor& gradient);
  // Writes the average of what `messages` [N, bytes] hold, of the step that the own message names, to `gradient`: zero for
  // parameters whose gradients are zero on all ranks. Returns the feedback of ranks [first, first + count), one row each, or
  // an undefined tensor for Top-k. ValueError if the ranks' scales differ.
  at::Tensor aggregate(
      const Plan& plan, const at::Tensor& own_message, const at::Tensor& messages, const at::Tensor& gradient, int64_t first, int64_t count);
  // Ends the bucket: keeps the history, counts, notes from the headers whether the step is void, and takes back what was
  // sent for parameters whose gradients are zero on all ranks.
  void finish(Plan& plan, const at::Tensor& message, const at::Tensor& feedback, const at::Tensor& messages);
  // The message reached nobody: what it took returns to the residual at the next step.
  void finish_in_vain(Plan& plan, const at::Tensor& message);
  // Counts a bucket exchanged by a dense all-reduce; its history, if any, ends.
  void finish_dense(Plan* plan, double bucket_bytes);
  void count_seconds(double Statistics::* which, double seconds);

  Statistics statistics() const;
  // These are in units of the gradient before scaling.
  double residual_norm() const;  // in fp64; reads every residual
  std::unordered_map<ParameterKey, Piece> export_pieces();
  void import_pieces(std::unordered_map<ParameterKey, Piece> pieces);

 private:
  CompressOptions operator_options(const Plan& plan) const;
  void check_scale(double scale) const;
  bool is_new_step(const Layout& layout, int64_t index, double scale) const;
  void note_bucket(const Layout& layout, int64_t index, double scale);
  void settle();
  bool feedback_has_scale() const { return options_.regularised && options_.distortion == "current"; }

  const Options options_;
  const std::string who_;
  const int64_t rank_, workers_;

  // Guards everything below. A plan's tensors need no lock: one stage at a time works on a plan.
  mutable std::mutex mutex_;
  ResidualStore store_;
  Statistics statistics_;
  std::unordered_set<ParameterKey> seen_;  // in this step
  int64_t last_index_ = -1;                // of this step's buckets
  double scale_ = 1;  // of the residuals
  int64_t step_ = -1;
  bool step_begun_ = false;
  int64_t void_step_ = -1;
};

}  // namespace regtopk
