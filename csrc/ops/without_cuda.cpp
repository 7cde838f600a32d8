// Built in place of the CUDA kernels where there are none: CUDA tensors get one clear sentence.
#include <torch/library.h>

#include "operators.h"

namespace {

void no_cuda_kernels(const c10::OperatorHandle& operation, torch::jit::Stack*) {
  const std::string name = operation.schema().operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, name.substr(name.find("::") + 2), ": expected CPU tensors, got CUDA tensors; this build of regtopk_torch has no CUDA kernels");
}

}  // namespace

bool regtopk::has_cuda_kernels() { return false; }

TORCH_LIBRARY_IMPL(regtopk, CUDA, library) {
  for (const char* name : {"compress_", "aggregate_", "measure_",   "correct_", "mask_",  "judge_",        "settle_",
                           "put_back_", "to_wire_",   "from_wire_", "encode",   "decode", "take_",         "average_slice_",
                           "spread_",   "feedback_",  "split_",     "mean_",    "join_",  "mark_unfilled_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda_kernels>());
  }
}
