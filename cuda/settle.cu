// Settle: what was sent in vain returns to the residual; and, first of a compress, which parameters' gradients are zero.
#include "settle.cuh"

#include <algorithm>

#include "workspace.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;

// A warp owns one block tile, and of each span that part.
// Where nothing returns nothing of the residual is touched. Where something does: 16 bytes of offsets (or the bitmap) per
// entry of the tile; per entry that returns the value and 4 bytes of the residual read and written.
// Every entry has an element of its own, so no order matters; counts and bits are integer sums.
template <typename T>
class Settle {
  using Device = SettleDevice<T>;
  using Reader = PayloadReader<T>;
  using Set = typename Reader::Set;
  static constexpr uint32_t kEntries = Reader::kEntries;

 public:
  __device__ Settle(const Device& device, Set& set, uint32_t& smallest, uint32_t block)
      : device_(device), set_(set), smallest_(smallest), block_(block), sent_size_(device.sent.ours()), is_void_(device.sent.is_void()) {}

  __device__ void run() {
    const uint32_t numel = static_cast<uint32_t>(device_.sent.numel), begin = block_ * kEntries;
    const uint32_t end = numel - begin < kEntries ? numel : begin + kEntries;
    if (!device_.spans) {
      if (sent_size_.entries > 0) put_back(begin, end);
      return;
    }
    const uint32_t first = device_.spans.find(begin);
    if (device_.first_span && warp_.rank() == 0) device_.first_span.store(block_, first);
    device_.spans.for_each(first, begin, end, [&](uint32_t span, uint32_t from, uint32_t to, bool inside) {
      if (sent_size_.entries > 0) {
        warp_.each_lane(inside && returns(span) != device_.masks, [&](unsigned lane) {
          put_back(__shfl_sync(kAllLanes, from, lane), __shfl_sync(kAllLanes, to, lane));
        });
      }
      if (device_.marks) device_.marks.look(warp_, span, from, to, inside);
    });
    if (!device_.counters) return;
    const uint32_t returned = warp_.sum(returned_);
    if (warp_.rank() != 0) return;
    if (is_void_ && block_ == 0 && sent_size_.entries > 0) device_.counters.add(kHistoryDropped, sent_size_.entries);
    if (!is_void_ && returned > 0) device_.counters.add(kHistoryDropped, returned);
  }

 private:
  __device__ bool returns(uint32_t span) const {
    return device_.idle.load(span) != 0 || (is_void_ && (!device_.applied || device_.applied.load(span) == 0));
  }

  // What was sent of the entries [begin, end) of this block tile; of a velocity, it leaves.
  __device__ void put_back(uint32_t begin, uint32_t end) {
    const Reader reader = device_.sent.reader(sent_size_);
    if (!is_loaded_) first_entry_ = reader.load_block(warp_, block_, set_, smallest_);
    is_loaded_ = true;
    const uint32_t first = block_ * kEntries, from = begin - first, to = end - first;
    for (uint32_t word = from / 32 + warp_.rank(); word * 32 < to; word += kWarpThreads) {
      for (uint32_t bits = set_.words[word] & bits_between(word, from, to); bits != 0; bits &= bits - 1) {
        const uint32_t offset = word * 32 + __ffs(bits) - 1, entry = first_entry_ + set_.rank_of(offset);
        if (entry >= sent_size_.entries || offset >= to) break;
        const auto value = Traits<T>::load(reader.value(entry));
        if (device_.sent_again) device_.sent_again.template at_byte<T>(reader.layout().values_at).store(entry, T{});
        if (!is_finite(value) || value == 0) continue;
        device_.residual.store(first + offset, device_.masks ? 0 : device_.residual.load(first + offset) + value);
        ++returned_;
      }
    }
  }

  const Device& device_;
  const WarpGroup warp_{};
  Set& set_;
  uint32_t& smallest_;
  const uint32_t block_;
  const SentSize sent_size_;
  const bool is_void_;
  bool is_loaded_ = false;
  uint32_t first_entry_ = 0, returned_ = 0;
};

