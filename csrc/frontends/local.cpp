#include "local.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <unordered_set>

#include "../exchange/dense.h"
#include "../exchange/own_support.h"
#include "../exchange/shared_support.h"

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

// A device's kernels load whole vectors.
bool is_aligned(const at::Tensor& tensor) { return tensor.is_cpu() || tensor.storage_offset() == 0; }

constexpr const char* kWho = "LocalExchange";

void check_gradients(const std::vector<std::vector<at::Tensor>>& gradients, int64_t workers) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(gradients.size()) == workers, kWho, ": expected the gradients of ", workers, " workers, got ", gradients.size());
  const std::vector<at::Tensor>& first = gradients.front();
  for (const auto& of_worker : gradients) {
    TORCH_CHECK_VALUE(
        of_worker.size() == first.size(), kWho, ": expected ", first.size(), " gradients of every worker, got ", of_worker.size());
    for (size_t i = 0; i < first.size(); ++i) {
      TORCH_CHECK_TYPE(
          of_worker[i].layout() == at::kStrided, kWho, ": expected dense gradients, got gradient ", i, " of layout ",
          of_worker[i].layout());
      TORCH_CHECK_VALUE(
          of_worker[i].sizes() == first[i].sizes() && of_worker[i].scalar_type() == first[i].scalar_type(), kWho, ": expected gradient ", i,
          " of shape ", first[i].sizes(), " and dtype ", first[i].scalar_type(), " of every worker, got ", of_worker[i].sizes(), " and ",
          of_worker[i].scalar_type());
    }
  }
}

void check_buckets(const std::vector<std::vector<int64_t>>& buckets, int64_t parameters) {
  std::unordered_set<int64_t> seen;
  for (const auto& bucket : buckets) {
    TORCH_CHECK_VALUE(!bucket.empty(), kWho, ": expected buckets of at least one parameter, got an empty one");
    for (const int64_t parameter : bucket) {
      TORCH_CHECK_INDEX(
          parameter >= 0 && parameter < parameters, kWho, ": expected parameters below ", parameters, " in the buckets, got ", parameter);
      TORCH_CHECK_VALUE(
          seen.insert(parameter).second, kWho, ": expected every parameter in one bucket, got parameter ", parameter, " twice");
    }
  }
}

}  // namespace

LocalExchange::LocalExchange(Options options, int64_t workers) {
  TORCH_CHECK_VALUE(workers >= 1, kWho, ": expected at least 1 worker, got ", workers);
  const auto clock = std::make_shared<Clock>();
  for (int64_t rank = 0; rank < workers; ++rank) {
    workers_.push_back(std::make_unique<Worker>(options, kWho, clock));
    workers_.back()->rank = rank;
    workers_.back()->workers = workers;
  }
}

Worker& LocalExchange::worker(int64_t rank) {
  TORCH_CHECK_INDEX(rank >= 0 && rank < workers(), kWho, ": expected a rank below ", workers(), ", got ", rank);
  return *workers_[rank];
}

void LocalExchange::skipped() { worker(0).steps.clock().make_void(worker(0).steps.round()); }

std::vector<at::Tensor> LocalExchange::step(
    const std::vector<std::vector<at::Tensor>>& gradients, const std::vector<std::vector<int64_t>>& given, double scale) {
  const at::NoGradGuard no_grad;
  check_gradients(gradients, workers());
  const std::vector<at::Tensor>& first = gradients.front();
  check_buckets(given, static_cast<int64_t>(first.size()));
  std::vector<bool> dense;  // of the buckets
  const std::vector<std::vector<int64_t>> buckets = split_by_rule(given, first, dense);

  // All buckets are checked before any is sent: what one sends must not be lost to another's error.
  std::vector<Bucket> checked;
  for (size_t index = 0; index < buckets.size(); ++index) {
    const auto& parameters = buckets[index];
    const at::Tensor& like = first[parameters.front()];
    Bucket bucket{.layout = {{}, like.scalar_type(), like.device()}, .index = static_cast<int64_t>(index), .scale = scale};
    bucket.dense = dense[index];
    for (const int64_t parameter : parameters)
      bucket.layout.spans.push_back({static_cast<ParameterKey>(parameter), first[parameter].numel()});
    for (const int64_t parameter : parameters) {
      TORCH_CHECK_VALUE(
          first[parameter].scalar_type() == bucket.layout.dtype, kWho, ": expected one dtype in a bucket, got ", bucket.layout.dtype,
          " and ", first[parameter].scalar_type());
    }
    worker(0).check(bucket);
    checked.push_back(std::move(bucket));
  }

  for (const auto& one : workers_) one->steps.end();
  std::vector<at::Tensor> averages(first.size());
  for (size_t index = 0; index < buckets.size(); ++index) {
    const auto& parameters = buckets[index];
    const Bucket& bucket = checked[index];
    const int64_t numel = bucket.layout.numel();
    const at::Tensor average = at::empty({numel}, first[parameters.front()].options());
    if (numel > 0) {
      exchange(bucket, average, [&](int64_t rank) {
        std::vector<at::Tensor> parts;
        for (const int64_t parameter : parameters) parts.push_back(flat_as(first[parameter], gradients[rank][parameter]));
        return parts.size() == 1 && is_aligned(parts.front()) ? parts.front() : at::cat(parts);
      });
    }
    int64_t offset = 0;
    for (const int64_t parameter : parameters) {
      averages[parameter] = shaped_as(first[parameter], average.narrow(0, offset, first[parameter].numel()));
      offset += first[parameter].numel();
    }
  }
  return averages;
}

