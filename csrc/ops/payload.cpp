// regtopk::encode and regtopk::decode on the CPU: a payload as ascending indices and values, and back. A bucket's
// history changes its layout through them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>

#include "../core/payload.h"
#include "checks.h"

namespace regtopk {
namespace {

at::Tensor encode_cpu(const at::Tensor& indices, const at::Tensor& values, int64_t numel, int64_t step, int64_t plan, int64_t spans) {
  constexpr const char* who = "encode";
  const ValueType type = value_type_of(who, values.scalar_type());
  const int64_t k = values.numel();
  check_vector(who, "values", values, values.scalar_type(), k);
  check_vector(who, "indices", indices, at::kLong, k);
  TORCH_CHECK_VALUE(k >= 1 && k <= numel, who, ": expected 1 to ", numel, " entries, got ", k);
  const int64_t* const first = indices.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(
      first[0] >= 0 && first[k - 1] < numel && std::adjacent_find(first, first + k, std::greater_equal<>()) == first + k, who,
      ": expected strictly ascending indices in [0, ", numel, "), got others");
  const PayloadLayout layout(numel, k, type, spans);
  const at::Tensor payload = at::empty({layout.bytes}, indices.options().dtype(at::kByte));
  const PayloadHeader header = make_header(layout, static_cast<uint64_t>(step), static_cast<uint64_t>(plan));
  with_value_type(type, [&]<typename T>(T) {
    encode<T>(layout, header, first, static_cast<const T*>(values.const_data_ptr()), payload.mutable_data_ptr<uint8_t>());
  });
  return payload;
}

std::tuple<at::Tensor, at::Tensor> decode_cpu(const at::Tensor& payload, int64_t numel, int64_t k, at::ScalarType dtype) {
  constexpr const char* who = "decode";
  const ValueType type = value_type_of(who, dtype);
  const PayloadLayout layout = check_own_payload(who, "payload", payload, numel, type);
  TORCH_CHECK_VALUE(layout.k == k, who, ": expected k=", k, " in the payload, got ", layout.k);
  const at::Tensor indices = at::empty({k}, payload.options().dtype(at::kLong));
  const at::Tensor values = at::empty({k}, payload.options().dtype(dtype));
  const PayloadView view(payload.const_data_ptr<uint8_t>(), layout);
  decode_indices(view, indices.mutable_data_ptr<int64_t>());
  std::memcpy(values.mutable_data_ptr(), view.values<uint8_t>(), k * value_bytes(type));
  return {indices, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("encode", &encode_cpu);
  library.impl("decode", &decode_cpu);
}

}  // namespace regtopk
