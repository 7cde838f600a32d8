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
    store_value(entry, value);
  }
  __device__ void store_value(uint32_t entry, T value) const { bytes_.at_byte<T>(layout_.values_at).store(entry, value); }
  // Four values from an entry on that is a multiple of four. The values begin at a multiple of 8 bytes, not of 16.
  __device__ void store_values(uint32_t entry, const Vector<T>& values) const {
    struct alignas(8) Word {
      T entry[8 / sizeof(T)];
    };
    constexpr uint32_t kWords = sizeof values / sizeof(Word);
    const Global<Word> words = bytes_.at_byte<Word>(layout_.values_at);
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      Word word;
#pragma unroll
      for (uint32_t j = 0; j < kVectorEntries / kWords; ++j) word.entry[j] = values.entry[i * (kVectorEntries / kWords) + j];
      words.store(entry / kVectorEntries * kWords + i, word);
    }
  }
  // 32 bits of the bitmap; the last may reach into the padding that follows it.
  __device__ void store_bitmap_word(uint32_t word, uint32_t bits) const {
    if (int64_t{word} * 32 < layout_.numel) bytes_.at_byte<uint32_t>(layout_.support_at).store(word, bits);
  }
  // All bytes from the tile starts to the values, by the threads of a grid: a payload without entries.
  __device__ void clear_support(uint32_t thread, uint32_t threads) const {
    const Global<uint64_t> words = bytes_.at_byte<uint64_t>(layout_.tile_starts_at);
    const int64_t count = (layout_.values_at - layout_.tile_starts_at) / 8;
    for (int64_t word = thread; word < count; word += threads) words.store(word, 0);
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
