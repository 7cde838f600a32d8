#include "tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstdint>

#include "../ops/operators.h"

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
      groups.push_back({{.layout = {{}, dtype, tensors[i].device(), mark}, .index = index, .scale = scale, .list = mark}, {}});
      group = groups.end() - 1;
    }
    group->bucket.layout.spans.push_back({keys[i], tensors[i].numel()});
    group->places.push_back(i);
  }
  return groups;
}

// The tensors as one, without a copy, where each begins in row-major order behind the one before it; undefined elsewhere.
at::Tensor as_one(const std::vector<at::Tensor>& parts) {
  const at::Tensor* first = nullptr;
  int64_t numel = 0;
  for (const at::Tensor& part : parts) {
    if (part.numel() == 0) continue;
    if (first == nullptr) first = &part;
    const bool follows = part.is_alias_of(*first) && part.storage_offset() == first->storage_offset() + numel;
    if (!follows || !part.is_contiguous() || part.is_neg()) return {};
    numel += part.numel();
  }
  if (first == nullptr) return {};
  // A device's kernels load whole vectors.
  constexpr int64_t kVectorBytes = 16;
  if (!first->is_cpu() && first->storage_offset() * static_cast<int64_t>(first->element_size()) % kVectorBytes != 0) return {};
  return first->as_strided({numel}, {1});
}

// Those at the places; none of none.
std::vector<at::Tensor> taken(const std::vector<at::Tensor>& tensors, const std::vector<size_t>& places) {
  std::vector<at::Tensor> result;
  if (tensors.empty()) return result;
  for (const size_t place : places) result.push_back(tensors[place].detach());
  return result;
}

// Addresses between which a tensor's entries lie.
struct Extent {
  uintptr_t begin, end;
  size_t place;
};
Extent extent_of(const at::Tensor& tensor, size_t place) {
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.storage().data()) + static_cast<uintptr_t>(tensor.storage_offset() * bytes);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * bytes), place};
}

// Takes the bytes of a tensor that begins at one of them; returns whether none of them was taken.
bool take(std::vector<bool>& taken, const at::Tensor& tensor, size_t begin) {
  const size_t bytes = tensor.element_size();
  for (int64_t entry = 0; entry < tensor.numel(); ++entry) {
    int64_t rest = entry, at = 0;
    for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
      at += rest % tensor.size(dim) * tensor.stride(dim);
      rest /= tensor.size(dim);
    }
    for (size_t byte = begin + static_cast<size_t>(at) * bytes, end = byte + bytes; byte < end; ++byte) {
      if (taken[byte]) return false;
      taken[byte] = true;
    }
  }
  return true;
}

void check_out(const std::string& who, const std::vector<at::Tensor>& out) {
  for (size_t i = 0; i < out.size(); ++i) {
    TORCH_CHECK_VALUE(
        at::has_internal_overlap(out[i]) != at::MemOverlap::Yes, who,
        ": expected tensors in out whose entries have memory of their own, got one of strides ", out[i].strides(), " at place ", i);
  }
  std::vector<Extent> extents;
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i].numel() > 0) extents.push_back(extent_of(out[i], i));
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& one, const Extent& other) { return one.begin < other.begin; });
  for (size_t first = 0, last = 0; first < extents.size(); first = last) {
    uintptr_t end = extents[first].end;
    for (last = first + 1; last < extents.size() && extents[last].begin < end; ++last) end = std::max(end, extents[last].end);
    if (last == first + 1 && out[extents[first].place].is_non_overlapping_and_dense()) continue;
    // They may still lie between each other, as columns of a matrix do.
    std::vector<bool> taken(end - extents[first].begin);
    for (size_t i = first; i < last; ++i) {
      TORCH_CHECK_VALUE(
          take(taken, out[extents[i].place], extents[i].begin - extents[first].begin), who,
          ": expected tensors in out whose entries have memory of their own, got one at place ", extents[i].place, " that shares some");
    }
  }
}

}  // namespace

bool Average::is_completed() const {
  return std::all_of(pending_.begin(), pending_.end(), [](const auto& future) { return future->completed(); });
}

std::vector<at::Tensor> Average::wait() {
  for (const auto& future : pending_) future->wait();
  std::shared_ptr<GroupExchange> exchange;  // ends, perhaps, without the lock
  const std::lock_guard lock(mutex_);
  exchange.swap(exchange_);
  for (const auto& future : pending_) future->waitAndThrow();
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  // Versions count the caller's memory, and have been counted.
  const at::AutoDispatchBelowADInplaceOrView no_versions;
  for (const auto& [from, to] : std::exchange(to_copy_, {})) {
    to.copy_(from);
    if (to.is_cpu()) continue;
    to.record_stream(c10::impl::VirtualGuardImpl(to.device().type()).getStream(to.device()));  // it was made on another, perhaps
  }
  return averages_;
}

