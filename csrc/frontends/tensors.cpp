#include "tensors.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

namespace regtopk {
namespace {

// The tensors of one dtype, by their places in the list.
struct Group {
  Bucket bucket;
  std::vector<size_t> places;
};

// Equal for equal lists: names, shapes and dtypes. Never 0.
uint64_t mark_of(const std::vector<at::Tensor>& tensors, const std::vector<ParameterKey>& keys) {
  uint64_t mark = 0xcbf29ce484222325ull;
  const auto mix = [&mark](uint64_t value) { mark = (mark ^ value) * 0x100000001b3ull, mark ^= mark >> 29; };
  for (size_t i = 0; i < tensors.size(); ++i) {
    mix(keys[i]);
    mix(static_cast<uint64_t>(tensors[i].scalar_type()));
    mix(static_cast<uint64_t>(tensors[i].dim()));
    for (const int64_t size : tensors[i].sizes()) mix(static_cast<uint64_t>(size));
  }
  return mark | 1;
}

std::vector<Group> group_by_dtype(const std::vector<at::Tensor>& tensors, const std::vector<ParameterKey>& keys, double scale) {
  const uint64_t mark = mark_of(tensors, keys);
  std::vector<Group> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::ScalarType dtype = tensors[i].scalar_type();
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& each) { return each.bucket.layout.dtype == dtype; });
    if (group == groups.end()) {
      const int64_t index = static_cast<int64_t>(groups.size());
      groups.push_back({{.layout = {{}, dtype, tensors[i].device(), mark}, .index = index, .scale = scale}, {}});
      group = groups.end() - 1;
    }
    group->bucket.layout.spans.push_back({keys[i], tensors[i].numel()});
    group->places.push_back(i);
  }
  return groups;
}

}  // namespace

bool Average::is_completed() const {
  return std::all_of(pending_.begin(), pending_.end(), [](const auto& future) { return future->completed(); });
}

std::vector<at::Tensor> Average::wait() {
  for (const auto& future : pending_) future->wait();
  for (const auto& future : pending_) future->waitAndThrow();
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  for (const auto& [from, to] : std::exchange(to_copy_, {})) to.copy_(from);
  return averages_;
}

std::shared_ptr<Average> TensorsExchange::average(
    const std::vector<at::Tensor>& tensors, const std::vector<ParameterKey>& keys, const std::vector<std::string>& names,
    const Fingerprint& terms, bool absent) {
  RECORD_FUNCTION("regtopk::average", std::vector<c10::IValue>());
  // What is kept outlives the caller's modes, and what is returned is as any other tensor.
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  const Worker& worker = exchange_->worker();
  std::vector<Group> groups;
  try {
    groups = group_by_dtype(tensors, keys, exchange_->scale());
    // All buckets are checked before any is sent: what one sends must not be lost to another's error.
    for (const Group& group : groups) worker.check(group.bucket);
  } catch (const std::exception& error) {
    exchange_->transport().announce_failure(error.what());
    throw;
  }
  const auto describe = [&] {
    Fingerprint lines = terms;
    lines.emplace_back("number of tensors", std::to_string(tensors.size()));
    for (size_t i = 0; i < tensors.size(); ++i) {
      lines.emplace_back(
          c10::str("tensor ", i), c10::str(names[i], " of shape ", tensors[i].sizes(), " and dtype ", tensors[i].scalar_type()));
    }
    return lines;
  };

  exchange_->worker().steps.end();
  const auto result = std::make_shared<Average>();
  result->averages_.resize(tensors.size());
  for (size_t index = 0; index < groups.size(); ++index) {
    const auto& [bucket, places] = groups[index];
    const int64_t numel = bucket.layout.numel();
    const at::Tensor average = memory_for(index, numel, tensors[places.front()].options());
    std::vector<at::Tensor> parts;
    for (const size_t place : places) parts.push_back(tensors[place].contiguous().view({-1}));
    // A device's kernels load whole vectors.
    const bool in_place = parts.size() == 1 && !parts.front().is_neg() && (parts.front().is_cpu() || parts.front().storage_offset() == 0);
    const at::Tensor given = in_place ? parts.front() : at::cat_out(const_cast<at::Tensor&>(average), parts);
    if (numel > 0) {
      const auto owners = [&] { return std::vector<Owner>(places.size()); };
      try {
        result->pending_.push_back(exchange_->exchange(bucket, given, average, owners, describe, absent));
      } catch (...) {
        // What the other buckets have sent returns: the caller gets nothing for it.
        if (!result->pending_.empty()) worker.steps.clock().make_void(worker.steps.round());
        throw;
      }
    }
    // Each is a tensor by itself, not a view of the bucket that autograd would follow.
    const at::AutoDispatchBelowADInplaceOrView no_views;
    int64_t offset = 0;
    for (const size_t place : places) {
      const at::Tensor& tensor = tensors[place];
      at::Tensor part = average.narrow(0, offset, tensor.numel()).view(tensor.sizes());
      offset += tensor.numel();
      if (!tensor.is_contiguous()) {
        const at::Tensor in_its_order = at::empty_like(tensor);
        result->to_copy_.emplace_back(part, in_its_order);
        part = in_its_order;
      }
      result->averages_[place] = part;
    }
  }
  return result;
}

at::Tensor TensorsExchange::memory_for(size_t bucket, int64_t numel, const at::TensorOptions& options) {
  memory_.resize(std::max(memory_.size(), bucket + 1));
  at::Tensor& kept = memory_[bucket];
  const bool fits = kept.defined() && kept.numel() == numel && kept.scalar_type() == at::typeMetaToScalarType(options.dtype()) &&
                    kept.is_cpu();  // a device's allocator knows which of its streams still use what
  if (fits && kept.use_count() == 1 && kept.storage().use_count() == 1) return kept;
  return kept = at::empty({numel}, options.requires_grad(false));
}

}  // namespace regtopk
