// Writing a payload on the device, byte for byte what PayloadWriter in csrc/core/payload.h writes.
#pragma once

#include <cstdint>

#include "global_memory.cuh"
#include "../csrc/core/payload.h"

namespace regtopk {

template <typename T>
class DevicePayloadWriter {
 public:
  __device__ DevicePayloadWriter(Global<uint8_t> bytes, const PayloadLayout& layout) : bytes_(bytes), layout_(layout) {}

  __device__ void store_first_entry(uint32_t tile, uint32_t entry) const {
    bytes_.at_byte<uint32_t>(layout_.tile_starts_at).store(tile, entry);
  }
  __device__ void store_entry(uint32_t entry, uint32_t index, T value) const {
    if (layout_.support == Support::kOffsets) {
      bytes_.at_byte<uint16_t>(layout_.support_at).store(entry, static_cast<uint16_t>(index % kTileEntries));
    }
    bytes_.at_byte<T>(layout_.values_at).store(entry, value);
  }
  // 32 bits of the bitmap; the last may reach into the padding that follows it.
  __device__ void store_bitmap_word(uint32_t word, uint32_t bits) const {
    if (int64_t{word} * 32 < layout_.numel) bytes_.at_byte<uint32_t>(layout_.support_at).store(word, bits);
  }
  // The header, and the bytes between the parts; by one thread.
  __device__ void store_header(uint64_t step, uint64_t plan, uint32_t repeated, uint32_t displaced, bool non_finite, bool valid) const {
    PayloadHeader header = make_header(layout_, step, plan);
    if (!valid) header.magic = 0;
    header.repeated = repeated;
    header.displaced = displaced;
    header.flags = non_finite ? kFlagNonFinite : 0;
    bytes_.at_byte<PayloadHeader>(0).store(0, header);
    const int64_t support_bytes = layout_.support == Support::kOffsets ? layout_.k * 2 : (layout_.numel + 31) / 32 * 4;
    zero(layout_.tile_starts_at + layout_.tiles * 4, layout_.support_at);
    zero(layout_.support_at + support_bytes, layout_.values_at);
    zero(layout_.values_at + layout_.k * static_cast<int64_t>(sizeof(T)), layout_.bytes);
  }

 private:
  __device__ void zero(int64_t begin, int64_t end) const {
    for (; begin < end; ++begin) bytes_.store(begin, 0);
  }

  Global<uint8_t> bytes_;
  const PayloadLayout& layout_;
};

}  // namespace regtopk
