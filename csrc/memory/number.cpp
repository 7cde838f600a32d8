#include "number.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace regtopk {

void Number::place_on(at::Device device) {
  if (there_.defined()) return;
  there_ = at::zeros({1}, at::TensorOptions().dtype(at::kDouble).device(device));
  here_ = device.is_cpu() ? there_ : at::empty({1}, at::TensorOptions().dtype(at::kDouble).pinned_memory(true));
}

void Number::send() {
  if (!there_.is_cpu()) here_.copy_(there_, /*non_blocking=*/true);
}

double Number::heard() const { return here_.item<double>(); }

}  // namespace regtopk
