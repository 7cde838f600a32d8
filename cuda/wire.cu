// The wire form of payloads (csrc/core/wire.h): narrower values and Elias-Fano's code, written before a payload is sent and read
// when payloads have come. Everything here is of the size of the payloads; the gradient is not touched.
//
//   to_wire     copy (header, exchange part; zeros) · narrow     a warp owns a block tile, as in settle
//               and of codes measure before                      a block owns a payload tile
//   from_wire   copy · count · widen                             a block owns 8,192 bits of a row's high part
//               and of codes spread behind, once tile starts are written
#include "../csrc/core/wire.h"

#include <algorithm>

#include "groups.cuh"
#include "launch.h"
#include "payload_reader.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;
struct Codes {};  // of one bit or two, in the place of the wire's type
constexpr uint32_t kEntriesOfBlock = 4096;  // widened by a block where there is no code

// What is the same in both forms, word by word, and zeros where bits are to be set or nothing is.
struct CopyDevice {
  Global<const uint8_t> from;
  Global<uint8_t> to;
  int64_t from_bytes = 0, to_bytes = 0;                 // of a row
  int64_t copied_until = 0, zero_until = 0, values_end = 0;  // in `to`
  PayloadHeader wanted{};                               // of `from`, where it is not trusted
  bool is_trusted = true;
  uint32_t form = 0;                                    // word 1 of the header in `to`
  uint32_t blocks_of_row = 0;

  CopyDevice(int64_t index_at, bool has_code, int64_t values_at) : copied_until(has_code ? index_at : values_at), zero_until(values_at) {}
  __device__ bool is_valid(Global<const uint8_t> row) const {
    if (is_trusted) return true;
    const PayloadHeader header = row.at_byte<const PayloadHeader>(0).load(0);
    return header.magic == wanted.magic && header.version == wanted.version && header.value_type == wanted.value_type &&
           header.support == wanted.support && header.numel == wanted.numel && header.k == wanted.k && header.spans == wanted.spans;
  }
};

uint32_t form_of(ValueType type, Support support) {
  return static_cast<uint32_t>(kPayloadVersion) | static_cast<uint32_t>(type) << 16 | static_cast<uint32_t>(support) << 24;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyDevice device) {
  const uint32_t row = blockIdx.x / device.blocks_of_row, block = blockIdx.x % device.blocks_of_row;
  const Global<const uint8_t> from = device.from.offset(row * static_cast<size_t>(device.from_bytes));
  const Global<uint32_t> to = device.to.offset(row * static_cast<size_t>(device.to_bytes)).template at_byte<uint32_t>(0);
  for (int64_t word = int64_t{block} * kThreads + threadIdx.x; word * 4 < device.to_bytes;
       word += int64_t{device.blocks_of_row} * kThreads) {
    const int64_t byte = word * 4;
    if (byte < device.copied_until) {
      uint32_t value = from.at_byte<const uint32_t>(0).load(word);
      if (word == 0 && !device.is_valid(from)) value = 0;  // no magic number: every reader rejects it
      if (word == 1) value = device.form;
      to.store(word, value);
    } else if (byte < device.zero_until || byte + 4 > device.values_end) {
      to.store(word, 0);
    }
  }
}

template <typename T>
void launch_copy(CopyDevice& device, int64_t rows, cudaStream_t stream) {
  device.blocks_of_row = static_cast<uint32_t>(std::clamp<int64_t>(device.to_bytes / (4 * kThreads * 4), 1, 256));
  REGTOPK_LAUNCH((copy_kernel<T>), static_cast<unsigned>(rows * device.blocks_of_row), kThreads, stream, device);
}

