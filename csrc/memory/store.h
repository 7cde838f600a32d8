// What one worker keeps between steps: residuals, velocities and the history of the last step, by parameter.
//
//   a bucket's layout ── known ──────────────────────────────► plan
//                     └─ new: plans that share parameters ──► pieces, one per parameter ──► plan
//
// DDP regroups parameters while training. A plan holds the state of one layout; for a new one, plans that have parameters
// of it are taken apart into pieces, and the new plan is put together. A piece that no plan has claimed waits, with memory of
// its own; loading a checkpoint supplies such pieces. Nothing is lost on the way but the pieces of parameters that are gone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "plan.h"

namespace regtopk {

using Pieces = std::unordered_map<ParameterKey, Piece>;

class Store {
 public:
  // What is let go of, for the caller to free where no lock is held: freeing a tensor may wait for Python.
  struct Garbage {
    std::vector<std::shared_ptr<Plan>> plans;
    std::vector<Pieces> pieces;
  };

  // The plan of a layout, or null. `hint` is where it probably is: the bucket's index.
  std::shared_ptr<Plan> find(const Layout& layout, int64_t hint) const;
  // Whether a parameter of the layout was exchanged in that round.
  bool was_exchanged(const Layout& layout, int64_t round) const;
  // ValueError, from `who`, if a parameter of the layout had another size when something was kept of it.
  void check_sizes(const std::string& who, const Layout& layout) const;
  // Puts a plan together from pieces, with velocities or without.
  std::shared_ptr<Plan> make(
      const Layout& layout, std::vector<Owner> owners, const at::Tensor& verdict, const at::Tensor& counters, bool with_velocity,
      Garbage& garbage);

  const std::vector<std::shared_ptr<Plan>>& plans() const { return plans_; }

  // All pieces, settled, as copies, but those of parameters that are gone, which it drops.
  Pieces copy_pieces(const at::Tensor& counters, Garbage& garbage);
  // The 2-norm, taken in fp64, of all residuals, settled, but those of parameters that are gone.
  double residual_norm(const at::Tensor& counters, Garbage& garbage);
  // Multiplies all residuals and velocities, and the feedback where it is a gradient and not a ratio. Plans must be settled.
  void multiply(double factor, bool feedback_too);
  // Replaces everything by these pieces.
  void replace(Pieces pieces, Garbage& garbage);
  // Sets residual and velocity of these parameters to zero and ends their history.
  void clear(const std::vector<ParameterKey>& keys, const at::Tensor& counters);

  int64_t rebuilds = 0;          // plans taken apart
  int64_t history_dropped = 0;   // entries whose history did not survive a new layout
  int64_t residual_dropped = 0;  // entries of residuals whose parameter is gone

 private:
  void take_apart(const std::shared_ptr<Plan>& plan, const Layout& layout, const at::Tensor& counters);
  void drop_the_gone(Garbage& garbage);

  std::vector<std::shared_ptr<Plan>> plans_;
  Pieces waiting_;
};

}  // namespace regtopk
