// What travels between the ranks of a host: rows of parts, core/parts.h; regtopk::split_, mean_, join_ and mark_unfilled_ on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../core/parts.h"
#include "../core/payload_status.h"
#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

constexpr int64_t kGrain = 16;

void write_head(uint8_t* row, int64_t step, int64_t plan, double scale, int64_t deed) {
  const PayloadHeader header = make_part_header(static_cast<uint64_t>(step), static_cast<uint64_t>(plan));
  const ExchangePart part{scale, static_cast<uint64_t>(deed)};
  std::memcpy(row, &header, sizeof header);
  std::memcpy(row + sizeof header, &part, sizeof part);
}

// Where each row begins.
std::vector<const uint8_t*> checked_rows(const char* who, const at::Tensor& rows, int64_t step, int64_t plan) {
  check_heads_and_slices(who, rows, kPartHeadBytes);
  std::vector<const uint8_t*> heads;
  for (int64_t rank = 0; rank < rows.size(0); ++rank) {
    heads.push_back(rows.const_data_ptr<uint8_t>() + rank * rows.size(1));
    PayloadHeader header;
    std::memcpy(&header, heads.back(), sizeof header);
    if (header.magic != kPayloadMagic || header.flags != 0)
      raise_payload_error(who, {"a part", "of this step", "none, for which it has an error of its own"}, rank);
  }
  check_heads(who, heads, /*have_exchange_parts=*/true, step, plan);
  return heads;
}

// The ends of whole parameters, and of the parts in each row.
struct Parts {
  const int64_t* ends;
  int64_t count;  // parameters

  int64_t numel(int64_t parameter) const { return ends[parameter + 1] - ends[parameter]; }
  const int64_t* of_row(int64_t rank) const { return ends + (rank + 1) * (count + 1); }
};

Parts checked_parts(const char* who, const at::Tensor& parts, const at::Tensor& rows, const at::Tensor& gradient) {
  check_parts(who, parts, rows, gradient);
  const Parts result{parts.const_data_ptr<int64_t>(), parts.size(1) - 1};
  const int64_t room = (rows.size(1) - kPartHeadBytes) / gradient.element_size();
  bool is_right = result.ends[0] == 0 && result.ends[result.count] == gradient.numel();
  for (int64_t rank = 0; rank < rows.size(0) && is_right; ++rank) {
    const int64_t* const ends = result.of_row(rank);
    is_right = ends[0] == 0 && ends[result.count] <= room;
    for (int64_t i = 0; i < result.count && is_right; ++i)
      is_right = result.numel(i) >= 0 && ends[i + 1] - ends[i] == part_of(result.numel(i), rank, rows.size(0)).numel;
  }
  TORCH_CHECK_VALUE(is_right, who, ": expected parts of a bucket of ", gradient.numel(), " entries in rows of ", room, ", got others");
  return result;
}

// Calls function(row, at, begin, bytes): where in which row which bytes of the gradient are.
template <typename Function>
void for_each_part(const Parts& parts, int64_t ranks, int64_t entry_bytes, Function&& function) {
  torch_parallel_for()(ranks, [&](int64_t first, int64_t last) {
    for (int64_t rank = first; rank < last; ++rank) {
      for (int64_t i = 0; i < parts.count; ++i) {
        const auto [begin, entries] = part_of(parts.numel(i), rank, ranks);
        const int64_t at = kPartHeadBytes + parts.of_row(rank)[i] * entry_bytes;
        function(rank, at, (parts.ends[i] + begin) * entry_bytes, entries * entry_bytes);
      }
    }
  });
}

void split_cpu(
    const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor& parts, int64_t step, int64_t plan, double scale, int64_t deed) {
  const Parts checked = checked_parts("split_", parts, rows, gradient);
  const auto* const from = static_cast<const uint8_t*>(gradient.const_data_ptr());
  uint8_t* const to = rows.mutable_data_ptr<uint8_t>();
  const int64_t row_bytes = rows.size(1);
  for (int64_t rank = 0; rank < rows.size(0); ++rank) write_head(to + rank * row_bytes, step, plan, scale, deed);
  for_each_part(checked, rows.size(0), gradient.element_size(), [&](int64_t rank, int64_t at, int64_t begin, int64_t bytes) {
    std::memcpy(to + rank * row_bytes + at, from + begin, static_cast<size_t>(bytes));
  });
}