// Of codes: what the values of a tile have in common, by one block, and the levels on the wire.
template <typename T>
__global__ void __launch_bounds__(kThreads) measure_kernel(
    const PayloadLayout layout, int bits, Global<const uint8_t> payload, Global<TileMeasure> measures, Global<Level<T>> levels) {
  REGTOPK_SHARED(TileMeasure, measure);
  REGTOPK_SHARED(unsigned long long, largest);
  REGTOPK_SHARED(uint32_t, infinite);
  const uint32_t tile = blockIdx.x;
  const PayloadReader<T> reader(payload, layout);
  const uint32_t begin = reader.first_entry(tile), end = reader.first_entry(tile + 1);
  const auto value_of = [&](uint32_t entry) { return static_cast<double>(Traits<T>::load(reader.value(entry))); };
  const auto add = [](uint64_t& sum, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(value));
  };
  if (threadIdx.x == 0) {
    measure = TileMeasure{};
    largest = 0;
    infinite = 0;
  }
  __syncthreads();
  for (uint32_t entry = begin + threadIdx.x; entry < end; entry += kThreads) {
    const double magnitude = std::abs(value_of(entry));
    if (is_finite(magnitude)) atomicMax(&largest, std::bit_cast<unsigned long long>(magnitude));  // in the order of the numbers
    else atomicOr(&infinite, 1u);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    measure.finite = infinite == 0;
    measure.exponent = TileMeasure::exponent_of(std::bit_cast<double>(largest));
  }
  __syncthreads();
  if (measure.finite) {
    for (uint32_t entry = begin + threadIdx.x; entry < end; entry += kThreads) {
      const uint64_t m = measure.fixed(std::abs(value_of(entry)));
      add(measure.sum, m);
      atomicAdd(m > 0 ? &measure.count : &measure.zeros, 1u);
    }
    __syncthreads();
    for (uint32_t entry = begin + threadIdx.x; entry < end; entry += kThreads) {
      const double value = value_of(entry);
      const uint64_t m = measure.fixed(std::abs(value));
      if (m == 0) continue;
      TileMeasure::Side& side = measure.sides[measure.side_of(bits, m, value < 0)];
      add(side.sum, m);
      atomicMin(reinterpret_cast<unsigned long long*>(&side.smallest), static_cast<unsigned long long>(m));
      atomicMax(reinterpret_cast<unsigned long long*>(&side.largest), static_cast<unsigned long long>(m));
      atomicAdd(&side.count, 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  measures.store(tile, measure);
  for (int side = 0; side < 2; ++side) levels.store(tile * 2 + side, measure.template stored<Level<T>>(measure.level(bits, side)));
}

template <typename T>
struct NarrowDevice {
  PayloadLayout layout;
  WireLayout wire;
  Global<const uint8_t> payload;
  Global<T> values;  // of the payload
  Global<typename Traits<T>::Accumulate> residual;
  Global<uint8_t> bytes;
  Global<const TileMeasure> measures;  // of codes
};

// A bit or some of an entry may share a word with those of others: each is set by itself.
__device__ inline void set_bits_at(Global<uint32_t> words, uint64_t at, uint32_t bits) {
  const unsigned shift = at % 32;
  if (const uint32_t low = bits << shift) words.set_bits(at / 32, low);
  if (const uint32_t high = shift == 0 ? 0 : bits >> (32 - shift)) words.set_bits(at / 32 + 1, high);
}

template <typename T>
__device__ void code(const NarrowDevice<T>& device, uint32_t entry, uint32_t index, T value) {
  const uint32_t tile = index / kTileEntries;
  const TileMeasure measure = device.measures.load(tile);
  const auto loaded = Traits<T>::load(value);
  const uint64_t m = is_finite(loaded) && measure.finite ? measure.fixed(std::abs(static_cast<double>(loaded))) : 0;
  const int bits = device.wire.code_bits();
  const uint32_t code = measure.code_of(bits, m, loaded < 0);
  set_bits_at(device.bytes.template at_byte<uint32_t>(device.wire.codes_at), uint64_t{entry} * bits, code);
  const Global<const Level<T>> levels = device.bytes.template at_byte<const Level<T>>(device.wire.values_at);
  const T sent = value_of_code<T>(levels.load(tile * 2 + level_of_code(bits, code)), code);
  device.values.store(entry, sent);
  if (loaded == 0 || !is_finite(loaded)) return;
  auto kept = device.residual.load(index) + loaded;
  if (measure.finite) kept = kept - Traits<T>::load(sent);
  device.residual.store(index, kept);
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) narrow_kernel(const __grid_constant__ NarrowDevice<T> device) {
  using Reader = PayloadReader<T>;
  using Set = typename Reader::Set;
  REGTOPK_SHARED(Set[kWarps], sets);
  REGTOPK_SHARED(uint32_t[kWarps], smallest);
  const unsigned w = threadIdx.x / kWarpThreads;
  const uint32_t block = blockIdx.x * kWarps + w, first = block * Reader::kEntries;
  if (uint64_t{block} * Reader::kEntries >= static_cast<uint64_t>(device.layout.numel)) return;
  const WarpGroup warp{};
  const Reader reader(device.payload, device.layout);
  const uint32_t first_entry = reader.load_block(warp, block, sets[w], smallest[w]);
  const WireLayout& wire = device.wire;
  for (uint32_t word = warp.rank(); word < Set::kWords; word += kWarpThreads) {
    for (uint32_t bits = sets[w].words[word]; bits != 0; bits &= bits - 1) {
      const uint32_t offset = word * 32 + __ffs(bits) - 1, entry = first_entry + sets[w].rank_of(offset), index = first + offset;
      if (wire.has_code()) {
        const Global<uint32_t> low = device.bytes.template at_byte<uint32_t>(wire.index_at);
        set_bits_at(low, uint64_t{entry} * wire.low_bits, index & ((1u << wire.low_bits) - 1));
        set_bits_at(device.bytes.template at_byte<uint32_t>(wire.high_at), uint64_t{index >> wire.low_bits} + entry, 1);
      }
      const T value = device.values.load(entry);
      if constexpr (std::is_same_v<W, Codes>) {
        code(device, entry, index, value);
      } else {
        const Global<W> narrow = device.bytes.template at_byte<W>(wire.values_at);
        if constexpr (sizeof(W) < sizeof(T)) {
          const W sent = narrowed<W>(value);
          const T again = static_cast<T>(Traits<W>::load(sent));
          narrow.store(entry, sent);
          device.values.store(entry, again);
          if (value != 0 && is_finite(value)) device.residual.store(index, device.residual.load(index) + value - again);
        } else {
          narrow.store(entry, value);
        }
      }
    }
  }
}

struct WidenDevice {
  PayloadLayout layout;
  WireLayout wire;
  Global<const uint8_t> bytes;
  Global<uint8_t> payloads;
  Global<uint32_t> counts;  // [workers, chunks]: ones in each chunk of the high part
  uint32_t chunks = 0;
  bool has_values = true;

  __device__ Global<const uint8_t> row_of_wire(uint32_t row) const { return bytes.offset(row * static_cast<size_t>(wire.bytes)); }
  __device__ Global<uint8_t> row_of_payloads(uint32_t row) const { return payloads.offset(row * static_cast<size_t>(layout.bytes)); }
  __device__ uint32_t high_word(uint32_t row, uint32_t word) const {
    return int64_t{word} * 4 < wire.values_at - wire.high_at ? row_of_wire(row).at_byte<const uint32_t>(wire.high_at).load(word) : 0;
  }
  __device__ uint32_t low_of(uint32_t row, uint32_t entry) const {
    if (wire.low_bits == 0) return 0;
    const Global<const uint32_t> words = row_of_wire(row).at_byte<const uint32_t>(wire.index_at);
    const uint64_t at = uint64_t{entry} * wire.low_bits;
    const unsigned shift = at % 32;
    uint32_t bits = words.load(at / 32) >> shift;
    if (shift + wire.low_bits > 32) bits |= words.load(at / 32 + 1) << (32 - shift);
    return bits & ((1u << wire.low_bits) - 1);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ WidenDevice device) {
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  const BlockGroup<kThreads> group{scratch};
  const uint32_t row = blockIdx.x / device.chunks, chunk = blockIdx.x % device.chunks;
  const uint32_t ones = group.sum(__popc(device.high_word(row, chunk * kThreads + threadIdx.x)));
  if (threadIdx.x == 0) device.counts.store(blockIdx.x, ones);
}

// One word of the high part. What it says may be anything: no entry at or behind k, no index at or behind J is written.
class Decode {
 public:
  __device__ Decode(const WidenDevice& device, uint32_t row, uint32_t word, uint32_t before)
      : device_(device), row_(row), word_(word), before_(before), bits_(device.high_word(row, word)) {}

  // Returns whether it is valid.
  __device__ bool write_entries() const {
    const WireLayout& wire = device_.wire;
    const Global<uint8_t> support = device_.row_of_payloads(row_).offset(device_.layout.support_at);
    bool follows = word_ > 0 && device_.high_word(row_, word_ - 1) >> 31 != 0, valid = true;
    uint32_t entry = before_, last = 32;
    for (uint32_t bits = bits_; bits != 0; bits &= bits - 1, ++entry) {
      const uint32_t bit = __ffs(bits) - 1;
      const uint64_t high = uint64_t{word_} * 32 + bit - entry;
      // Equal high bits: the low ones ascend.
      const bool same_high = last == 32 ? bit == 0 && follows : bit == last + 1;
      last = bit;
      if (entry >= device_.layout.k) return false;
      const uint32_t low = device_.low_of(row_, entry);
      const uint64_t index = high << wire.low_bits | low;
      if (index >= static_cast<uint64_t>(device_.layout.numel)) return false;
      if (same_high && device_.low_of(row_, entry - 1) >= low) valid = false;
      if (device_.layout.support == Support::kBitmap) support.at_byte<uint32_t>(0).set_bits(index / 32, 1u << (index % 32));
      else support.at_byte<uint16_t>(0).store(entry, static_cast<uint16_t>(index));
    }
    return valid;
  }

  // A payload tile begins behind as many zeros as it has multiples of 2^low_bits before it.
  __device__ void write_tile_starts() const {
    const uint64_t zeros_before = uint64_t{word_} * 32 - before_, zeros = 32 - __popc(bits_);
    const uint64_t zeros_of_tile = kTileEntries >> device_.wire.low_bits;
    for (uint64_t tile = zeros_before / zeros_of_tile + 1; tile < static_cast<uint64_t>(device_.layout.tiles); ++tile) {
      const uint64_t nth = tile * zeros_of_tile - zeros_before;  // zero of this word, from 1 on
      if (nth > zeros) break;
      uint32_t rest = ~bits_;
      for (uint64_t i = 1; i < nth; ++i) rest &= rest - 1;
      const uint32_t below = bits_ & ((1u << (__ffs(rest) - 1)) - 1);
      device_.row_of_payloads(row_).at_byte<uint32_t>(device_.layout.tile_starts_at).store(tile, before_ + __popc(below));
    }
  }

 private:
  const WidenDevice& device_;
  const uint32_t row_, word_, before_, bits_;
};

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 4) widen_kernel(const __grid_constant__ WidenDevice device) {
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  const BlockGroup<kThreads> group{scratch};
  const uint32_t row = blockIdx.x / device.chunks, chunk = blockIdx.x % device.chunks;
  const PayloadLayout& layout = device.layout;
  if (device.wire.has_code()) {
    uint32_t before = 0;
    for (uint32_t other = threadIdx.x; other < chunk; other += kThreads) before += device.counts.load(row * device.chunks + other);
    before = group.sum(before);
    const uint32_t word = chunk * kThreads + threadIdx.x;
    const uint32_t ones = __popc(device.high_word(row, word));
    uint32_t of_chunk;
    const Decode decode(device, row, word, before + group.exclusive_sum(ones, of_chunk));
    bool valid = decode.write_entries();
    decode.write_tile_starts();
    if (chunk == device.chunks - 1 && before + of_chunk != layout.k) valid = false;
    if (!valid) device.row_of_payloads(row).at_byte<uint32_t>(0).store(0, 0);
  }
  if constexpr (!std::is_same_v<W, Codes>) {
    if (!device.has_values) return;
    const Global<const W> narrow = device.row_of_wire(row).template at_byte<const W>(device.wire.values_at);
    const Global<T> values = device.row_of_payloads(row).template at_byte<T>(layout.values_at);
    for (int64_t entry = int64_t{chunk} * kThreads + threadIdx.x; entry < layout.k; entry += int64_t{device.chunks} * kThreads) {
      const W value = narrow.load(entry);
      if constexpr (sizeof(W) < sizeof(T)) values.store(entry, static_cast<T>(Traits<W>::load(value)));
      else values.store(entry, value);
    }
  }
}

// The values that codes stand for. A tile begins where the payload, which may be one that nobody accepts, says.
template <typename T>
__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ WidenDevice device) {
  const uint32_t row = blockIdx.x / device.chunks, chunk = blockIdx.x % device.chunks;
  const PayloadReader<T> reader(device.row_of_payloads(row), device.layout);
  const Global<const Level<T>> levels = device.row_of_wire(row).template at_byte<const Level<T>>(device.wire.values_at);
  const Global<const uint32_t> codes = device.row_of_wire(row).template at_byte<const uint32_t>(device.wire.codes_at);
  const Global<T> values = device.row_of_payloads(row).template at_byte<T>(device.layout.values_at);
  const int bits = device.wire.code_bits(), in_word = 32 / bits;
  for (int64_t entry = int64_t{chunk} * kThreads + threadIdx.x; entry < device.layout.k; entry += int64_t{device.chunks} * kThreads) {
    uint32_t tile = 0, end = static_cast<uint32_t>(device.layout.tiles);
    while (end - tile > 1) {
      const uint32_t middle = tile + (end - tile) / 2;
      if (reader.first_entry(middle) <= entry) tile = middle;
      else end = middle;
    }
    const uint32_t code = codes.load(entry / in_word) >> (entry % in_word * bits) & ((1u << bits) - 1);
    values.store(entry, value_of_code<T>(levels.load(tile * 2 + level_of_code(bits, code)), code));
  }
}

// As with_wire_types, and (T, Codes).
template <typename Function>
cudaError_t with_forms(ValueType payload, const WireLayout& wire, const Function& function) {
  if (wire.has_levels()) return with_value_type(payload, [&]<typename T>(T) { return function(T{}, Codes{}); });
  return with_wire_types(payload, wire.type, function);
}

uint32_t chunks_of(const PayloadLayout& layout, const WireLayout& wire) {
  const int64_t chunks = wire.has_code() ? ((wire.values_at - wire.high_at) / 4 + kThreads - 1) / kThreads
                                         : (layout.k + kEntriesOfBlock - 1) / kEntriesOfBlock;
  return static_cast<uint32_t>(chunks);
}

// A launch after another, none after an error.
bool launched(cudaError_t& error) {
  error = launch_error();
  return error == cudaSuccess;
}

}  // namespace

