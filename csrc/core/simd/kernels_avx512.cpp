// The kernels for AVX-512 (F, BW, VL, DQ): 16 lanes. The only file compiled for it.
#include <immintrin.h>

#include "kernels_simd.h"

namespace regtopk {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16;
  using Floats = __m512;
  using Keys = __m512i;
  using Mask = __mmask16;

  static Mask all_lanes() { return 0xffff; }
  static Mask first_lanes(int64_t count) { return count >= kLanes ? all_lanes() : static_cast<Mask>((1u << count) - 1); }
  static unsigned bits(Mask mask) { return mask; }
  static Mask without(Mask mask, Mask other) { return static_cast<Mask>(mask & ~other); }

  static Floats floats(float value) { return _mm512_set1_ps(value); }
  static Keys keys(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static Keys lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static Keys as_keys(Floats value) { return _mm512_castps_si512(value); }
  static Floats as_floats(Keys value) { return _mm512_castsi512_ps(value); }

  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
  static Keys load_keys(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static Keys load_u16(const uint16_t* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static Keys load_first_u16(const uint16_t* from, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from));
  }
  static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static void store_first(float* to, int64_t count, Floats value) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }
  static void store_where(float* to, Mask mask, Floats value) { _mm512_mask_storeu_ps(to, mask, value); }
  static void store_keys(uint32_t* to, Keys value) { _mm512_storeu_si512(to, value); }
  static void store_u16(uint16_t* to, Keys value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(value)); }
  static void store_first_u16(uint16_t* to, int64_t count, Keys value) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), _mm512_cvtepi32_epi16(value));
  }
  static void stream(float* to, Floats value) { _mm512_stream_ps(to, value); }
  static void stream(uint16_t* to, Keys value) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(value)); }
  static void finish_streaming() { _mm_sfence(); }

  static Floats sum(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Keys sum(Keys a, Keys b) { return _mm512_add_epi32(a, b); }
  static Floats difference(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats quotient(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Keys magnitude(Floats value) { return both(as_keys(value), keys(0x7fffffffu)); }
  static Keys both(Keys a, Keys b) { return _mm512_and_si512(a, b); }
  static Keys either(Keys a, Keys b) { return _mm512_or_si512(a, b); }
  static Keys smaller(Keys a, Keys b) { return _mm512_min_epi32(a, b); }
  static Keys larger(Keys a, Keys b) { return _mm512_max_epi32(a, b); }
  template <int kBits>
  static Keys shift_left(Keys value) {
    return _mm512_slli_epi32(value, kBits);
  }
  template <int kBits>
  static Keys shift_right(Keys value) {
    return _mm512_srli_epi32(value, kBits);
  }

  static Mask at_least(Keys a, Keys b) { return _mm512_cmpge_epi32_mask(a, b); }
  static Mask above(Keys a, Keys b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static Mask same(Keys a, Keys b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static Keys select(Mask mask, Keys yes, Keys no) { return _mm512_mask_blend_epi32(mask, no, yes); }
  static Floats compress(unsigned mask, Floats value) { return _mm512_maskz_compress_ps(static_cast<Mask>(mask), value); }
  static Keys compress(unsigned mask, Keys value) { return _mm512_maskz_compress_epi32(static_cast<Mask>(mask), value); }
  static Floats expand(unsigned mask, Floats value) { return _mm512_maskz_expand_ps(static_cast<Mask>(mask), value); }

  static Floats widen_half(Keys stored) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(stored)); }
  static Keys round_to_half(Floats value) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace

constinit const Kernels kAvx512Float32 = make_kernels<Avx512, Float32>();
constinit const Kernels kAvx512BFloat16 = make_kernels<Avx512, BFloat16>();
constinit const Kernels kAvx512Float16 = make_kernels<Avx512, Float16>();

}  // namespace regtopk
