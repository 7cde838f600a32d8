// Parts of parameters between the ranks of a host (csrc/core/parts.h).
//
//   split  the gradient to a row for each rank       a warp owns consecutive entries of a row
//   mean   the rows received to one of their mean    a thread owns entries
//   join   the rows that all ranks have to a bucket  as split
//   mark   a message whose making was not valid      a warp
#include <algorithm>
#include <limits>

#include "../csrc/core/parts.h"
#include "../csrc/core/score.h"
#include "check.cuh"

namespace regtopk {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpThreads;

// Where the parts of a bucket lie in it and in rows. A table that says otherwise makes other parts, but reaches nothing outside of them.
struct Parts {
  Global<const int64_t> ends;  // [1 + ranks, count + 1]
  uint32_t count, ranks, numel;
  uint32_t room;               // entries of a row
  uint32_t chunk, chunks;      // entries that a warp owns, and such in a row

  __device__ DeviceSpans of_row(uint32_t rank) const { return {ends.offset((1 + rank) * size_t{count + 1}), count, room}; }

  // For each part, or piece of one, among the entries of this warp calls what of_rank(rank) returns, of the row's rank, with (index in the
  // row, index in the bucket, entries, lane, lanes), by so many lanes together.
  template <typename OfRow>
  __device__ void each(const OfRow& of_rank) const {
    const WarpGroup warp;
    const uint32_t number = blockIdx.x * kWarps + threadIdx.x / kWarpThreads, rank = number / chunks;
    if (rank >= ranks) return;
    const DeviceSpans parts = of_row(rank);
    const uint32_t begin = number % chunks * chunk, row_end = parts.uniform_end(count);
    if (begin >= row_end) return;
    const uint32_t end = row_end - begin < chunk ? row_end : begin + chunk, first = parts.find(begin);
    const auto move = of_rank(rank);
    parts.for_each(first, begin, end, [&](uint32_t span, uint32_t from, uint32_t to, bool inside) {
      uint32_t there = 0;
      if (inside) {
        const int64_t whole = ends.load(span), entries = ends.load(span + 1) - whole;
        const int64_t at = whole + part_of(entries, rank, ranks).begin + (from - parts.end(span));
        inside = at >= 0 && at <= int64_t{numel} - (to - from);
        there = static_cast<uint32_t>(at);
      }
      // Short ones each by a lane.
      constexpr uint32_t kShort = 8;
      const bool is_short = inside && to - from <= kShort;
      if (is_short) move(from, there, to - from, 0, 1);
      warp.each_lane(inside && !is_short, [&](unsigned lane) {
        const uint32_t at = __shfl_sync(kAllLanes, from, lane), entries = __shfl_sync(kAllLanes, to, lane) - at;
        move(at, __shfl_sync(kAllLanes, there, lane), entries, warp.rank(), kWarpThreads);
      });
    });
  }
};

// Consecutive entries to where others are: whole vectors where both lie so, else one by one.
template <typename T, bool kJudges>
struct Move {
  Global<const T> source;  // null: what is written is NaN
  Global<T> target;
  bool& finite;

  __device__ void look(const T& value) const {
    if constexpr (kJudges) finite &= is_finite(Traits<T>::load(value));
  }
  __device__ void one_by_one(uint32_t from, uint32_t to, uint32_t entries, uint32_t lane, uint32_t lanes) const {
    constexpr uint32_t kAtOnce = 4;
    for (uint64_t first = lane; first < entries; first += kAtOnce * lanes) {
      T values[kAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) values[i] = first + i * lanes < entries ? source.load(from + first + i * lanes) : T{};
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        look(values[i]);
        if (first + i * lanes < entries) target.store(to + first + i * lanes, values[i]);
      }
    }
  }
  __device__ void run(uint32_t from, uint32_t to, uint32_t entries, uint32_t lane, uint32_t lanes) const {
    if (!source) {
      const T nan = Traits<T>::store(std::numeric_limits<typename Traits<T>::Accumulate>::quiet_NaN());
      for (uint64_t i = lane; i < entries; i += lanes) target.store(to + i, nan);
      return;
    }
    if ((from - to) % kVectorEntries != 0) return one_by_one(from, to, entries, lane, lanes);
    const uint32_t until = (0u - from) % kVectorEntries, before = until < entries ? until : entries;
    one_by_one(from, to, before, lane, lanes);
    constexpr uint32_t kAtOnce = sizeof(T) == 8 ? 2 : 4;
    const uint64_t end = before + (entries - before) / kVectorEntries * kVectorEntries;
#pragma unroll 1
    for (uint64_t first = before + lane * kVectorEntries; first < end; first += kAtOnce * lanes * kVectorEntries) {
      Vector<T> vectors[kAtOnce];
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        const uint64_t at = first + v * lanes * kVectorEntries;
        vectors[v] = at < end ? source.load_vector(from + at) : Vector<T>{};
      }
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        const uint64_t at = first + v * lanes * kVectorEntries;
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) look(vectors[v].entry[i]);
        if (at < end) target.store_vector(to + at, vectors[v]);
      }
    }
    const uint32_t done = static_cast<uint32_t>(end);
    one_by_one(from + done, to + done, entries - done, lane, lanes);
  }
};