cudaError_t launch_to_wire(const ToWireLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  const WireLayout& wire = arguments.wire;
  if (layout.numel > kMaxEntries || is_misaligned(arguments.payload) || is_misaligned(arguments.bytes)) return cudaErrorInvalidValue;
  return with_forms(layout.type, wire, [&]<typename T, typename W>(T, W) {
    CopyDevice copy(wire.index_at, wire.has_code(), wire.values_at);
    if (wire.has_levels()) copy.zero_until = wire.bytes;
    copy.from = Global<const uint8_t>(arguments.payload);
    copy.to = Global(arguments.bytes);
    copy.from_bytes = layout.bytes;
    copy.to_bytes = wire.bytes;
    copy.values_end = wire.has_levels() ? wire.bytes : wire.values_at + layout.k * static_cast<int64_t>(sizeof(W));
    copy.form = form_of(wire.type, wire.support);
    launch_copy<T>(copy, 1, stream);
    cudaError_t error;
    if (!launched(error)) return error;
    const Global measures(static_cast<TileMeasure*>(arguments.workspace));
    if constexpr (std::is_same_v<W, Codes>) {
      REGTOPK_LAUNCH(
          (measure_kernel<T>), static_cast<unsigned>(layout.tiles), kThreads, stream, layout, wire.code_bits(),
          Global<const uint8_t>(arguments.payload), measures, Global(arguments.bytes).template at_byte<Level<T>>(wire.values_at));
      if (!launched(error)) return error;
    }
    const NarrowDevice<T> device{
        .layout = layout,
        .wire = wire,
        .payload = Global<const uint8_t>(arguments.payload),
        .values = Global(reinterpret_cast<T*>(arguments.payload + layout.values_at)),
        .residual = Global(static_cast<typename Traits<T>::Accumulate*>(arguments.residual)),
        .bytes = Global(arguments.bytes),
        .measures = measures};
    constexpr int64_t kEntries = int64_t{PayloadReader<T>::kEntries} * kWarps;
    REGTOPK_LAUNCH((narrow_kernel<T, W>), static_cast<unsigned>((layout.numel + kEntries - 1) / kEntries), kThreads, stream, device);
    return launch_error();
  });
}

