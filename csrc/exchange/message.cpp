#include "message.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace regtopk {
namespace {

template <typename Bits>
bool all_zero(const void* values, int64_t numel) {
  constexpr int64_t kBlock = 256;  // short enough to stop early, long enough for vectors
  const Bits* const bits = static_cast<const Bits*>(values);
  for (int64_t begin = 0; begin < numel; begin += kBlock) {
    Bits any = 0;
    for (int64_t i = begin; i < std::min(begin + kBlock, numel); ++i) any |= static_cast<Bits>(bits[i] << 1);  // -0 is zero
    if (any != 0) return false;
  }
  return true;
}

bool all_zero(const void* values, int64_t numel, size_t element_bytes) {
  if (element_bytes == 8) return all_zero<uint64_t>(values, numel);
  if (element_bytes == 4) return all_zero<uint32_t>(values, numel);
  TORCH_INTERNAL_ASSERT(element_bytes == 2);
  return all_zero<uint16_t>(values, numel);
}

}  // namespace

Messages::Messages(const Layout& layout, int64_t payload_bytes)
    : layout_(layout), payload_bytes_(payload_bytes), flags_at_(payload_bytes + static_cast<int64_t>(sizeof(double))) {
  const int64_t end = flags_at_ + (static_cast<int64_t>(layout.parameters.size()) + 7) / 8;
  bytes_ = (end + 15) / 16 * 16;
}

void Messages::write_tail(const at::Tensor& message, const at::Tensor& gradient, double scale) const {
  uint8_t* const bytes = message.mutable_data_ptr<uint8_t>();
  std::memset(bytes + payload_bytes_, 0, bytes_ - payload_bytes_);
  std::memcpy(bytes + payload_bytes_, &scale, sizeof scale);
  const size_t element_bytes = gradient.element_size();
  const auto* values = static_cast<const uint8_t*>(gradient.const_data_ptr());
  for (size_t i = 0; i < layout_.parameters.size(); ++i) {
    const int64_t numel = layout_.parameters[i].numel;
    if (all_zero(values, numel, element_bytes)) bytes[flags_at_ + i / 8] |= static_cast<uint8_t>(1u << (i % 8));
    values += numel * element_bytes;
  }
}

at::Tensor Messages::payload_of(const at::Tensor& messages) const {
  return messages.narrow(messages.dim() - 1, 0, payload_bytes_).contiguous();
}

double Messages::scale_of(const at::Tensor& message) const {
  double scale;
  std::memcpy(&scale, message.const_data_ptr<uint8_t>() + payload_bytes_, sizeof scale);
  return scale;
}

std::vector<int64_t> Messages::idle_parameters(const at::Tensor& messages) const {
  const uint8_t* const bytes = messages.const_data_ptr<uint8_t>();
  std::vector<int64_t> idle;
  for (size_t i = 0; i < layout_.parameters.size(); ++i) {
    bool zero = true;
    for (int64_t rank = 0; zero && rank < messages.size(0); ++rank) {
      zero = (bytes[rank * bytes_ + flags_at_ + i / 8] >> (i % 8) & 1) != 0;
    }
    if (zero) idle.push_back(static_cast<int64_t>(i));
  }
  return idle;
}

}  // namespace regtopk
