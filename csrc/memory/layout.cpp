#include "layout.h"

#include <ATen/ops/tensor.h>

namespace regtopk {

int64_t Layout::numel() const {
  int64_t total = 0;
  for (const Span& span : spans) total += span.numel;
  return total;
}

int64_t Layout::hash() const {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a, 64 bits
  const auto mix = [&hash](uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) hash = (hash ^ ((value >> (8 * byte)) & 0xff)) * 0x100000001b3ull;
  };
  mix(static_cast<uint64_t>(dtype));
  for (const Span& span : spans) mix(static_cast<uint64_t>(span.numel));
  if (mark != 0) mix(mark);
  return static_cast<int64_t>(hash);
}

at::Tensor Layout::offsets() const {
  std::vector<int64_t> offsets{0};
  for (const Span& span : spans) offsets.push_back(offsets.back() + span.numel);
  return at::tensor(offsets, at::kLong).to(device);
}

}  // namespace regtopk