int64_t to_wire_workspace_bytes(const PayloadLayout& layout, const WireLayout& wire) {
  return wire.has_levels() ? layout.tiles * static_cast<int64_t>(sizeof(TileMeasure)) : kAlignment;
}

int64_t from_wire_workspace_bytes(const PayloadLayout& layout, const WireLayout& wire, int64_t workers) {
  return std::max<int64_t>(workers * chunks_of(layout, wire), 4) * static_cast<int64_t>(sizeof(uint32_t));
}

cudaError_t launch_from_wire(const FromWireLaunch& arguments, cudaStream_t stream) {
  const PayloadLayout& layout = arguments.layout;
  const WireLayout& wire = arguments.wire;
  if (layout.numel > kMaxEntries || is_misaligned(arguments.payloads) || is_misaligned(arguments.bytes)) return cudaErrorInvalidValue;
  return with_forms(layout.type, wire, [&]<typename T, typename W>(T, W) {
    CopyDevice copy(wire.index_at, wire.has_code(), layout.values_at);
    copy.from = Global(arguments.bytes);
    copy.to = Global(arguments.payloads);
    copy.from_bytes = wire.bytes;
    copy.to_bytes = arguments.has_values ? layout.bytes : layout.values_at;
    copy.values_end = layout.values_at + layout.k * static_cast<int64_t>(sizeof(T));
    copy.wanted = make_header(layout, 0, 0);
    copy.wanted.value_type = wire.type;
    copy.wanted.support = wire.support;
    copy.is_trusted = false;
    copy.form = form_of(layout.type, layout.support);
    launch_copy<T>(copy, arguments.workers, stream);
    cudaError_t error;
    if (!launched(error)) return error;
    const WidenDevice device{
        .layout = layout,
        .wire = wire,
        .bytes = Global(arguments.bytes),
        .payloads = Global(arguments.payloads),
        .counts = Global(static_cast<uint32_t*>(arguments.workspace)),
        .chunks = chunks_of(layout, wire),
        .has_values = arguments.has_values};
    const unsigned blocks = static_cast<unsigned>(arguments.workers * device.chunks);
    if (wire.has_code()) {
      REGTOPK_LAUNCH((count_kernel<T>), blocks, kThreads, stream, device);
      if (!launched(error)) return error;
    }
    if (wire.has_code() || (device.has_values && !wire.has_levels())) {
      REGTOPK_LAUNCH((widen_kernel<T, W>), blocks, kThreads, stream, device);
      if (!launched(error)) return error;
    }
    if constexpr (std::is_same_v<W, Codes>) {
      if (device.has_values) REGTOPK_LAUNCH((spread_kernel<T>), blocks, kThreads, stream, device);
    }
    return launch_error();
  });
}

}  // namespace regtopk
