// What a worker keeps for one bucket layout, and what of it belongs to one parameter.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../ops/operators.h"
#include "layout.h"
#include "number.h"

namespace regtopk {

// The state of one parameter. Indices are flat, in the parameter's memory order.
struct Piece {
  Owner owner;
  at::Tensor residual;    // [numel], accumulate dtype
  at::Tensor velocity;    // the same, masked; undefined where there is none
  at::Tensor sent_index;  // [m] int64, ascending; undefined where there is no history
  at::Tensor sent_value;  // [m], gradient dtype
  at::Tensor feedback;    // [m], accumulate dtype; undefined for Top-k
  at::Tensor idle;        // uint8 [1], or undefined: not idle
};

// The state of one bucket layout, in tensors on the bucket's device. Buffers live as long as the plan: a step allocates nothing.
struct Plan {
  Layout layout;
  std::vector<Owner> owners;  // of the spans
  int64_t numel = 0, hash = 0;
  Shared shared;        // the ends of the spans, which of them are idle, and the clock's verdict
  at::Tensor residual;  // [numel], accumulate dtype
  at::Tensor velocity;  // the same; undefined without
  bool masks = false;   // whether what is sent and applied leaves it

  // The last payload sent and what came back for it. `sent` is undefined without history, `feedback` also for Top-k.
  at::Tensor sent;      // bytes
  int64_t sent_k = 0;
  bool sent_all = false;  // it was dense: what it sent may return, but is no history
  at::Tensor feedback;  // [sent_k]
  int64_t sent_round = -1;
  at::Tensor applied;     // see ops/library.cpp; undefined where nothing is to be said
  bool in_vain = false;   // `sent` reached nobody and must return to the residual

  int64_t round = -1;     // of the last bucket exchanged on this plan
  std::atomic<int64_t> times_given = 0;  // how often what a step gave has come into the residual

  // A bucket comes, and all of the step before has been waited for, on its stream.
  void begin(int64_t of_round) {
    round = of_round;
    retired_.clear();
  }
  // Entries to send, and the form in which they travel, from now on.
  void set_message(int64_t k, const Wire& wire);
  int64_t k() const { return k_; }
  const Wire& wire() const { return wire_; }
  int64_t payload_bytes() const { return payload_bytes_; }
  int64_t message_bytes_of(int64_t k, const Wire& wire) const;
  int64_t message_bytes() const { return message_bytes_; }
  // Or a payload travels as it is.
  bool has_wire_form() const { return has_wire_form_; }

  // The one of two own payloads that is not `sent`, which is still read while this one is written.
  at::Tensor next_payload();
  at::Tensor message;          // its wire form, where it has one
  at::Tensor received;         // [workers, bytes], where a transport puts everybody's messages
  at::Tensor payloads;         // [workers, bytes], made of them; `received` itself where payloads travel as they are
  at::Tensor feedback_buffer;  // [rows, k]
  // Of a support that a leader has chosen, bytes: its message; what this rank sends to each, its own averages, and those of all.
  at::Tensor lead, rows, slice, averages;
  Number squared_norm;   // of the last average; without memory where no density follows it
  // With levels: where parts lie in rows, of whole parameters with that hash, and what a step finds wrong; see ops/library.cpp.
  at::Tensor parts, found;
  int64_t parts_hash = 0;
  int64_t chunk_k = 0;   // of k, what each chunk sends, where there are chunks
  std::string why_dense;  // why it sends all its entries; empty where it chooses
  bool is_dense() const { return !why_dense.empty(); }
  bool follows = false;  // the payload under way has no entries yet: the leader's support has not come

  // One flag a span. A device takes them in without being waited for.
  void set_applied(std::vector<uint8_t> flags);
  void remember(const at::Tensor& payload, const at::Tensor& feedback_of_payload, int64_t in_round);
  // It is settled, and its round will be another's.
  void forget_round() {
    sent_round = -1;
    applied.reset();
  }
  // Does once what the step before leaves to do to the velocity, as soon as it is known to be applied.
  void mask();
  // Ends the history and returns its number of entries.
  int64_t forget();
  // Does at once what the next compress would do first: what was not applied returns to the residual. Waits for the device.
  void settle(const at::Tensor& counters);
  // The pieces, settled: as views of this plan's tensors where they can be.
  std::vector<Piece> split() const;

 private:
  int64_t k_ = 0, payload_bytes_ = 0, message_bytes_ = 0;
  bool has_wire_form_ = false;
  Wire wire_{};
  at::Tensor payloads_[2];
  std::vector<uint8_t> applied_flags_;  // of applied_, the same step after step as a rule
  at::Tensor applied_;
  bool to_mask_ = false;  // `sent` has not left the velocity yet
  // What a step has let go of. It belongs to the stream of the hook's call, which would use its memory for something else, and one that
  // works behind a collective may still have to read it.
  std::vector<at::Tensor> retired_;
  void retire(at::Tensor& tensor) {
    if (tensor.defined()) retired_.push_back(std::exchange(tensor, {}));
  }
};

// Nothing where it is undefined.
std::optional<at::Tensor> optional(const at::Tensor& tensor);

// Gives the tensor that shape, in memory that it has had before where that is enough, else in new memory.
void reserve(at::Tensor& tensor, at::IntArrayRef shape, const at::TensorOptions& options);

}  // namespace regtopk
