// Narrowing the range that holds the k-th score, one histogram at a time. Histograms are integer sums, so the order in which
// blocks add to them does not matter; called by all threads of the one block that comes last.
#pragma once

#include <cstdint>
#include <type_traits>

#include "workspace.cuh"

namespace regtopk {

// Entries of the list that are an item of work of a block of finish.
inline constexpr unsigned kListChunk = 2048;

struct Bin {
  uint32_t index, above, inside;  // entries in the bins above it and in it
};

// The bin that holds the entry of rank `wanted` from the top, 1 the largest; index kHistogramBins if there are fewer entries,
// and then `above` is their number. Of one histogram, load(0, bin), or of two at the same time.
template <unsigned kCount>
struct Found {
  Bin bin[kCount];
};
template <unsigned kThreads, unsigned kCount, typename Load>
__device__ Found<kCount> find_bins(
    const BlockGroup<kThreads>& group, Found<kCount>& found, const uint32_t (&wanted)[kCount], const Load& load) {
  using Sum = std::conditional_t<kCount == 1, uint32_t, uint64_t>;  // two histograms share a word
  constexpr unsigned kPerThread = kHistogramBins / kThreads;
  static_assert(kPerThread * kThreads == kHistogramBins && kCount <= 2);
  const unsigned top = kHistogramBins - 1 - group.rank() * kPerThread;
  uint32_t inside[kCount][kPerThread];
  Sum sum = 0;
#pragma unroll
  for (unsigned n = 0; n < kCount; ++n) {
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) sum += Sum{inside[n][i] = load(n, top - i)} << (32 * n);
  }
  Sum total;
  const Sum before = group.exclusive_sum(sum, total);
  if (group.rank() < kCount) found.bin[group.rank()] = {kHistogramBins, static_cast<uint32_t>(total >> (32 * group.rank())), 0};
  group.sync();
#pragma unroll
  for (unsigned n = 0; n < kCount; ++n) {
    uint32_t above = static_cast<uint32_t>(before >> (32 * n));
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      if (above < wanted[n] && wanted[n] <= above + inside[n][i]) found.bin[n] = {top - i, above, inside[n][i]};
      above += inside[n][i];
    }
  }
  group.sync();
  const Found<kCount> result = found;
  group.sync();
  return result;
}
template <unsigned kThreads, typename Load>
__device__ Bin find_bin(const BlockGroup<kThreads>& group, Found<1>& found, uint32_t wanted, const Load& load) {
  return find_bins(group, found, {wanted}, [&](unsigned, unsigned bin) { return load(bin); }).bin[0];
}

template <typename Bits>
__device__ uint32_t shift_of(Bits low, Bits high) {
  uint32_t shift = 0;
  while (((high - low) >> shift) >= kHistogramBins) ++shift;
  return shift;
}

template <typename Bits>
__device__ bool in_range(const Selection<Bits>& selection, Bits key) {
  return key >= selection.low && key <= selection.high;
}

// Takes the bin that holds the k-th score for the new range.
template <typename Bits>
__device__ void take_bin(Selection<Bits>& selection, const Bin& bin) {
  if (bin.index >= kHistogramBins) {  // never, with feedback that aggregate wrote; end it all the same
    selection.high = selection.low;
    return;
  }
  const Bits low = selection.low + (static_cast<Bits>(bin.index) << selection.shift);
  const Bits last = low + ((Bits{1} << selection.shift) - 1);
  selection.low = low;
  selection.high = last < selection.high ? last : selection.high;
  selection.above += bin.above;
  selection.inside = bin.inside;
}

// What finish does with the range: through the list if it holds all that may be sent, else by another look at the residual,
// which fills the list anew once few enough entries are left.
template <typename T>
__device__ void choose_task(Selection<typename Traits<T>::Bits>& selection, const CompressDevice<T>& device) {
  selection.shift = shift_of(selection.low, selection.high);
  const bool fits = uint64_t{selection.above} + selection.inside <= static_cast<uint64_t>(device.sampling.list_capacity);
  if (selection.from_residual && !selection.collected && fits) selection.task = Task::kCollect;
  else selection.task = selection.low == selection.high ? Task::kPack : Task::kNarrow;
  const bool by_list = selection.task == Task::kNarrow && !selection.from_residual;
  const uint32_t list_size = device.counters.load_uniform(kListSize);
  selection.items = by_list ? static_cast<uint32_t>((uint64_t{list_size} + kListChunk - 1) / kListChunk) : device.items();
}

