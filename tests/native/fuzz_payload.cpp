// Fuzz target: the decoders of untrusted payloads and of their wire forms, against plain ones written from the formats alone.
//
// The input's first bytes choose a bucket and a form; then come edits of a valid one (place, mask), so that inputs get past the magic
// number. What the two decoders accept must be the same; what they accept must be read as the same entries; and what is
// rejected must never have led to a read or write out of bounds, which is the sanitizers' part.
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/core/aggregate.h"
#include "../../csrc/core/compress.h"
#include "../../csrc/core/cpu_variant.h"
#include "../../csrc/core/wire.h"
#include "check.h"

long long accepted_inputs = 0;  // for the driver

namespace {

using namespace regtopk;

// An exact copy on the heap: a read beyond its end is an error that the address sanitizer sees.
std::unique_ptr<uint8_t[]> copy_of(const std::vector<uint8_t>& bytes) {
  auto copy = std::make_unique<uint8_t[]>(bytes.size());
  std::memcpy(copy.get(), bytes.data(), bytes.size());
  return copy;
}

template <typename Number>
Number read(const std::vector<uint8_t>& bytes, int64_t at) {
  Number number;
  std::memcpy(&number, bytes.data() + at, sizeof number);
  return number;
}

// The entries of a payload, or nothing if it is not one; field by field, as payload.h describes the format.
std::optional<std::vector<int64_t>> decode_plainly(const std::vector<uint8_t>& bytes, int64_t numel, int64_t k, ValueType type) {
  const bool bitmap = k > numel / 16;
  const int64_t tiles = (numel + 65535) / 65536;
  if (read<uint32_t>(bytes, 0) != 0x6b707472 || read<uint16_t>(bytes, 4) != 1) return std::nullopt;
  if (bytes[6] != static_cast<uint8_t>(type) || bytes[7] != (bitmap ? 1 : 0)) return std::nullopt;
  if (read<uint64_t>(bytes, 16) != static_cast<uint64_t>(numel) || read<uint64_t>(bytes, 24) != static_cast<uint64_t>(k))
    return std::nullopt;
  if (read<uint64_t>(bytes, 40) > static_cast<uint64_t>(k)) return std::nullopt;
  if (read<uint32_t>(bytes, 56) > 3 || read<uint32_t>(bytes, 60) != 0) return std::nullopt;
  const int64_t support_at = (64 + 4 * tiles + 7) / 8 * 8;
  std::vector<int64_t> indices;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = read<uint32_t>(bytes, 64 + 4 * tile);
    const int64_t end = tile + 1 < tiles ? read<uint32_t>(bytes, 64 + 4 * (tile + 1)) : k;
    const int64_t entries = tile + 1 < tiles ? 65536 : numel - tile * 65536;
    if (begin != static_cast<int64_t>(indices.size()) || end < begin || end > k || end - begin > entries) return std::nullopt;
    if (bitmap) {
      const int64_t beyond = (entries + 7) / 8 * 8;
      for (int64_t offset = 0; offset < beyond; ++offset) {
        if ((bytes[support_at + tile * 8192 + offset / 8] >> (offset % 8) & 1) == 0) continue;
        if (offset >= entries) return std::nullopt;
        indices.push_back(tile * 65536 + offset);
      }
    } else {
      int64_t previous = -1;
      for (int64_t entry = begin; entry < end; ++entry) {
        const int64_t offset = read<uint16_t>(bytes, support_at + 2 * entry);
        if (offset <= previous || offset >= entries) return std::nullopt;
        previous = offset;
        indices.push_back(tile * 65536 + offset);
      }
    }
    if (static_cast<int64_t>(indices.size()) != end) return std::nullopt;
  }
  return indices;
}

template <typename T>
std::vector<uint8_t> make_payload(const PayloadLayout& layout, std::mt19937_64& random) {
  std::vector<T> values(layout.k);
  for (T& value : values)
    value = Traits<T>::store(static_cast<typename Traits<T>::Accumulate>(static_cast<double>(random() % 2001) / 1000 - 1));
  std::vector<int64_t> indices;
  for (int64_t index = 0; index < layout.numel; ++index) {
    const auto wanted = static_cast<uint64_t>(layout.k) - indices.size();
    if (random() % static_cast<uint64_t>(layout.numel - index) < wanted) indices.push_back(index);
  }
  std::vector<uint8_t> bytes(layout.bytes);
  encode<T>(layout, make_header(layout, random() % 1000, random()), indices.data(), values.data(), bytes.data());
  return bytes;
}

// Aggregates and puts back an accepted payload and compares with the entries that the plain decoder found.
template <typename T>
void read_accepted(const std::vector<uint8_t>& bytes, const PayloadLayout& layout, const std::vector<int64_t>& indices) {
  using Accumulate = typename Traits<T>::Accumulate;
  const auto copy = copy_of(bytes);
  const PayloadView payload(copy.get(), layout);
  std::vector<int64_t> decoded(layout.k);
  decode_indices(payload, decoded.data());
  CHECK(decoded == indices);
  CHECK(count_common(payload, payload, serial_for) == layout.k);
  auto average = std::make_unique<T[]>(layout.numel);
  auto feedback = std::make_unique<Accumulate[]>(layout.k);
  AggregateArguments arguments{.layout = layout};
  arguments.payloads = copy.get();
  arguments.workers = 1;
  arguments.gradient = average.get();
  arguments.feedback = feedback.get();
  arguments.feedback_workers = 1;
  aggregate(arguments, serial_for);
  auto residual = std::make_unique<Accumulate[]>(layout.numel);
  put_back(payload, residual.get(), serial_for);
  size_t next = 0;
  for (int64_t index = 0; index < layout.numel; ++index) {
    Accumulate expected = 0;
    if (next < indices.size() && indices[next] == index) {
      expected = Traits<T>::load(read<T>(bytes, layout.values_at + static_cast<int64_t>(next * sizeof(T))));
      ++next;
    }
    const Accumulate got = Traits<T>::load(average[index]);
    CHECK(got == expected || (got != got && expected != expected));
    CHECK(residual[index] == (is_finite(expected) ? expected : Accumulate{0}));
  }
}