// Rows as they travel, and what this rank expects in the heads, or writes there.
template <typename Byte>
struct Rows {
  Global<Byte> bytes;
  uint32_t ranks;
  uint64_t row_bytes, step, plan;

  __device__ Global<Byte> row(uint32_t rank) const { return bytes.offset(rank * row_bytes); }
  template <typename T>
  __device__ Global<T> entries(uint32_t rank) const {
    return row(rank).template at_byte<T>(kPartHeadBytes);
  }

  // The lowest status of the heads that this thread has read; all threads of a block read them all.
  __device__ unsigned long long check() const {
    unsigned long long status = kPayloadsValid;
    for (uint32_t rank = threadIdx.x; rank < ranks; rank += kThreads) {
      const auto report = [&](PayloadField field, uint32_t stage = 0) {
        const unsigned long long found = status_of(stage, rank, field);
        if (found < status) status = found;
      };
      const PayloadHeader header = load_header(row(rank));
      // What made a rank's row invalid says more than that it is.
      const bool is_consequence = header.magic == kPayloadMagic && (header.flags & kFlagUnfilled) != 0;
      if (header.magic != kPayloadMagic || header.flags != 0) report(PayloadField::kHeader, is_consequence ? kStageOfConsequences : 0);
      if (rank > 0) compare_exchange_parts(row(0), row(rank), report);
      if (header.step != step) report(PayloadField::kStep, 2);
      else if (header.plan != plan) report(PayloadField::kPlan, 2);
    }
    return status;
  }
};

__device__ void write_head(Global<uint8_t> row, uint64_t step, uint64_t plan, const ExchangePart& part) {
  row.at_byte<PayloadHeader>(0).store(0, make_part_header(step, plan));
  row.at_byte<ExchangePart>(sizeof(PayloadHeader)).store(0, part);
}

template <typename T>
struct SplitDevice {
  Parts parts;
  Global<const T> gradient;
  Rows<uint8_t> rows;
  ExchangePart exchange;
};

// Reads the gradient once and writes it once.
template <typename T>
__global__ void __launch_bounds__(kThreads) split_parts_kernel(const __grid_constant__ SplitDevice<T> device) {
  const Rows<uint8_t>& rows = device.rows;
  for (uint32_t rank = blockIdx.x * kThreads + threadIdx.x; rank < rows.ranks; rank += gridDim.x * kThreads) {
    write_head(rows.row(rank), rows.step, rows.plan, device.exchange);
  }
  bool any = true;
  device.parts.each([&](uint32_t rank) {
    const Move<T, false> move{device.gradient, rows.template entries<T>(rank), any};
    return [move](uint32_t in_row, uint32_t in_bucket, uint32_t entries, uint32_t lane, uint32_t lanes) {
      move.run(in_bucket, in_row, entries, lane, lanes);
    };
  });
}

template <typename T>
struct JoinPartsDevice {
  Parts parts;
  Rows<const uint8_t> rows;
  Global<T> gradient;
  Global<int64_t> verdict;
  int64_t round;
  Global<unsigned long long> worst_status;
};

// Reads the rows once and writes the bucket once.
template <typename T>
__global__ void __launch_bounds__(kThreads) join_parts_kernel(const __grid_constant__ JoinPartsDevice<T> device) {
  const unsigned long long status = device.rows.check();
  if (blockIdx.x == 0 && status != kPayloadsValid && device.worst_status) device.worst_status.take_minimum(0, status);
  const bool valid = !__syncthreads_or(status != kPayloadsValid);
  bool finite = valid;
  device.parts.each([&](uint32_t rank) {
    const Move<T, true> move{valid ? device.rows.template entries<const T>(rank) : Global<const T>(), device.gradient, finite};
    return [move](uint32_t in_row, uint32_t in_bucket, uint32_t entries, uint32_t lane, uint32_t lanes) {
      move.run(in_row, in_bucket, entries, lane, lanes);
    };
  });
  if (device.verdict && __syncthreads_or(!finite) && threadIdx.x == 0) device.verdict.store(0, device.round);
}

