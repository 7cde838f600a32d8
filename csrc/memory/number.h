// One number that an operator finds out on the buckets' device, and its copy for the host, which nobody waits for.
#pragma once

#include <ATen/core/Tensor.h>

namespace regtopk {

class Number {
 public:
  // Gives it memory, unless it has some.
  void place_on(at::Device device);
  // fp64 [1], where it is found out.
  const at::Tensor& there() const { return there_; }
  // Begins the copy, behind what the current stream has to do. Nothing on the CPU.
  void send();
  // What was sent, once an event behind the copy has come to pass.
  double heard() const;

 private:
  at::Tensor there_, here_;  // the same memory on the CPU
};

}  // namespace regtopk