std::vector<std::vector<int64_t>> LocalExchange::split_by_rule(
    const std::vector<std::vector<int64_t>>& buckets, const std::vector<at::Tensor>& gradients, std::vector<bool>& dense) {
  if (!worker(0).options.dense_rule) {
    dense.assign(buckets.size(), false);
    return buckets;
  }
  std::vector<std::vector<int64_t>> parts;
  for (const auto& parameters : buckets) {
    Layout layout;
    for (const int64_t parameter : parameters) layout.spans.push_back({static_cast<ParameterKey>(parameter), gradients[parameter].numel()});
    const std::vector<bool> ruled = worker(0).ruled_dense(layout, [&] { return std::vector<Owner>(parameters.size()); });
    for (const bool which : {true, false}) {
      std::vector<int64_t> part;
      for (size_t i = 0; i < parameters.size(); ++i) {
        if (ruled[i] == which) part.push_back(parameters[i]);
      }
      if (part.empty()) continue;
      parts.push_back(std::move(part));
      dense.push_back(which);
    }
  }
  return parts;
}

void LocalExchange::exchange(const Bucket& bucket, const at::Tensor& average, const std::function<at::Tensor(int64_t rank)>& gradient_of) {
  std::vector<std::shared_ptr<Plan>> plans;
  for (const auto& one : workers_)
    plans.push_back(one->enter(bucket, [&] { return std::vector<Owner>(bucket.layout.spans.size()); }, nullptr));
  if (worker(0).is_dense_step()) {
    double bytes = 0;
    average.zero_();
    for (int64_t rank = 0; rank < workers(); ++rank) {
      const at::Tensor copy = gradient_of(rank).clone(), gradient = correct(worker(rank), *plans[rank], copy, copy);
      bytes = dense::send(worker(rank), plans[rank].get(), gradient);
      average.add_(gradient);
    }
    for (const auto& one : workers_) dense::receive(*one, average, bytes);
    return;
  }
  std::vector<Receiver> receivers;
  std::vector<at::Tensor> messages;
  for (int64_t rank = 0; rank < workers(); ++rank) {
    const auto send = is_shared(worker(0), *plans[rank]) ? shared_support::choose_or_keep : own_support::send;
    const at::Tensor given = correct(worker(rank), *plans[rank], gradient_of(rank), average);
    const Sent sent = send(worker(rank), *plans[rank], given, /*absent=*/false);
    receivers.push_back({worker(rank), *plans[rank], sent.payload});
    messages.push_back(sent.message);
  }
  if (is_shared(worker(0), *plans.front())) return swap(receivers, messages, average);
  own_support::make_room(worker(0), *plans.front(), workers());
  for (int64_t rank = 0; rank < workers(); ++rank) plans.front()->received[rank].copy_(messages[rank]);
  own_support::receive(receivers, average, worker(0).report.status());
}

void LocalExchange::swap(const std::vector<Receiver>& receivers, const std::vector<at::Tensor>& messages, const at::Tensor& average) {
  const int64_t leader = shared_support::leader_of(worker(0));
  const auto sent_by = [&](int64_t rank) { return Sent{receivers[rank].payload, messages[rank]}; };
  const auto support_of = [&](int64_t rank) { return shared_support::support_in(worker(rank), receivers[rank].plan, sent_by(rank)); };
  for (int64_t rank = 0; rank < workers() && !receivers.front().plan.is_dense(); ++rank) {
    if (rank != leader) support_of(rank).copy_(support_of(leader));
    shared_support::follow(worker(rank), receivers[rank].plan, sent_by(rank));
  }
  std::vector<at::Tensor> rows;
  for (const Receiver& each : receivers) rows.push_back(each.plan.rows);
  const at::Tensor sent = at::stack(rows);  // [from, to, bytes]
  for (int64_t rank = 0; rank < workers(); ++rank) {
    Plan& plan = receivers[rank].plan;
    plan.received.copy_(sent.select(1, rank));
    shared_support::average(worker(rank), plan);
    receivers.front().plan.averages[rank].copy_(plan.slice);
  }
  shared_support::receive(receivers, average);
}

}  // namespace regtopk