template <typename T>
struct MeanDevice {
  Rows<const uint8_t> rows;
  uint64_t entries;
  Global<uint8_t> row;
  ExchangePart exchange;
  Global<unsigned long long> found;
};

// Per entry one of each row read, and one written.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) mean_parts_kernel(const __grid_constant__ MeanDevice<T> device) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr Accumulate kNan = std::numeric_limits<Accumulate>::quiet_NaN();
  constexpr uint32_t kAtOnce = sizeof(T) == 8 ? 1 : 2;  // vectors
  const Rows<const uint8_t>& rows = device.rows;
  const unsigned long long status = rows.check();
  const bool valid = !__syncthreads_or(status != kPayloadsValid);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      write_head(device.row, rows.step, rows.plan, device.exchange);
      for (unsigned i = 0; i < 2; ++i) device.found.store(i, kPayloadsValid);
    }
    __syncthreads();
    if (status != kPayloadsValid) device.found.take_minimum(1, status);
  }
  const Global<T> means = device.row.template at_byte<T>(kPartHeadBytes);
  const Accumulate ranks = static_cast<Accumulate>(rows.ranks);
  const auto mean_of = [&](Accumulate sum) {
    const Accumulate mean = sum / ranks;
    return Traits<T>::store(valid && mean == mean ? mean : kNan);
  };
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x, threads = uint64_t{gridDim.x} * kThreads;
  const uint64_t in_vectors = device.entries / kVectorEntries * kVectorEntries;
  for (uint64_t first = thread * kVectorEntries; first < in_vectors; first += kAtOnce * threads * kVectorEntries) {
    Accumulate sums[kAtOnce][kVectorEntries]{};
#pragma unroll 2
    for (uint32_t rank = 0; rank < (valid ? rows.ranks : 0); ++rank) {
      const Global<const T> row = rows.template entries<const T>(rank);
      Vector<T> given[kAtOnce];
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        const uint64_t at = first + v * threads * kVectorEntries;
        given[v] = at < in_vectors ? row.load_vector(at) : Vector<T>{};
      }
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
#pragma unroll
        for (int i = 0; i < kVectorEntries; ++i) {
          const Accumulate value = Traits<T>::load(given[v].entry[i]);
          sums[v][i] = rank == 0 ? value : sums[v][i] + value;
        }
      }
    }
#pragma unroll
    for (uint32_t v = 0; v < kAtOnce; ++v) {
      const uint64_t at = first + v * threads * kVectorEntries;
      if (at >= in_vectors) break;
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kVectorEntries; ++i) vector.entry[i] = mean_of(sums[v][i]);
      means.store_vector(at, vector);
    }
  }
  if (in_vectors + thread >= device.entries) return;
  Accumulate sum = 0;
  for (uint32_t rank = 0; rank < (valid ? rows.ranks : 0); ++rank) {
    const Accumulate value = Traits<T>::load(rows.template entries<const T>(rank).load(in_vectors + thread));
    sum = rank == 0 ? value : sum + value;
  }
  means.store(in_vectors + thread, mean_of(sum));
}

template <typename T>
struct MarkDevice {
  Global<uint8_t> message;
  Global<const unsigned long long> found;
  Global<unsigned long long> worst_status;
};

// Compiled for one type: it knows none.
template <typename T>
__global__ void __launch_bounds__(kWarpThreads) mark_kernel(const __grid_constant__ MarkDevice<T> device) {
  if (threadIdx.x >= 2) return;
  const unsigned long long found = device.found.load(threadIdx.x);
  if (found == kPayloadsValid) return;
  device.message.template at_byte<uint32_t>(offsetof(PayloadHeader, flags)).set_bits(0, kFlagUnfilled);
  if (device.worst_status) device.worst_status.take_minimum(threadIdx.x, found);
}

bool fit(const PartsLaunch& parts) {
  return parts.numel >= 0 && parts.numel <= kMaxEntries && parts.parameters >= 1 && parts.parameters <= kMaxSpans && parts.ranks >= 1 &&
         parts.ranks <= kMaxSpans && parts.row_bytes >= kPartHeadBytes && parts.row_bytes % kAlignment == 0;
}

