// What one rank sends for one bucket: the payload, and behind it what the exchange has to know of every rank.
//
//   payload | scale of the gradients (f64) | one bit per parameter, 1 where its gradient is zero everywhere | zeros
//
// The zeros fill the message up to a multiple of 16 bytes. All numbers are little-endian.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "residual_store.h"

namespace regtopk {

class Messages {
 public:
  // The form of the messages of a bucket of that layout with payloads of that size.
  Messages(const Layout& layout, int64_t payload_bytes);

  int64_t bytes() const { return bytes_; }

  // Writes everything behind the payload. Reads a gradient up to its first entry that is not zero.
  void write_tail(const at::Tensor& message, const at::Tensor& gradient, double scale) const;

  // The payload in a message [bytes], or the payloads in messages [ranks, bytes]; a view where it can be.
  at::Tensor payload_of(const at::Tensor& messages) const;
  double scale_of(const at::Tensor& message) const;
  // The parameters, by place in the layout, whose gradients are zero in all entries on all ranks.
  std::vector<int64_t> idle_parameters(const at::Tensor& messages) const;

 private:
  const Layout& layout_;
  int64_t payload_bytes_, flags_at_, bytes_;
};

}  // namespace regtopk
