// What travels between the ranks of a host: rows of parts, on the CPU.
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "operators.h"

namespace regtopk {
namespace {

constexpr int64_t kHeadBytes = sizeof(PayloadHeader) + sizeof(ExchangePart), kGrain = 16;

void write_head(uint8_t* row, const Stamp& stamp) {
  PayloadHeader header{};
  header.magic = kPayloadMagic;
  header.step = static_cast<uint64_t>(stamp.step);
  header.plan = static_cast<uint64_t>(stamp.plan);
  const ExchangePart part{stamp.scale, stamp.deed};
  std::memcpy(row, &header, sizeof header);
  std::memcpy(row + sizeof header, &part, sizeof part);
}

// Where each row begins.
std::vector<const uint8_t*> checked_rows(const char* who, const at::Tensor& rows, const Stamp& stamp) {
  check_rows(who, "rows", rows, rows.dim() == 2 ? std::max(rows.size(1), kHeadBytes) : kHeadBytes);
  std::vector<const uint8_t*> heads;
  for (int64_t rank = 0; rank < rows.size(0); ++rank) {
    heads.push_back(rows.const_data_ptr<uint8_t>() + rank * rows.size(1));
    uint32_t magic;
    std::memcpy(&magic, heads.back(), sizeof magic);
    if (magic != kPayloadMagic) raise_payload_error(who, {"a part", "of this step", "none, for which it has an error of its own"}, rank);
  }
  check_heads(who, heads, /*have_exchange_parts=*/true, stamp.step, stamp.plan);
  return heads;
}

// Calls function(row, at, begin, bytes): where in which row which bytes of the gradient are.
template <typename Function>
void for_each_part(at::IntArrayRef numels, int64_t ranks, int64_t entry_bytes, Function&& function) {
  torch_parallel_for()(ranks, [&](int64_t first, int64_t last) {
    for (int64_t rank = first; rank < last; ++rank) {
      int64_t at = kHeadBytes, of_parameter = 0;
      for (const int64_t numel : numels) {
        const auto [begin, entries] = part_of(numel, rank, ranks);
        function(rank, at, (of_parameter + begin) * entry_bytes, entries * entry_bytes);
        at += entries * entry_bytes;
        of_parameter += numel;
      }
    }
  });
}

void check_split(const char* who, const at::Tensor& gradient, const at::Tensor& rows, at::IntArrayRef numels) {
  int64_t total = 0;
  for (const int64_t numel : numels) total += numel;
  check_vector(who, "gradient", gradient, gradient.scalar_type(), total);
  check_rows(who, "rows", rows, part_row_bytes(numels, std::max<int64_t>(rows.size(0), 1), gradient.scalar_type()));
}

}  // namespace

int64_t part_row_bytes(at::IntArrayRef numels, int64_t ranks, at::ScalarType dtype) {
  int64_t longest = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    int64_t entries = 0;
    for (const int64_t numel : numels) entries += part_of(numel, rank, ranks).numel;
    longest = std::max(longest, entries);
  }
  return kHeadBytes + (longest * static_cast<int64_t>(c10::elementSize(dtype)) + kGrain - 1) / kGrain * kGrain;
}

void split_(const at::Tensor& gradient, const at::Tensor& rows, at::IntArrayRef numels, const Stamp& stamp) {
  check_split("split_", gradient, rows, numels);
  const auto* const from = static_cast<const uint8_t*>(gradient.const_data_ptr());
  uint8_t* const to = rows.mutable_data_ptr<uint8_t>();
  const int64_t row_bytes = rows.size(1);
  for (int64_t rank = 0; rank < rows.size(0); ++rank) write_head(to + rank * row_bytes, stamp);
  for_each_part(numels, rows.size(0), gradient.element_size(), [&](int64_t rank, int64_t at, int64_t begin, int64_t bytes) {
    std::memcpy(to + rank * row_bytes + at, from + begin, static_cast<size_t>(bytes));
  });
}

void mean_(const at::Tensor& rows, const at::Tensor& row, int64_t entries, at::ScalarType dtype, const Stamp& stamp) {
  constexpr const char* who = "mean_";
  const std::vector<const uint8_t*> from = checked_rows(who, rows, stamp);
  check_vector(who, "row", row, at::kByte, rows.size(1));
  TORCH_CHECK_VALUE(
      entries >= 0 && entries * static_cast<int64_t>(c10::elementSize(dtype)) <= rows.size(1) - kHeadBytes, who,
      ": expected rows of at least ", entries, " entries, got rows of ", rows.size(1), " bytes");
  uint8_t* const to = row.mutable_data_ptr<uint8_t>();
  write_head(to, stamp);
  with_value_type(value_type_of(who, dtype), [&]<typename T>(T) {
    using Accumulate = typename Traits<T>::Accumulate;
    T* const means = reinterpret_cast<T*>(to + kHeadBytes);
    const Accumulate ranks = static_cast<Accumulate>(from.size());
    torch_parallel_for()((entries + kTileEntries - 1) / kTileEntries, [&](int64_t first, int64_t last) {
      constexpr int64_t kBlock = 1024;
      Accumulate sums[kBlock];
      for (int64_t begin = first * kTileEntries; begin < std::min(last * kTileEntries, entries); begin += kBlock) {
        const int64_t count = std::min(kBlock, std::min(last * kTileEntries, entries) - begin);
        for (size_t rank = 0; rank < from.size(); ++rank) {
          const T* const given = reinterpret_cast<const T*>(from[rank] + kHeadBytes) + begin;
          for (int64_t i = 0; i < count; ++i) {
            const Accumulate value = Traits<T>::load(given[i]);
            sums[i] = rank == 0 ? value : sums[i] + value;
          }
        }
        for (int64_t i = 0; i < count; ++i) means[begin + i] = Traits<T>::store(sums[i] / ranks);
      }
    });
  });
}

at::Tensor entries_of(const at::Tensor& row, int64_t entries, at::ScalarType dtype) {
  return row.narrow(0, kHeadBytes, entries * static_cast<int64_t>(c10::elementSize(dtype))).view(dtype);
}

void join_(const at::Tensor& rows, const at::Tensor& gradient, at::IntArrayRef numels, const Stamp& stamp) {
  constexpr const char* who = "join_";
  check_split(who, gradient, rows, numels);
  const std::vector<const uint8_t*> from = checked_rows(who, rows, stamp);
  auto* const to = static_cast<uint8_t*>(gradient.mutable_data_ptr());
  for_each_part(numels, rows.size(0), gradient.element_size(), [&](int64_t rank, int64_t at, int64_t begin, int64_t bytes) {
    std::memcpy(to + begin, from[rank] + at, static_cast<size_t>(bytes));
  });
}

}  // namespace regtopk