// Not more warps than the device has at a time, and each with enough to do.
template <typename T>
Parts parts_of(const PartsLaunch& launch) {
  constexpr int64_t kLeast = 16384 / sizeof(T), kGrain = 4 * kWarpThreads;
  const int64_t room = std::min<int64_t>((launch.row_bytes - kPartHeadBytes) / static_cast<int64_t>(sizeof(T)), kMaxEntries);
  const int64_t most = std::max<int64_t>(int64_t{multiprocessors()} * 8 * kWarps / launch.ranks, 1);
  const int64_t wanted = std::clamp<int64_t>((room + kLeast - 1) / kLeast, 1, most);
  const int64_t chunk = ((room + wanted - 1) / wanted + kGrain - 1) / kGrain * kGrain;
  return {
      .ends = Global(launch.ends),
      .count = static_cast<uint32_t>(launch.parameters),
      .ranks = static_cast<uint32_t>(launch.ranks),
      .numel = static_cast<uint32_t>(launch.numel),
      .room = static_cast<uint32_t>(room),
      .chunk = static_cast<uint32_t>(std::max<int64_t>(chunk, kGrain)),
      .chunks = static_cast<uint32_t>(wanted)};
}

unsigned blocks_of(const Parts& parts) { return (parts.ranks * parts.chunks + kWarps - 1) / kWarps; }

template <typename Byte>
Rows<Byte> rows_of(const PartsLaunch& launch, Byte* bytes) {
  return {Global(bytes), static_cast<uint32_t>(launch.ranks), static_cast<uint64_t>(launch.row_bytes), launch.step, launch.plan};
}

}  // namespace

cudaError_t launch_split(const SplitLaunch& arguments, cudaStream_t stream) {
  if (!fit(arguments.parts) || is_misaligned(arguments.gradient) || is_misaligned(arguments.rows)) return cudaErrorInvalidValue;
  return with_value_type(arguments.parts.type, [&]<typename T>(T) {
    const SplitDevice<T> device{
        .parts = parts_of<T>(arguments.parts),
        .gradient = Global(static_cast<const T*>(arguments.gradient)),
        .rows = rows_of(arguments.parts, arguments.rows),
        .exchange = {arguments.scale, arguments.deed}};
    REGTOPK_LAUNCH((split_parts_kernel<T>), blocks_of(device.parts), kThreads, stream, device);
    return launch_error();
  });
}

cudaError_t launch_join(const JoinLaunch& arguments, cudaStream_t stream) {
  if (!fit(arguments.parts) || is_misaligned(arguments.gradient) || is_misaligned(arguments.rows)) return cudaErrorInvalidValue;
  return with_value_type(arguments.parts.type, [&]<typename T>(T) {
    const JoinPartsDevice<T> device{
        .parts = parts_of<T>(arguments.parts),
        .rows = rows_of(arguments.parts, arguments.rows),
        .gradient = Global(static_cast<T*>(arguments.gradient)),
        .verdict = Global(arguments.verdict),
        .round = arguments.round,
        .worst_status = Global(arguments.worst_status)};
    REGTOPK_LAUNCH((join_parts_kernel<T>), blocks_of(device.parts), kThreads, stream, device);
    return launch_error();
  });
}

cudaError_t launch_mean(const MeanLaunch& arguments, cudaStream_t stream) {
  if (arguments.ranks < 1 || arguments.ranks > kMaxSpans || arguments.entries < 0 || arguments.row_bytes % kAlignment != 0 ||
      arguments.row_bytes < kPartHeadBytes + arguments.entries * value_bytes(arguments.type) || is_misaligned(arguments.rows) ||
      is_misaligned(arguments.row)) {
    return cudaErrorInvalidValue;
  }
  return with_value_type(arguments.type, [&]<typename T>(T) {
    constexpr int64_t kOfBlock = int64_t{kThreads} * kVectorEntries * (sizeof(T) == 8 ? 1 : 2);
    const int64_t wanted = (arguments.entries + kOfBlock - 1) / kOfBlock, most = int64_t{multiprocessors()} * 8;
    const MeanDevice<T> device{
        .rows =
            {Global(arguments.rows), static_cast<uint32_t>(arguments.ranks), static_cast<uint64_t>(arguments.row_bytes), arguments.step,
             arguments.plan},
        .entries = static_cast<uint64_t>(arguments.entries),
        .row = Global(arguments.row),
        .exchange = {arguments.scale, arguments.deed},
        .found = Global(arguments.found)};
    REGTOPK_LAUNCH((mean_parts_kernel<T>), static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most)), kThreads, stream, device);
    return launch_error();
  });
}

cudaError_t launch_mark(const MarkLaunch& arguments, cudaStream_t stream) {
  if (is_misaligned(arguments.message)) return cudaErrorInvalidValue;
  const MarkDevice<float> device{
      .message = Global(arguments.message), .found = Global(arguments.found), .worst_status = Global(arguments.worst_status)};
  REGTOPK_LAUNCH((mark_kernel<float>), 1, kWarpThreads, stream, device);
  return launch_error();
}

}  // namespace regtopk
