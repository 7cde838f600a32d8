// What one worker keeps between steps: residuals and the history of the last step, by parameter.
//
// DDP groups parameters into buckets and regroups them while training. A plan holds the state of one bucket layout; when
// a layout appears that shares parameters with other plans, those are taken apart into pieces, one per parameter, and the
// new plan is put together from them. Loading a checkpoint supplies pieces too. Nothing is lost on the way: a piece that
// no plan has claimed waits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

namespace regtopk {

using ParameterKey = uint64_t;

struct Parameter {
  ParameterKey key;
  int64_t numel;
  at::Tensor owner;  // keeps the address that `key` stands for from being used again; may be undefined
};

// The parameters of a bucket, in the order in which their gradients lie in it.
struct Layout {
  std::vector<Parameter> parameters;
  at::ScalarType dtype;

  int64_t numel() const;
  // Equal on every rank for equal layouts: it hashes sizes and dtype, not keys.
  int64_t hash() const;
  bool same_parameters(const Layout& other) const;
};

// The state of one parameter. Indices are flat, in the parameter's memory order.
struct Piece {
  at::Tensor residual;     // [numel], accumulate dtype
  at::Tensor sent_index;   // [m] int64, ascending; undefined where there is no history
  at::Tensor sent_value;   // [m], gradient dtype
  at::Tensor feedback;     // [m], accumulate dtype; undefined for Top-k

  Piece clone() const;
};

struct Plan {
  Layout layout;
  int64_t numel = 0, k = 0, hash = 0;
  at::Tensor residual;  // [numel], accumulate dtype

  // The last payload sent and what came back for it. `sent` is undefined without history, `feedback` also for Top-k.
  at::Tensor sent;      // bytes
  int64_t sent_k = 0;
  at::Tensor feedback;  // [sent_k]
  int64_t sent_step = -1;
  bool in_vain = false;  // `sent` was not applied anywhere and must return to the residual

  int64_t agreed_version = -1;  // options version that all ranks agreed on for this plan

  void remember(at::Tensor payload, at::Tensor feedback_of_payload, int64_t step);
  // Takes what was sent for these parameters, given by place in the layout, back into the residual and out of the history.
  // Returns the entries taken back.
  int64_t take_back(const std::vector<int64_t>& parameters);
  // Forgets the history; puts `sent` back first if it was in vain. Returns the entries whose history was dropped.
  int64_t forget();
};

class ResidualStore {
 public:
  // k for a bucket of numel entries.
  using EntriesToSend = std::function<int64_t(int64_t numel)>;

  // The plan of a layout, built from pieces where it is new. ValueError, from `who`, if a parameter has changed its size.
  std::shared_ptr<Plan> plan_for(const std::string& who, const Layout& layout, const EntriesToSend& entries_to_send);

  const std::vector<std::shared_ptr<Plan>>& plans() const { return plans_; }
  int64_t rebuilds() const { return rebuilds_; }                // plans taken apart
  int64_t history_dropped() const { return history_dropped_; }  // entries whose history did not survive a new layout

  // All pieces, of plans and waiting ones, as views.
  std::unordered_map<ParameterKey, Piece> pieces() const;
  // Multiplies all residuals, and the feedback where it is a gradient and not a ratio.
  void multiply(double factor, bool feedback_too);
  // Replaces everything by these pieces.
  void import_pieces(std::unordered_map<ParameterKey, Piece> pieces);

 private:
  void dissolve(Plan& plan);
  std::shared_ptr<Plan> assemble(const std::string& who, const Layout& layout, const EntriesToSend& entries_to_send);

  std::vector<std::shared_ptr<Plan>> plans_;
  std::unordered_map<ParameterKey, Piece> waiting_;
  int64_t rebuilds_ = 0, history_dropped_ = 0;
};

}  // namespace regtopk
