#include "local_exchange.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

namespace regtopk {
namespace {

// The entries of a gradient in the memory order of `first`, worker 0's: a DDP bucket holds them so, and with channels_last
// that is not the logical order.
at::Tensor flat_as(const at::Tensor& first, const at::Tensor& gradient) {
  if (!first.is_non_overlapping_and_dense()) return gradient.contiguous().view({-1});
  const at::Tensor ordered = gradient.strides() == first.strides()
                                 ? gradient
                                 : at::empty_strided(first.sizes(), first.strides(), gradient.options()).copy_(gradient);
  return ordered.as_strided({first.numel()}, {1});
}

// The reverse: a flat average in the shape of `first`.
at::Tensor shaped_as(const at::Tensor& first, const at::Tensor& flat) {
  if (!first.is_non_overlapping_and_dense()) return flat.view(first.sizes());
  return flat.as_strided(first.sizes(), first.strides());
}

}  // namespace

LocalExchange::LocalExchange(Options options, int64_t workers) {
  TORCH_CHECK_VALUE(workers >= 1, "LocalExchange: expected at least 1 worker, got ", workers);
  for (int64_t rank = 0; rank < workers; ++rank) workers_.push_back(std::make_unique<Worker>(options, "LocalExchange", rank, workers));
}

Worker& LocalExchange::worker(int64_t rank) {
  TORCH_CHECK_INDEX(
      rank >= 0 && rank < workers(), "LocalExchange: expected a rank below ", workers(), ", got ", rank);
  return *workers_[rank];
}

std::vector<at::Tensor> LocalExchange::step(
    const std::vector<std::vector<at::Tensor>>& gradients, const std::vector<std::vector<int64_t>>& buckets, double scale) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(gradients.size()) == workers(), "LocalExchange: expected the gradients of ", workers(), " workers, got ",
      gradients.size());
  const std::vector<at::Tensor>& first = gradients.front();
  for (const auto& of_worker : gradients) {
    TORCH_CHECK_VALUE(
        of_worker.size() == first.size(), "LocalExchange: expected ", first.size(), " gradients of every worker, got ", of_worker.size());
    for (size_t i = 0; i < first.size(); ++i) {
      TORCH_CHECK_VALUE(
          of_worker[i].sizes() == first[i].sizes() && of_worker[i].scalar_type() == first[i].scalar_type(),
          "LocalExchange: expected gradient ", i, " of shape ", first[i].sizes(), " and dtype ", first[i].scalar_type(),
          " of every worker, got ", of_worker[i].sizes(), " and ", of_worker[i].scalar_type());
    }
  }

  for (const at::Tensor& gradient : first) worker(0).check_exchangeable(gradient);

  for (const auto& one : workers_) one->end_step();
  std::vector<at::Tensor> averages(first.size());
  for (size_t index = 0; index < buckets.size(); ++index) {
    const auto& bucket = buckets[index];
    TORCH_CHECK_VALUE(!bucket.empty(), "LocalExchange: expected buckets of at least one parameter, got an empty one");
    for (const int64_t parameter : bucket) {
      TORCH_CHECK_INDEX(
          parameter >= 0 && parameter < static_cast<int64_t>(first.size()), "LocalExchange: expected parameters below ", first.size(),
          " in the buckets, got ", parameter);
    }
    Layout layout{{}, first[bucket.front()].scalar_type()};
    for (const int64_t parameter : bucket) layout.parameters.push_back({static_cast<ParameterKey>(parameter), first[parameter].numel(), {}});
    const auto flat = [&](const std::vector<at::Tensor>& of_worker) {
      std::vector<at::Tensor> parts;
      for (const int64_t parameter : bucket) parts.push_back(flat_as(first[parameter], of_worker[parameter]));
      return parts.size() == 1 ? parts.front() : at::cat(parts);
    };

    std::vector<std::shared_ptr<Plan>> plans;
    std::vector<at::Tensor> own;
    for (int64_t rank = 0; rank < workers(); ++rank) {
      plans.push_back(worker(rank).begin(layout, static_cast<int64_t>(index), scale));
      own.push_back(worker(rank).compress(*plans[rank], flat(gradients[rank])));
    }
    const at::Tensor messages = at::stack(own);
    const at::Tensor average = at::empty({layout.numel()}, first[bucket.front()].options());
    const at::Tensor feedback = worker(0).aggregate(*plans[0], own[0], messages, average, 0, workers());
    for (int64_t rank = 0; rank < workers(); ++rank) {
      worker(rank).finish(*plans[rank], own[rank], feedback.defined() ? feedback[rank] : feedback, messages);
    }
    int64_t offset = 0;
    for (const int64_t parameter : bucket) {
      averages[parameter] = shaped_as(first[parameter], average.narrow(0, offset, first[parameter].numel()));
      offset += first[parameter].numel();
    }
  }
  return averages;
}

}  // namespace regtopk