// Where accumulate left it: hits above the bracket, a histogram inside it, and a list of at least both if it fits.
template <typename T, unsigned kThreads>
__device__ Selection<typename Traits<T>::Bits> first_selection(
    const BlockGroup<kThreads>& group, Found<1>& found, Selection<typename Traits<T>::Bits> selection, const CompressDevice<T>& device) {
  using Bits = typename Traits<T>::Bits;
  const uint32_t k = static_cast<uint32_t>(device.layout.k), hits = device.counters.load_uniform(kHits);
  const Bin bin = find_bin(group, found, hits < k ? k - hits : 0, [&](unsigned i) { return device.histogram.load(i); });
  const bool listed = device.counters.load_uniform(kListSize) <= static_cast<uint64_t>(device.sampling.list_capacity);
  selection.from_residual = !listed;
  selection.collected = 0;
  selection.first_ticket = 0;
  selection.above = 0;
  selection.inside = static_cast<uint32_t>(device.layout.numel);
  if (hits >= k) {  // too low a bracket: the k-th score is above it
    selection.low = selection.high + 1;
    selection.high = kLargestKey<Bits>;
  } else if (bin.index == kHistogramBins) {  // too high a bracket: it is below, where the list ends
    selection.above = hits + bin.above;
    selection.high = selection.low - 1;
    selection.low = 0;
    selection.from_residual = 1;
  } else {
    selection.above = hits;
    take_bin(selection, bin);
  }
  choose_task(selection, device);
  return selection;
}

// Where the list is short and the range holds few entries of it, the k-th score itself: one block reads the list, which takes less than
// another phase of all blocks. `keys` has room for kNarrowedAlone of them.
inline constexpr uint32_t kListReadAlone = 32768, kNarrowedAlone = 512;
template <typename T, unsigned kThreads>
__device__ void narrow_alone(
    const BlockGroup<kThreads>& group, typename Traits<T>::Bits* keys, uint32_t& count, Found<1>& found,
    Selection<typename Traits<T>::Bits>& selection, const CompressDevice<T>& device, bool has_feedback) {
  using Bits = typename Traits<T>::Bits;
  const uint32_t size = device.counters.load_uniform(kListSize);
  if (selection.task != Task::kNarrow || selection.from_residual || size > kListReadAlone || selection.inside > kNarrowedAlone) return;
  if (group.rank() == 0) count = 0, found.bin[0] = {0, 0, 0};
  group.sync();
  constexpr uint32_t kLoadsAhead = 16 / sizeof(Bits);
  for (uint32_t first = group.rank() * kVectorEntries; first < size; first += kThreads * kVectorEntries * kLoadsAhead) {
    Vector<Bits> of_list[kLoadsAhead];
#pragma unroll
    for (uint32_t v = 0; v < kLoadsAhead; ++v) {
      const uint32_t at = first + v * kThreads * kVectorEntries;  // what lies behind the list's end is not looked at
      if (at >= size) continue;
      if (has_feedback) {
        of_list[v] = device.list_keys.load_vector(at);
      } else {
        const auto values = device.list_values.load_vector(at);
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) of_list[v].entry[i] = magnitude_key(values.entry[i]);
      }
    }
#pragma unroll
    for (uint32_t v = 0; v < kLoadsAhead; ++v) {
      const uint32_t at = first + v * kThreads * kVectorEntries;
#pragma unroll
      for (uint32_t i = 0; i < kVectorEntries; ++i) {
        if (at + i >= size || !in_range(selection, of_list[v].entry[i])) continue;
        const uint32_t place = atomicAdd(&count, 1u);
        if (place < kNarrowedAlone) keys[place] = of_list[v].entry[i];  // as many as the histogram counted
      }
    }
  }
  group.sync();
  const uint32_t wanted = static_cast<uint32_t>(device.layout.k) - selection.above;
  const uint32_t candidates = count < kNarrowedAlone ? count : kNarrowedAlone;
  for (uint32_t i = group.rank(); i < candidates; i += kThreads) {
    uint32_t above = 0, equal = 0, before = 0;
    for (uint32_t j = 0; j < candidates; ++j) {
      above += keys[j] > keys[i];
      equal += keys[j] == keys[i];
      before += keys[j] == keys[i] && j < i;
    }
    if (before == 0 && above < wanted && wanted <= above + equal) found.bin[0] = {i, above, equal};
  }
  group.sync();
  const Bin at = found.bin[0];
  if (at.inside == 0) return;  // never, with feedback that aggregate wrote
  selection.low = selection.high = keys[at.index];
  selection.above += at.above;
  selection.inside = at.inside;
  choose_task(selection, device);
}

}  // namespace regtopk
