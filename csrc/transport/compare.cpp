#include "compare.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <utility>

namespace regtopk {

Transport::Stage compare(int64_t own, int64_t ranks, std::function<void(const std::vector<int64_t>&)> check) {
  const at::Tensor all = at::empty({ranks, 1}, at::kLong);
  return {
      .collective = {.kind = Transport::Collective::Kind::kGather, .input = at::full({1}, own, at::kLong), .output = all},
      .then =
          [all, check = std::move(check)] {
            const int64_t* const numbers = all.const_data_ptr<int64_t>();
            check({numbers, numbers + all.numel()});
          },
      .fails_alike = true};
}

}  // namespace regtopk
