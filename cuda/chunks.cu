// Chunks: each so many consecutive entries of the bucket send their own largest ones, in one pass over gradient and residual.
#include "workspace.cuh"
#include "write_payload.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kPerThread = 16;  // entries of a chunk that a thread holds
constexpr unsigned kWarps = kThreads / kWarpThreads;
static_assert(kLargestChunkOfDevice == kThreads * kPerThread);

// Of a small chunk a warp, of a larger one the block.
template <bool kByWarp>
using GroupOf = std::conditional_t<kByWarp, WarpGroup, BlockGroup<kThreads>>;
template <bool kByWarp>
using SetOf = TileSet<GroupOf<kByWarp>::size() * kPerThread>;

// What the threads of one group share.
template <bool kByWarp>
struct ChunkMemory {
  SetOf<kByWarp> chosen, sent;
  uint32_t idle[SetOf<kByWarp>::kWords];
};

template <typename T, bool kByWarp, bool kHasFeedback>
class ChunkCompressor {
 public:
  using Accumulate = typename Traits<T>::Accumulate;
  using Bits = typename Traits<T>::Bits;
  using Group = GroupOf<kByWarp>;
  using Device = CompressDevice<T>;

  __device__ ChunkCompressor(const Device& device, const Group& group, ChunkMemory<kByWarp>& memory)
      : device_(device), group_(group), memory_(memory), sent_size_(device.sent.history()), has_idle_(device.has_idle()) {}

  __device__ void compress(uint32_t chunk) {
    const uint32_t entries = static_cast<uint32_t>(device_.chunks.entries), first = chunk * entries,
                   numel = static_cast<uint32_t>(device_.layout.numel);
    const uint32_t inside = numel - first < entries ? numel - first : entries, words = entries / 32;
    const uint32_t of_whole = static_cast<uint32_t>(device_.chunks.k), first_entry = chunk * of_whole;
    const uint32_t k = inside < entries ? static_cast<uint32_t>(device_.layout.k) - first_entry : of_whole;
    group_.sync();  // sets may still be read for the chunk before
    if (has_idle_) load_idle(first, words);
    const bool has_sent = sent_size_.entries > 0;
    const uint32_t first_sent = has_sent ? load_sent(first, entries) : 0;
    group_.sync();

    Accumulate accumulated[kPerThread];
    Bits keys[kPerThread];
    T gradient[kPerThread];
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      const uint32_t offset = offset_of(i);
      accumulated[i] = offset < inside ? device_.residual.load(first + offset) : Accumulate{0};
      gradient[i] = offset < inside ? device_.gradient.load(first + offset) : T{};
    }
    uint32_t kept = 0;  // a bit for each entry whose residual stays as it is: idle, or not finite
    bool any_non_finite = false;
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      const uint32_t offset = offset_of(i);
      accumulated[i] = accumulated[i] * device_.decay + Traits<T>::load(gradient[i]);
      const bool idle = has_idle_ && offset < inside && (memory_.idle[offset / 32] >> (offset % 32) & 1) != 0;
      if (idle) accumulated[i] = 0;  // to the selection
      keys[i] = magnitude_key(accumulated[i]);
      const bool finite = keys[i] < kInfinityKey<Bits>;
      any_non_finite |= !finite;
      kept |= static_cast<uint32_t>(idle || !finite) << i;
      if constexpr (kHasFeedback) {
        if (has_sent && offset < inside && memory_.sent.contains(offset)) {
          const uint32_t entry = first_sent + memory_.sent.rank_of(offset);
          if (entry < sent_size_.entries) keys[i] = device_.score_of_sent(accumulated[i], entry);
        }
      }
    }

    // The k-th key is the largest that at least k entries reach, bit by bit.
    Bits boundary = 0;