void mean_cpu(
    const at::Tensor& rows, const at::Tensor& row, const at::Tensor& found, int64_t entries, at::ScalarType dtype, int64_t step,
    int64_t plan, double scale, int64_t deed) {
  constexpr const char* who = "mean_";
  check_mean(who, rows, row, found, entries, dtype);
  const std::vector<const uint8_t*> from = checked_rows(who, rows, step, plan);
  std::fill_n(found.mutable_data_ptr<int64_t>(), 2, static_cast<int64_t>(kPayloadsValid));
  uint8_t* const to = row.mutable_data_ptr<uint8_t>();
  write_head(to, step, plan, scale, deed);
  with_value_type(value_type_of(who, dtype), [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    constexpr Accumulate kNan = std::numeric_limits<Accumulate>::quiet_NaN();
    T* const means = reinterpret_cast<T*>(to + kPartHeadBytes);
    const Accumulate ranks = static_cast<Accumulate>(from.size());
    torch_parallel_for()((entries + kTileEntries - 1) / kTileEntries, [&](int64_t first, int64_t last) {
      constexpr int64_t kBlock = 1024;
      Accumulate sums[kBlock];
      for (int64_t begin = first * kTileEntries; begin < std::min(last * kTileEntries, entries); begin += kBlock) {
        const int64_t count = std::min(kBlock, std::min(last * kTileEntries, entries) - begin);
        for (size_t rank = 0; rank < from.size(); ++rank) {
          const T* const given = reinterpret_cast<const T*>(from[rank] + kPartHeadBytes) + begin;
          for (int64_t i = 0; i < count; ++i) {
            const Accumulate value = Traits<T>::load(given[i]);
            sums[i] = rank == 0 ? value : sums[i] + value;
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          const Accumulate mean = sums[i] / ranks;
          means[begin + i] = Traits<T>::store(mean == mean ? mean : kNan);  // of NaN there is one
        }
      }
    });
  });
}

void join_cpu(
    const at::Tensor& rows, const at::Tensor& gradient, const at::Tensor& parts, const at::Tensor& verdict,
    const std::optional<at::Tensor>&, int64_t step, int64_t plan, int64_t round) {
  constexpr const char* who = "join_";
  const Parts checked = checked_parts(who, parts, rows, gradient);
  check_verdict(who, verdict, round);
  const std::vector<const uint8_t*> from = checked_rows(who, rows, step, plan);
  auto* const to = static_cast<uint8_t*>(gradient.mutable_data_ptr());
  for_each_part(checked, rows.size(0), gradient.element_size(), [&](int64_t rank, int64_t at, int64_t begin, int64_t bytes) {
    std::memcpy(to + begin, from[rank] + at, static_cast<size_t>(bytes));
  });
  if (!all_finite(to, gradient.numel(), value_type_of(who, gradient.scalar_type()), torch_parallel_for())) make_void(verdict, round);
}

void mark_unfilled_cpu(const at::Tensor& message, const at::Tensor& found, const std::optional<at::Tensor>& status) {
  check_mark("mark_unfilled_", message, found, status);
  for (int64_t i = 0; i < 2; ++i) {
    const auto each = static_cast<uint64_t>(found.const_data_ptr<int64_t>()[i]);
    if (each == kPayloadsValid) continue;
    message.mutable_data_ptr<uint8_t>()[offsetof(PayloadHeader, flags)] |= kFlagUnfilled;
    if (!status) continue;
    int64_t& lowest = status->mutable_data_ptr<int64_t>()[i];
    lowest = static_cast<int64_t>(std::min(static_cast<uint64_t>(lowest), each));
  }
}

}  // namespace

int64_t part_row_bytes(at::IntArrayRef numels, int64_t ranks, at::ScalarType dtype) {
  int64_t longest = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    int64_t entries = 0;
    for (const int64_t numel : numels) entries += part_of(numel, rank, ranks).numel;
    longest = std::max(longest, entries);
  }
  return kPartHeadBytes + (longest * static_cast<int64_t>(c10::elementSize(dtype)) + kGrain - 1) / kGrain * kGrain;
}

at::Tensor make_parts(at::IntArrayRef numels, int64_t ranks, at::Device device) {
  const int64_t count = static_cast<int64_t>(numels.size());
  const at::Tensor parts = at::empty({1 + ranks, count + 1}, at::kLong);
  int64_t* ends = parts.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row <= ranks; ++row) {
    *ends++ = 0;
    for (const int64_t numel : numels) {
      *ends = ends[-1] + (row == 0 ? numel : part_of(numel, row - 1, ranks).numel);
      ++ends;
    }
  }
  return parts.to(device);
}

at::Tensor entries_of(const at::Tensor& row, int64_t entries, at::ScalarType dtype) {
  return row.narrow(0, kPartHeadBytes, entries * static_cast<int64_t>(c10::elementSize(dtype))).view(dtype);
}

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  library.impl("split_", &split_cpu);
  library.impl("mean_", &mean_cpu);
  library.impl("join_", &join_cpu);
  library.impl("mark_unfilled_", &mark_unfilled_cpu);
}

}  // namespace regtopk