// By the one block that comes last: the exchange part of the payload, and which spans this selection leaves out.
template <typename T>
__device__ void write_exchange_part(const SettleDevice<T>& device) {
  const PayloadLayout& layout = device.layout;
  const Global<uint32_t> zero_bits = device.payload.template at_byte<uint32_t>(layout.zero_bits_at);
  const uint32_t count = device.spans.count, words = static_cast<uint32_t>((layout.tile_starts_at - layout.zero_bits_at) / 4);
  bool any = false;
  for (uint32_t word = threadIdx.x; word < words; word += kThreads) {
    uint32_t zero = 0, idle = 0;
    if (word < device.spans.words()) {
      zero = device.marks.take_zero_spans(word, count);
      for (uint32_t bits = zero; bits != 0; bits &= bits - 1) {
        const uint32_t bit = __ffs(bits) - 1, span = word * 32 + bit;
        if (device.idle.load(span) != 0 && device.spans.end(span) < device.spans.end(span + 1)) idle |= 1u << bit;
      }
      device.idle_now.store(word, idle);
    }
    zero_bits.store(word, zero);
    any |= idle != 0;
  }
  any = __syncthreads_or(any);
  if (threadIdx.x != 0) return;
  device.any_idle.store(0, any);
  device.payload.template at_byte<ExchangePart>(sizeof(PayloadHeader)).store(0, {.scale = device.scale, .deed = device.deed});
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) settle_kernel(const __grid_constant__ SettleDevice<T> device) {
  using Set = typename PayloadReader<T>::Set;
  REGTOPK_SHARED(Set[kWarps], sets);
  REGTOPK_SHARED(uint32_t[kWarps], smallest);
  REGTOPK_SHARED(uint32_t, last);
  wait_for_stream();
  const unsigned w = threadIdx.x / kWarpThreads;
  const uint32_t block = blockIdx.x * kWarps + w;
  if (uint64_t{block} * PayloadReader<T>::kEntries < static_cast<uint64_t>(device.sent.numel))
    Settle<T>(device, sets[w], smallest[w], block).run();
  if (device.marks && is_last_block(device.done, kSettleDone, last)) write_exchange_part(device);
}

}  // namespace

template <typename T>
void launch_settle(const SettleDevice<T>& device, cudaStream_t stream) {
  constexpr int64_t kEntriesOfBlock = int64_t{PayloadReader<T>::kEntries} * kWarps;
  const unsigned blocks = static_cast<unsigned>((device.sent.numel + kEntriesOfBlock - 1) / kEntriesOfBlock);
  REGTOPK_LAUNCH_EARLY((settle_kernel<T>), blocks, kThreads, stream, device);
}
template void launch_settle<double>(const SettleDevice<double>&, cudaStream_t);
template void launch_settle<float>(const SettleDevice<float>&, cudaStream_t);
template void launch_settle<BFloat16>(const SettleDevice<BFloat16>&, cudaStream_t);
template void launch_settle<Half>(const SettleDevice<Half>&, cudaStream_t);

cudaError_t launch_settle(const SettleLaunch& arguments, cudaStream_t stream) {
  if (arguments.numel > kMaxEntries || is_misaligned(arguments.sent)) return cudaErrorInvalidValue;
  return with_value_type(arguments.type, [&]<typename T>(T) {
    SettleDevice<T> device(PayloadLayout::of_checked(arguments.numel, 1, arguments.type, sizeof(T)));
    device.sent.bytes = Global<const uint8_t>(arguments.sent);
    device.sent.numel = arguments.numel;
    device.sent.size = arguments.sent_bytes;
    device.residual = Global(static_cast<typename Traits<T>::Accumulate*>(arguments.residual));
    if (arguments.spans.ends != nullptr && !arguments.masks) device.sent_again = Global(arguments.sent);
    device.masks = arguments.masks;
    device.set_spans(arguments.spans);
    launch_settle(device, stream);
    return launch_error();
  });
}

}  // namespace regtopk