#pragma unroll 1
    for (int bit = sizeof(Bits) * 8 - 2; bit >= 0; --bit) {
      const Bits candidate = boundary | Bits{1} << bit;
      if (count(keys, inside, [&](Bits key) { return key >= candidate; }) >= k) boundary = candidate;
    }
    const uint32_t wanted = k - count(keys, inside, [&](Bits key) { return key > boundary; });
    uint32_t ties_end = inside;  // what is displaced is counted by where the chosen ones end
    if (kHasFeedback || count(keys, inside, [&](Bits key) { return key == boundary; }) > wanted) {
      insert(keys, inside, [&](Bits key, uint32_t) { return key == boundary; });
      ties_end = memory_.chosen.member(wanted - 1) + 1;
    }
    const auto is_chosen = [&](Bits key, uint32_t offset) { return key > boundary || (key == boundary && offset < ties_end); };
    insert(keys, inside, is_chosen);

    const DevicePayloadWriter<T> writer(device_.payload, device_.layout);
    if (first % kTileEntries == 0 && group_.rank() == 0) writer.store_first_entry(first / kTileEntries, first_entry);
    if (device_.layout.support == Support::kBitmap) {
      for (uint32_t word = group_.rank(); word < words; word += group_.size()) {
        writer.store_bitmap_word(first / 32 + word, memory_.chosen.words[word]);
      }
    }
    uint32_t repeated = 0, displaced = 0;
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      const uint32_t offset = offset_of(i);
      if (offset >= inside) continue;
      const bool chosen = is_chosen(keys[i], offset);
      Accumulate rest = accumulated[i];
      if (chosen) {
        const bool is_number = accumulated[i] == accumulated[i];
        const T value = Traits<T>::store(is_number ? accumulated[i] : std::numeric_limits<Accumulate>::quiet_NaN());
        writer.store_entry(first_entry + memory_.chosen.rank_of(offset), first + offset, value);
        rest = accumulated[i] - Traits<T>::load(value);
      }
      if ((kept >> i & 1) == 0) device_.residual.store(first + offset, rest);
      if (has_sent && memory_.sent.contains(offset)) {
        repeated += chosen;
        if constexpr (kHasFeedback) displaced += !chosen && is_chosen(magnitude_key(accumulated[i]), offset);
      }
    }
    repeated = group_.sum(repeated);
    displaced = group_.sum(displaced);
    if (any_non_finite) device_.counters.store(kNonFinite, 1);
    if (group_.rank() != 0) return;
    if (repeated > 0) device_.counters.add(kRepeated, repeated);
    if (displaced > 0) device_.counters.add(kDisplaced, displaced);
  }

 private:
  __device__ uint32_t offset_of(unsigned i) const { return i * Group::size() + group_.rank(); }

  template <typename Wanted>
  __device__ uint32_t count(const Bits (&keys)[kPerThread], uint32_t inside, const Wanted& wanted) const {
    uint32_t found = 0;
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) found += offset_of(i) < inside && wanted(keys[i]);
    return group_.sum(found);
  }

  template <typename Wanted>
  __device__ void insert(const Bits (&keys)[kPerThread], uint32_t inside, const Wanted& wanted) {
    group_.sync();
    memory_.chosen.clear(group_);
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      const uint32_t offset = offset_of(i);
      if (offset < inside && wanted(keys[i], offset)) memory_.chosen.insert(offset);
    }
    memory_.chosen.rank(group_);
  }

  // A chunk lies in one block tile.
  __device__ void load_idle(uint32_t first, uint32_t words) {
    constexpr uint32_t kEntries = Device::kEntries;
    static_assert(kEntries >= kLargestChunkOfDevice);
    for (uint32_t begin = group_.rank() / kWarpThreads * kWarpThreads; begin < words; begin += group_.size()) {
      const uint32_t word = begin + WarpGroup{}.rank(), idle = device_.idle_word(first / kEntries, first % kEntries / 32 + word);
      if (word < words) memory_.idle[word] = idle;
    }
  }

  // Fills the set with the entries of the chunk that were sent in the last step; returns the number of the first of them.
  __device__ uint32_t load_sent(uint32_t first, uint32_t entries) {
    const PayloadReader<T> reader = device_.sent.reader(sent_size_);
    const uint32_t tile = first / kTileEntries, low = first % kTileEntries;
    uint32_t begin = reader.first_entry(tile);
    memory_.sent.clear(group_);
    if (reader.has_bitmap()) {
      uint32_t before = 0;
      for (uint32_t word = group_.rank(); word < low / 32; word += group_.size()) {
        before += __popc(reader.bitmap_word(tile * (kTileEntries / 32) + word));
      }
      begin += group_.sum(before);
      for (uint32_t word = group_.rank(); word < entries / 32; word += group_.size()) {
        memory_.sent.words[word] = reader.bitmap_word(first / 32 + word);
      }
    } else {
      const uint32_t next = reader.first_entry(tile + 1), to = next > begin ? next : begin;
      begin = reader.lower_bound(begin, to, low);
      const uint32_t end = reader.lower_bound(begin, to, low + entries);
      for (uint32_t entry = begin + group_.rank(); entry < end; entry += group_.size()) {
        const uint32_t offset = reader.offset_in_tile(entry) - low;
        if (offset < entries) memory_.sent.insert(offset);  // always, of what compress wrote
      }
    }
    memory_.sent.rank(group_);
    return begin;
  }

  const Device& device_;
  const Group& group_;
  ChunkMemory<kByWarp>& memory_;
  const SentSize sent_size_;
  const bool has_idle_;
};

