// Whole: a compress that chooses nothing, in one pass over gradient and residual. All entries are sent, or none for the time being: a
// leader chooses (lead.cu).
#include "workspace.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;

template <typename T, bool kSends>
class Whole {
  using Accumulate = typename Traits<T>::Accumulate;
  using Device = CompressDevice<T>;
  using Set = typename Device::Set;
  static constexpr uint32_t kEntries = Device::kEntries;
  static constexpr int kAtOnce = sizeof(Accumulate) == 8 ? 2 : 4;  // vectors of each thread that are loaded before the first is needed
  static_assert(kEntries % (kAtOnce * kThreads * kVectorEntries) == 0);

 public:
  struct Shared {
    uint32_t idle[Set::kWords];
  };

  __device__ Whole(const Device& device, Shared& shared) : device_(device), shared_(shared), has_idle_(device.has_idle()) {}

  // Returns whether all of the block tile's entries are finite.
  __device__ bool pass_over(uint32_t block) {
    const uint32_t first = block * kEntries, entries = device_.entries_of(block);
    const bool has_idle = has_idle_ && load_idle(block);
    bool finite = true;
#pragma unroll 1
    for (uint32_t begin = threadIdx.x * kVectorEntries; begin < entries; begin += kAtOnce * kThreads * kVectorEntries) {
      Vector<T> gradient[kAtOnce];
      Vector<Accumulate> residual[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint32_t offset = begin + v * kThreads * kVectorEntries;
        if (offset + kVectorEntries <= entries) {
          gradient[v] = device_.gradient.load_vector(first + offset);
          residual[v] = device_.residual.load_vector(first + offset);
        } else {
#pragma unroll
          for (int i = 0; i < kVectorEntries; ++i) {
            gradient[v].entry[i] = offset + i < entries ? device_.gradient.load(first + offset + i) : T{};
            residual[v].entry[i] = offset + i < entries ? device_.residual.load(first + offset + i) : Accumulate{0};
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint32_t offset = begin + v * kThreads * kVectorEntries;
        if (offset >= entries) break;
        const uint32_t idle = has_idle ? shared_.idle[offset / 32] >> (offset % 32) : 0;
        Vector<T> sent;
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          Accumulate& kept = residual[v].entry[i];
          const Accumulate accumulated = kept * device_.decay + Traits<T>::load(gradient[v].entry[i]);
          const bool is_idle = ((idle >> i) & 1) != 0, is_number = accumulated == accumulated;
          sent.entry[i] = is_idle ? T{} : Traits<T>::store(is_number ? accumulated : std::numeric_limits<Accumulate>::quiet_NaN());
          if (is_idle) continue;
          if (!is_finite(accumulated)) finite = false;
          else kept = kSends ? accumulated - Traits<T>::load(sent.entry[i]) : accumulated;
        }
        store(first + offset, entries - offset, sent, residual[v]);
      }
    }
    return finite;
  }

  __device__ void write_support() const {
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
    const PayloadLayout& layout = device_.layout;
    const DevicePayloadWriter<T> writer(device_.payload, layout);
    if constexpr (kSends) {
      for (uint32_t tile = thread; tile < layout.tiles; tile += threads) writer.store_first_entry(tile, tile * kTileEntries);
      for (int64_t word = thread; word * 32 < layout.numel; word += threads) {
        const int64_t rest = layout.numel - word * 32;
        writer.store_bitmap_word(static_cast<uint32_t>(word), rest >= 32 ? ~0u : (1u << rest) - 1);
      }
    } else {
      writer.clear_support(thread, threads);
    }
  }

 private:
  // Returns whether there are any in this block tile.
  __device__ bool load_idle(uint32_t block) {
    __syncthreads();  // those of the block tile before may still be read
    uint32_t idle = 0;
    if (threadIdx.x < Set::kWords) shared_.idle[threadIdx.x] = idle = device_.idle_word(block, threadIdx.x);
    static_assert(Set::kWords <= kThreads);
    return __syncthreads_or(idle != 0);
  }

  __device__ void store(uint32_t index, uint32_t inside, const Vector<T>& sent, const Vector<Accumulate>& kept) const {
    const DevicePayloadWriter<T> writer(device_.payload, device_.layout);
    if (inside >= kVectorEntries) {
      device_.residual.store_vector(index, kept);
      if constexpr (kSends) writer.store_values(index, sent);
      return;
    }
#pragma unroll
    for (uint32_t i = 0; i < kVectorEntries; ++i) {
      if (i >= inside) continue;
      device_.residual.store(index + i, kept.entry[i]);
      if constexpr (kSends) writer.store_value(index + i, sent.entry[i]);
    }
  }

  const Device& device_;
  Shared& shared_;
  const bool has_idle_;
};

// A block owns one block tile of 32 KiB of the accumulate type after the other.
// Reads g and r, writes r: 12 bytes per element in fp32, 10 in 16-bit types; and where all are sent 4 or 2 more, and a bit.
template <typename T, bool kSends>
__global__ void __launch_bounds__(kThreads, 4) whole_kernel(const __grid_constant__ CompressDevice<T> device) {
  using Work = Whole<T, kSends>;
  REGTOPK_SHARED(typename Work::Shared, shared);
  REGTOPK_SHARED(uint32_t, last);
  Work work(device, shared);
  bool finite = true;
  for (uint32_t block = blockIdx.x; block < device.blocks; block += gridDim.x) finite &= work.pass_over(block);
  work.write_support();
  if (__syncthreads_or(!finite) && threadIdx.x == 0) device.counters.store(kNonFinite, 1);
  if (!is_last_block(device.counters, kAccumulateDone, last) || threadIdx.x != 0) return;
  if (kSends && device.sent.bytes) device.counters.store(kRepeated, device.sent.history().entries);
  write_header(device, device.sent.is_ours());
  for (unsigned counter = 0; counter < kCounters; ++counter) device.counters.store(counter, 0);
}

}  // namespace

template <typename T>
void launch_whole(const CompressDevice<T>& device, bool sends, cudaStream_t stream) {
  const unsigned most = static_cast<unsigned>(multiprocessors()) * 4, blocks = device.blocks < most ? device.blocks : most;
  if (sends) REGTOPK_LAUNCH((whole_kernel<T, true>), blocks, kThreads, stream, device);
  else REGTOPK_LAUNCH((whole_kernel<T, false>), blocks, kThreads, stream, device);
}
template void launch_whole<double>(const CompressDevice<double>&, bool, cudaStream_t);
template void launch_whole<float>(const CompressDevice<float>&, bool, cudaStream_t);
template void launch_whole<BFloat16>(const CompressDevice<BFloat16>&, bool, cudaStream_t);
template void launch_whole<Half>(const CompressDevice<Half>&, bool, cudaStream_t);

}  // namespace regtopk