bool Average::is_void() {
  for (const auto& future : pending_) future->wait();
  return regtopk::is_void(verdict_, round_);
}

std::shared_ptr<Average> TensorsExchange::average(
    const std::vector<at::Tensor>& tensors, const std::vector<ParameterKey>& keys, const std::vector<std::string>& names,
    const std::vector<at::Tensor>& out, bool absent) {
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
    check_out(worker.who, out);
  } catch (const std::exception& error) {
    exchange_->transport().announce_failure(plain_text(error));
    throw;
  }
  const auto describe = [&] {
    Fingerprint lines{{"number of tensors", std::to_string(tensors.size())}};
    for (size_t i = 0; i < tensors.size(); ++i) {
      lines.emplace_back(
          c10::str("tensor ", i), c10::str(names[i], " of shape ", tensors[i].sizes(), " and dtype ", tensors[i].scalar_type()));
    }
    return lines;
  };

  const auto has_none = [](const Group& group) { return group.bucket.layout.numel() == 0; };
  // As one bucket: its message can say which list it is of. A device's stream can't be called back.
  const bool is_whole = groups.size() == 1 && tensors.front().is_cpu() && !worker.options.dense_rule;
  groups.front().bucket.is_whole_list = exchange_->begin_list(groups.front().bucket.list, is_whole);
  exchange_->worker().steps.end();
  const auto result = std::make_shared<Average>();
  result->averages_.resize(tensors.size());
  const auto owners_of = [](const Group& group) { return [count = group.places.size()] { return std::vector<Owner>(count); }; };
  if (std::all_of(groups.begin(), groups.end(), has_none))
    exchange_->exchange_nothing(groups.front().bucket, owners_of(groups.front()), describe);
  for (size_t index = 0; index < groups.size(); ++index) {
    const auto& [bucket, places] = groups[index];
    const int64_t numel = bucket.layout.numel();
    std::vector<at::Tensor> others;
    for (size_t later = index + 1; later < groups.size(); ++later) {
      for (const size_t place : groups[later].places) others.push_back(tensors[place]);
    }
    const Memory memory = place(index, taken(tensors, places), taken(out, places), others);
    if (numel > 0) {
      try {
        result->pending_.push_back(exchange_->exchange(bucket, memory.given, memory.average, owners_of(groups[index]), describe, absent));
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
      at::Tensor part = memory.average.narrow(0, offset, tensor.numel()).view(tensor.sizes());
      offset += tensor.numel();
      if (!out.empty() || !tensor.is_contiguous()) {
        const at::Tensor taking = out.empty() ? at::empty_like(tensor) : out[place];
        if (!memory.is_out) result->to_copy_.emplace_back(part, taking);
        part = taking;
      }
      result->averages_[place] = part;
    }
  }
  exchange_->end_list();
  for (const at::Tensor& each : out) {  // written below what would count it
    if (!each.is_inference()) each.unsafeGetTensorImpl()->bump_version();
  }
  result->verdict_ = exchange_->worker().steps.clock().verdict(tensors.front().device());
  result->round_ = worker.steps.round();
  result->worker_ = exchange_->keep_worker();
  result->exchange_ = exchange_;
  return result;
}

TensorsExchange::Memory TensorsExchange::place(
    size_t bucket, std::vector<at::Tensor> parts, const std::vector<at::Tensor>& out, const std::vector<at::Tensor>& others) {
  const at::AutoDispatchBelowADInplaceOrView no_views;
  for (at::Tensor& part : parts) part = part.contiguous();
  Memory memory{as_one(parts), as_one(out), /*is_out=*/true};
  // What is written must not be what is still to be read.
  const auto is_read = [&](const at::Tensor& part) { return part.is_alias_of(memory.average); };
  const bool of_others = memory.average.defined() && std::any_of(others.begin(), others.end(), is_read);
  if (memory.given.defined() && memory.average.defined() && !of_others && memory.given.is_set_to(memory.average)) {
    memory.given = memory.average;  // in place, as a gradient's bucket
    return memory;
  }
  memory.is_out = memory.average.defined() && !of_others && std::none_of(parts.begin(), parts.end(), is_read);
  if (!memory.is_out) {
    int64_t numel = 0;
    for (const at::Tensor& part : parts) numel += part.numel();
    memory.average = memory_for(bucket, numel, parts.front().options());
  }
  if (!memory.given.defined()) {
    for (at::Tensor& part : parts) part = part.view({-1});
    memory.given = at::cat_out(memory.average, parts);
  }
  return memory;
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
