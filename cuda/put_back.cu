// Put back: what was sent in vain returns to the residual.
#include "launch.h"
#include "payload_reader.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;

// A warp owns one block tile. Per entry 16 bytes of offsets (or the bitmap) and the value read, 4 bytes of the residual read
// and written. Every entry has an element of its own, so no order matters.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    put_back_kernel(const __grid_constant__ SentPayload<T> payload, Global<typename Traits<T>::Accumulate> residual) {
  using Reader = PayloadReader<T>;
  using Set = typename Reader::Set;
  REGTOPK_SHARED(Set[kWarps], sets);
  REGTOPK_SHARED(uint32_t[kWarps], smallest);
  const WarpGroup warp;
  const unsigned w = threadIdx.x / kWarpThreads;
  const uint32_t k = payload.entries(), block = blockIdx.x * kWarps + w;
  if (k == 0 || uint64_t{block} * Reader::kEntries >= static_cast<uint64_t>(payload.numel)) return;
  const Reader reader = payload.reader(k);
  const uint32_t first = reader.load_block(warp, block, sets[w], smallest[w]);
  for (unsigned word = warp.rank(); word < Set::kWords; word += kWarpThreads) {
    uint32_t entry = first + sets[w].members_before[word];
    for (uint32_t bits = sets[w].words[word]; bits != 0 && entry < k; bits &= bits - 1, ++entry) {
      const size_t index = size_t{block} * Reader::kEntries + word * 32 + __ffs(bits) - 1;
      const auto value = Traits<T>::load(reader.value(entry));
      if (is_finite(value) && index < static_cast<size_t>(payload.numel)) residual.store(index, residual.load(index) + value);
    }
  }
}

}  // namespace

cudaError_t launch_put_back(const PutBackLaunch& arguments, cudaStream_t stream) {
  if (arguments.numel > kMaxEntries || reinterpret_cast<uintptr_t>(arguments.payload) % kAlignment != 0) return cudaErrorInvalidValue;
  return with_value_type(arguments.type, [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    SentPayload<T> payload;
    payload.bytes = Global(arguments.payload);
    payload.numel = arguments.numel;
    payload.size = arguments.payload_bytes;
    constexpr int64_t kEntriesOfBlock = kBlockEntries<Accumulate> * kWarps;
    const unsigned blocks = static_cast<unsigned>((arguments.numel + kEntriesOfBlock - 1) / kEntriesOfBlock);
    REGTOPK_LAUNCH((put_back_kernel<T>), blocks, kThreads, stream, payload, Global(static_cast<Accumulate*>(arguments.residual)));
    return launch_error();
  });
}

}  // namespace regtopk
