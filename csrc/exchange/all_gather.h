#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace regtopk {

// All-gathers `input` of every rank into the rows of `output` [ranks, ...], asynchronously.
inline c10::intrusive_ptr<c10d::Work> all_gather(
    c10d::ProcessGroup& group, const at::Tensor& output, const at::Tensor& input,
    const c10d::AllgatherOptions& options = c10d::AllgatherOptions()) {
  at::Tensor flat = output.view({-1}), sent = input;
// torch 2.14 renamed this function and deprecates the name that earlier versions have; both work.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return group._allgather_base(flat, sent, options);
#pragma GCC diagnostic pop
}

}  // namespace regtopk