// The entries of an Elias-Fano code, or nothing if it is none, as wire.h describes it.
std::optional<std::vector<int64_t>> decode_code_plainly(const std::vector<uint8_t>& bytes, int64_t numel, int64_t k) {
  int low_bits = 0;
  while (low_bits < 16 && numel >> (low_bits + 1) >= k) ++low_bits;
  const int64_t high_at = (64 + (k * low_bits + 7) / 8 + 7) / 8 * 8;
  const int64_t words = (k + ((numel - 1) >> low_bits) + 1 + 63) / 64;
  std::vector<int64_t> indices;
  for (int64_t place = 0; place < words * 64; ++place) {
    if ((bytes[high_at + place / 8] >> (place % 8) & 1) == 0) continue;
    const int64_t entry = static_cast<int64_t>(indices.size());
    if (entry == k) return std::nullopt;
    int64_t low = 0;
    for (int bit = 0; bit < low_bits; ++bit) {
      const int64_t at = entry * low_bits + bit;
      low |= int64_t{bytes[64 + at / 8] >> (at % 8) & 1} << bit;
    }
    const int64_t index = (place - entry) << low_bits | low;
    if (index >= numel || (entry > 0 && index <= indices.back())) return std::nullopt;
    indices.push_back(index);
  }
  if (static_cast<int64_t>(indices.size()) != k) return std::nullopt;
  return indices;
}

void edit(std::vector<uint8_t>& bytes, const uint8_t* data, size_t size) {
  for (size_t at = 8; at + 5 <= size; at += 5) {
    uint32_t place;
    std::memcpy(&place, data + at, 4);
    // Half of the edits go to the header and what follows it, where each byte means much.
    const size_t range = place & 1 ? std::min<size_t>(bytes.size(), 96) : bytes.size();
    bytes[(place >> 1) % range] ^= data[at + 4];
  }
}

// Of what takes messages: what it makes of a damaged one is a payload of the code's entries, or an error, or what is still to be checked.
void take_wire(std::vector<uint8_t> payload, const PayloadLayout& layout, const WireLayout& wire, const uint8_t* data, size_t size) {
  std::vector<uint8_t> message(wire.bytes);
  std::vector<double> residual(layout.numel);  // as large as any accumulate type
  to_wire(layout, wire, payload.data(), residual.data(), message.data(), serial_for);
  edit(message, data, size);
  const auto copy = copy_of(message);
  const auto result = std::make_unique<uint8_t[]>(layout.bytes);
  const auto error = from_wire(layout, wire, copy.get(), result.get());
  if (error) CHECK(!error->field.empty() && !error->expected.empty() && !error->got.empty());
  if (!wire.has_code()) return;
  const auto indices = decode_code_plainly(message, layout.numel, layout.k);
  CHECK(indices || error);
  if (error || check_payload(result.get(), layout, serial_for)) return;
  std::vector<int64_t> decoded(layout.k);
  decode_indices(PayloadView(result.get(), layout), decoded.data());
  CHECK(decoded == *indices);
  ++accepted_inputs;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  static const std::vector<std::string> variants = available_cpu_variants();
  set_cpu_variant(variants[data[0] % variants.size()]);
  const auto type = static_cast<ValueType>(data[1] % 4);
  uint16_t word;
  std::memcpy(&word, data + 2, 2);
  const int64_t numel = data[4] % 64 == 0 ? 65536 + word : 1 + word % 2048;
  std::memcpy(&word, data + 5, 2);
  const int64_t k = 1 + (data[4] % 8 < 4 ? word % std::max<int64_t>(1, numel / 16) : word % numel);
  const PayloadLayout layout(numel, k, type);
  std::mt19937_64 random(data[7]);
  std::vector<uint8_t> bytes = with_value_type(type, [&]<typename T>(T) { return make_payload<T>(layout, random); });
  if (data[1] & 4) {
    const ValueType narrow = value_bytes(type) > 2 ? ValueType::kBFloat16 : type;
    const ValueType types[] = {type, narrow, ValueType::kSign, ValueType::kTwoBits};
    take_wire(std::move(bytes), layout, WireLayout::of(layout, types[data[1] >> 3 & 3], /*elias_fano=*/(data[1] & 32) != 0), data, size);
    return 0;
  }
  edit(bytes, data, size);
  const auto indices = decode_plainly(bytes, numel, k, type);
  const auto copy = copy_of(bytes);
  const auto error = check_payload(copy.get(), layout, serial_for);
  CHECK(error.has_value() != indices.has_value());
  if (error) {
    CHECK(!error->field.empty() && !error->expected.empty() && !error->got.empty());
    return 0;
  }
  with_value_type(type, [&]<typename T>(T) { read_accepted<T>(bytes, layout, *indices); });
  ++accepted_inputs;
  return 0;
}