// A group owns one chunk after the other. Reads g and r, writes r: 12 bytes per element in fp32, 10 in 16-bit types; per entry sent 6
// bytes written, per entry of the last step 2 read, 4 more with feedback. Nothing is listed: a chunk stays in registers.
template <typename T, bool kByWarp, bool kHasFeedback>
__global__ void __launch_bounds__(kThreads, sizeof(typename Traits<T>::Accumulate) == 8 ? 1 : 2)
    chunks_kernel(const __grid_constant__ CompressDevice<T> device) {
  constexpr unsigned kGroups = kByWarp ? kWarps : 1;
  REGTOPK_SHARED(ChunkMemory<kByWarp>[kGroups], memory);
  REGTOPK_SHARED(typename BlockGroup<kThreads>::Scratch, scratch);
  REGTOPK_SHARED(uint32_t, last);
  const auto compress = [&](const auto& group, unsigned number) {
    ChunkCompressor<T, kByWarp, kHasFeedback> compressor(device, group, memory[number]);
    const uint32_t chunks = static_cast<uint32_t>(device.chunks.count(device.layout.numel));
    for (uint32_t chunk = blockIdx.x * kGroups + number; chunk < chunks; chunk += gridDim.x * kGroups) compressor.compress(chunk);
  };
  if constexpr (kByWarp) compress(WarpGroup{}, threadIdx.x / kWarpThreads);
  else compress(BlockGroup<kThreads>{scratch}, 0);
  if (!is_last_block(device.counters, kAccumulateDone, last) || threadIdx.x != 0) return;
  write_header(device, device.sent.is_ours());
  for (unsigned counter = 0; counter < kCounters; ++counter) device.counters.store(counter, 0);
}

}  // namespace

template <typename T>
void launch_chunks(const CompressDevice<T>& device, bool has_feedback, cudaStream_t stream) {
  const bool by_warp = device.chunks.entries <= SetOf<true>::kWords * 32;
  const int64_t chunks = device.chunks.count(device.layout.numel), groups = by_warp ? kWarps : 1;
  const int64_t most = int64_t{multiprocessors()} * 8, wanted = (chunks + groups - 1) / groups;
  const unsigned blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  const auto launch = [&]<bool kByWarp, bool kHasFeedback>() {
    REGTOPK_LAUNCH((chunks_kernel<T, kByWarp, kHasFeedback>), blocks, kThreads, stream, device);
  };
  if (by_warp) has_feedback ? launch.template operator()<true, true>() : launch.template operator()<true, false>();
  else has_feedback ? launch.template operator()<false, true>() : launch.template operator()<false, false>();
}
template void launch_chunks<double>(const CompressDevice<double>&, bool, cudaStream_t);
template void launch_chunks<float>(const CompressDevice<float>&, bool, cudaStream_t);
template void launch_chunks<BFloat16>(const CompressDevice<BFloat16>&, bool, cudaStream_t);
template void launch_chunks<Half>(const CompressDevice<Half>&, bool, cudaStream_t);

}  // namespace regtopk
