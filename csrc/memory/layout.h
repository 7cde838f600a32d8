// Which parameters lie where in a bucket. A front end hands over spans; nobody else asks what a bucket is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace regtopk {

// Stands for a parameter: the address of its tensor, or a number where there is no tensor.
using ParameterKey = uint64_t;

inline ParameterKey key_of(const at::Tensor& parameter) { return reinterpret_cast<ParameterKey>(parameter.unsafeGetTensorImpl()); }

// Knows a parameter without keeping it alive. While this exists no other tensor has the parameter's address, so that a key
// that is found together with its owner is never another parameter's.
class Owner {
 public:
  Owner() = default;
  explicit Owner(const at::Tensor& parameter) : reference_(parameter.getIntrusivePtr()), is_tensor_(true) {}

  bool is_gone() const { return is_tensor_ && reference_.expired(); }
  // Undefined where it is gone, or never was a tensor.
  at::Tensor tensor() const { return is_tensor_ ? at::Tensor(reference_.lock()) : at::Tensor(); }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> reference_{
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  bool is_tensor_ = false;
};

// A parameter's part of a bucket.
struct Span {
  ParameterKey key;
  int64_t numel;
  bool operator==(const Span&) const = default;
};

// The spans of a bucket in the order in which they lie in it, without gaps.
struct Layout {
  std::vector<Span> spans;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  uint64_t mark = 0;  // what else tells it from others, equal on every rank

  bool operator==(const Layout&) const = default;
  int64_t numel() const;
  // Equal on every rank for equal layouts: it hashes sizes, dtype and mark, not keys.
  int64_t hash() const;
  // int64 [spans + 1]: where each begins, and the end.
  at::Tensor offsets() const;
};

}  // namespace regtopk
