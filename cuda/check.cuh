// Check: whether received payloads are valid, of this step and plan, and which spans all of them leave zero.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "../csrc/core/payload_status.h"
#include "bucket_spans.cuh"
#include "launch.h"

namespace regtopk {

struct CheckDevice {
  explicit CheckDevice(const PayloadLayout& bucket) : layout(bucket) {}

  PayloadLayout layout;
  Global<const uint8_t> payloads;
  uint32_t workers;
  uint64_t step, plan;
  Global<unsigned long long> status;  // the complement of the lowest status found, so that zero says that all are valid
  Global<uint32_t> absent;            // ranks that contribute nothing
  Global<uint32_t> any_idle;          // a span that is idle now and has entries
  Global<uint32_t> idle_now;          // a bit per span, 1 where the gradients of all ranks are zero
  DeviceSpans spans;                  // none: neither idle spans are found, nor exchange parts looked at
};

__device__ inline unsigned long long status_of(uint32_t stage, uint32_t rank, PayloadField field) {
  return static_cast<unsigned long long>(stage) << 40 | static_cast<unsigned long long>(rank) << 8 | static_cast<unsigned long long>(field);
}

// The header of a message of such values and such an index code; the same on every rank.
__device__ inline bool is_header_of(const PayloadHeader& header, const PayloadLayout& layout, ValueType type, Support support) {
  return header.magic == kPayloadMagic && header.version == kPayloadVersion && header.value_type == type && header.support == support &&
         header.numel == static_cast<uint64_t>(layout.numel) && header.k == static_cast<uint64_t>(layout.k) &&
         (header.flags & ~kFlags) == 0 && header.spans == static_cast<uint64_t>(layout.spans);
}

// Of a row that begins at a multiple of 8 bytes, not of 16.
__device__ inline PayloadHeader load_header(Global<const uint8_t> row) {
  struct Words {
    uint64_t word[sizeof(PayloadHeader) / 8];
  } words;
#pragma unroll
  for (size_t i = 0; i < sizeof(PayloadHeader) / 8; ++i) words.word[i] = row.at_byte<const uint64_t>(0).load(i);
  return std::bit_cast<PayloadHeader>(words);
}

// Of the exchange parts of two ranks, what is wrong with the second.
template <typename Report>
__device__ void compare_exchange_parts(Global<const uint8_t> first_row, Global<const uint8_t> row, const Report& report) {
  constexpr size_t kScaleAt = sizeof(PayloadHeader) + offsetof(ExchangePart, scale),
                   kDeedAt = sizeof(PayloadHeader) + offsetof(ExchangePart, deed);
  const auto scale_of = [](Global<const uint8_t> of) { return of.at_byte<const double>(kScaleAt).load(0); };
  const auto deed_of = [](Global<const uint8_t> of) { return of.at_byte<const uint64_t>(kDeedAt).load(0); };
  if (deed_of(row) != deed_of(first_row)) report(PayloadField::kDeed, 1);
  else if (!(scale_of(row) == scale_of(first_row))) report(PayloadField::kScale, 1);
}

template <typename T>
void launch_check(const CheckDevice& device, cudaStream_t stream);

}  // namespace regtopk
