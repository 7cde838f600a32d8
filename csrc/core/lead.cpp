#include "lead.h"

#include <atomic>
#include <memory>

#include "aggregate.h"
#include "simd/block_cursor.h"
#include "simd/kernel_choice.h"

namespace regtopk {
namespace {

PayloadHeader header_of(const uint8_t* head) {
  PayloadHeader header;
  std::memcpy(&header, head, sizeof header);
  return header;
}

// Returns whether everything is finite.
template <typename T>
bool accumulate_block(const CompressArguments& arguments, const Block& block) {
  using Accumulate = typename Traits<T>::Accumulate;
  const T* const gradient = static_cast<const T*>(arguments.gradient) + block.index;
  Accumulate* const residual = static_cast<Accumulate*>(arguments.residual) + block.index;
  if constexpr (sizeof(Accumulate) == sizeof(float)) {
    if (const Kernels* kernels = kernels_for(arguments.layout.type)) {
      float values[kListSlack];
      uint32_t keys[kListSlack];
      uint16_t offsets[kListSlack];
      bool non_finite = false;
      kernels->accumulate(
          {.gradient = gradient,
           .residual = residual,
           .decay = static_cast<float>(arguments.decay),
           .entries = block.entries,
           .first_offset = 0,
           .list_from = 0x7fffffffu,  // above every key: no entry is listed
           .sent_above = 0x7fffffffu,
           .crowded = false,
           .out = {values, keys, offsets},
           .non_finite = &non_finite});
      return !non_finite;
    }
  }
  const Accumulate decay = static_cast<Accumulate>(arguments.decay);
  bool finite = true;
  for (int64_t i = 0; i < block.entries; ++i) {
    const Accumulate value = residual[i] * decay + Traits<T>::load(gradient[i]);
    const bool is = is_finite(value);
    residual[i] = is ? value : residual[i];
    finite &= is;
  }
  return finite;
}

}  // namespace

void accumulate(const CompressArguments& arguments, const ParallelFor& parallel_for) {
  const PayloadLayout& layout = arguments.layout;
  with_value_type(layout.type, [&]<typename T>(T) {
    std::atomic<bool> finite = true;
    parallel_for(Block::count(layout.numel), [&](int64_t begin, int64_t end) {
      bool finite_here = true;
      for (int64_t number = begin; number < end; ++number) finite_here &= accumulate_block<T>(arguments, Block(number, layout.numel));
      if (!finite_here) finite = false;
    });
    PayloadHeader header = make_header(layout, arguments.step, arguments.plan);
    if (!finite) header.flags |= kFlagNonFinite;
    PayloadWriter<T>(arguments.payload, layout).set_header(header);
  });
}

void take(const PayloadView& lead, uint8_t* payload, void* residual, const ParallelFor& parallel_for) {
  const PayloadLayout& layout = lead.layout();
  std::memcpy(payload + layout.tile_starts_at, lead.bytes() + layout.tile_starts_at, layout.values_at - layout.tile_starts_at);
  with_value_type(layout.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    T* const values = reinterpret_cast<T*>(payload + layout.values_at);
    parallel_for(layout.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        Accumulate* const kept = static_cast<Accumulate*>(residual) + tile * kTileEntries;
        lead.for_each_entry(tile, [&](int64_t entry, int64_t offset) {
          values[entry] = Traits<T>::store(kept[offset]);
          kept[offset] -= Traits<T>::load(values[entry]);
        });
      }
    });
  });
}

std::optional<PayloadError> check_head(const uint8_t* head, const PayloadLayout& layout, const WireLayout& wire) {
  const PayloadHeader header = header_of(head);
  if (auto error = check_wire_header(header, layout, wire)) return error;
  if (header.flags & ~kFlags) return PayloadError{"flags", "at most " + std::to_string(kFlags), std::to_string(header.flags)};
  return std::nullopt;
}

int64_t contributors(const std::vector<const uint8_t*>& heads) {
  const auto count = std::count_if(heads.begin(), heads.end(), [](const uint8_t* head) { return !(header_of(head).flags & kFlagAbsent); });
  return std::max<int64_t>(count, 1);
}

void average_slice(
    const std::vector<const uint8_t*>& heads, const std::vector<const uint8_t*>& slices, ValueType type, ValueType wire_type,
    int64_t entries, void* averages) {
  const bool finite = std::none_of(heads.begin(), heads.end(), [](const uint8_t* head) { return header_of(head).flags & kFlagNonFinite; });
  with_wire_types(type, wire_type, [&]<typename T, typename W>(T, W) {
    using Accumulate = typename Traits<T>::Accumulate;
    constexpr Accumulate kNan = std::numeric_limits<Accumulate>::quiet_NaN();
    const Accumulate divisor = static_cast<Accumulate>(contributors(heads));
    T* const out = static_cast<T*>(averages);
    for (int64_t entry = 0; entry < entries; ++entry) {
      Accumulate sum = 0;
      for (const uint8_t* slice : slices) sum += static_cast<Accumulate>(Traits<W>::load(reinterpret_cast<const W*>(slice)[entry]));
      const Accumulate average = sum / divisor;
      out[entry] = Traits<T>::store(finite && average == average ? average : kNan);
    }
  });
}

void feedback_of_averages(const PayloadView& payload, const void* averages, int64_t contributors, Distortion distortion, void* feedback) {
  with_value_type(payload.layout().type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    for (int64_t entry = 0; entry < payload.layout().k; ++entry) {
      const Accumulate sum = static_cast<Accumulate>(contributors) * Traits<T>::load(static_cast<const T*>(averages)[entry]);
      static_cast<Accumulate*>(feedback)[entry] = feedback_of(sum, Accumulate{Traits<T>::load(payload.values<T>()[entry])}, distortion);
    }
  });
}

}  // namespace regtopk
