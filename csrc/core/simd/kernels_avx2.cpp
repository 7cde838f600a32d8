// The kernels for AVX2 with F16C and POPCNT: 8 lanes. The only file compiled for them.
#include <immintrin.h>

#include "kernels_simd.h"

namespace regtopk {
namespace {

// For each 8-bit mask one 4-bit number per lane: the lanes that the mask keeps, in order, and the reverse, which of the
// first lanes goes to each lane that it keeps.
struct LaneTables {
  uint32_t kept[256], spread[256];
};

constexpr LaneTables make_lane_tables() {
  LaneTables tables{};
  for (uint32_t mask = 0; mask < 256; ++mask) {
    uint32_t count = 0;
    for (uint32_t lane = 0; lane < 8; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      tables.kept[mask] |= lane << (4 * count);
      tables.spread[mask] |= count++ << (4 * lane);
    }
  }
  return tables;
}

constexpr LaneTables kLaneTables = make_lane_tables();

struct Avx2 {
  static constexpr int64_t kLanes = 8;
  using Floats = __m256;
  using Keys = __m256i;
  using Mask = __m256i;  // all ones or zero per lane

  static Mask all_lanes() { return _mm256_set1_epi32(-1); }
  static Mask first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < kLanes ? static_cast<int>(count) : 8), lane_numbers());
  }
  static unsigned bits(Mask mask) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask))); }
  static Mask without(Mask mask, Mask other) { return _mm256_andnot_si256(other, mask); }

  static Floats floats(float value) { return _mm256_set1_ps(value); }
  static Keys keys(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static Keys lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Keys as_keys(Floats value) { return _mm256_castps_si256(value); }
  static Floats as_floats(Keys value) { return _mm256_castsi256_ps(value); }

  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static Floats load_first(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
  static Keys load_keys(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Keys load_u16(const uint16_t* from) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static Keys load_first_u16(const uint16_t* from, int64_t count) {
    uint16_t copy[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) copy[lane] = from[lane];
    return load_u16(copy);
  }
  static void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static void store_first(float* to, int64_t count, Floats value) { _mm256_maskstore_ps(to, first_lanes(count), value); }
  static void store_where(float* to, Mask mask, Floats value) { _mm256_maskstore_ps(to, mask, value); }
  static void store_keys(uint32_t* to, Keys value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static __m128i narrow(Keys value) { return _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1)); }
  static void store_u16(uint16_t* to, Keys value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(value)); }
  static void store_first_u16(uint16_t* to, int64_t count, Keys value) {
    uint16_t copy[kLanes];
    store_u16(copy, value);
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = copy[lane];
  }
  static void stream(float* to, Floats value) { _mm256_stream_ps(to, value); }
  static void stream(uint16_t* to, Keys value) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), narrow(value)); }
  static void finish_streaming() { _mm_sfence(); }

  static Floats sum(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Keys sum(Keys a, Keys b) { return _mm256_add_epi32(a, b); }
  static Floats difference(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats quotient(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Keys magnitude(Floats value) { return both(as_keys(value), keys(0x7fffffffu)); }
  static Keys both(Keys a, Keys b) { return _mm256_and_si256(a, b); }
  static Keys either(Keys a, Keys b) { return _mm256_or_si256(a, b); }
  static Keys smaller(Keys a, Keys b) { return _mm256_min_epi32(a, b); }
  static Keys larger(Keys a, Keys b) { return _mm256_max_epi32(a, b); }
  template <int kBits>
  static Keys shift_left(Keys value) {
    return _mm256_slli_epi32(value, kBits);
  }
  template <int kBits>
  static Keys shift_right(Keys value) {
    return _mm256_srli_epi32(value, kBits);
  }

  static Mask above(Keys a, Keys b) { return _mm256_cmpgt_epi32(a, b); }
  static Mask at_least(Keys a, Keys b) { return without(all_lanes(), above(b, a)); }
  static Mask same(Keys a, Keys b) { return _mm256_cmpeq_epi32(a, b); }
  static Floats select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(mask)); }
  static Keys select(Mask mask, Keys yes, Keys no) { return _mm256_blendv_epi8(no, yes, mask); }
  static Keys lanes_of(uint32_t numbers) {
    // Lane numbers in the low 3 bits are all that the permutation looks at.
    return _mm256_srlv_epi32(keys(numbers), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  }
  static Floats compress(unsigned mask, Floats value) { return _mm256_permutevar8x32_ps(value, lanes_of(kLaneTables.kept[mask])); }
  static Keys compress(unsigned mask, Keys value) { return _mm256_permutevar8x32_epi32(value, lanes_of(kLaneTables.kept[mask])); }
  static Floats expand(unsigned mask, Floats value) {
    const Keys bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const Mask kept = same(both(keys(mask), bit_of_lane), bit_of_lane);
    return _mm256_and_ps(_mm256_permutevar8x32_ps(value, lanes_of(kLaneTables.spread[mask])), _mm256_castsi256_ps(kept));
  }

  static Floats widen_half(Keys stored) { return _mm256_cvtph_ps(narrow(stored)); }
  static Keys round_to_half(Floats value) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace

constinit const Kernels kAvx2Float32 = make_kernels<Avx2, Float32>();
constinit const Kernels kAvx2BFloat16 = make_kernels<Avx2, BFloat16>();
constinit const Kernels kAvx2Float16 = make_kernels<Avx2, Float16>();

}  // namespace regtopk
