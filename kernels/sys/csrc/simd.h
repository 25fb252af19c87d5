// What the CPU loops share: vectors of AVX-512, and the question whether the CPU has it.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SIMD_AVX512 1
#else
#define SIMD_AVX512 0
#endif

namespace simd {

// Whether the loops below may run: the CPU has the instructions, and ATEN_CPU_CAPABILITY allows them.
bool has_avx512();

#if SIMD_AVX512
// Values that are to stay in registers need loops without an index.
#define SIMD_UNROLL _Pragma("GCC unroll 8")
#define SIMD_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
// Always inlined: the development profile compiles with -O1, which would call them.
#define SIMD_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline)) inline

// Rounded to bf16, in the high half of each word. By hand: the conversion instruction would flush denormals.
SIMD_INLINE __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
}

// 16 values in their order, or the first `len` where there are fewer and zeros behind them.
SIMD_INLINE __mmask16 mask16(int64_t len) { return len >= 16 ? 0xffff : (1u << len) - 1; }
SIMD_INLINE __m512 load16(const float *p, int64_t len) { return _mm512_maskz_loadu_ps(mask16(len), p); }
SIMD_INLINE __m512 load16(const c10::BFloat16 *p, int64_t len) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(len), p)), 16));
}
SIMD_INLINE void store16(float *p, int64_t len, __m512 value) { _mm512_mask_storeu_ps(p, mask16(len), value); }
SIMD_INLINE void store16(c10::BFloat16 *p, int64_t len, __m512 value) {
  _mm256_mask_storeu_epi16(p, mask16(len), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16)));
}

// exp(x) for x <= 0, relative error 1e-7; NaN passes (max returns its second operand).
SIMD_INLINE __m512 exp16(__m512 x) {
  // Below -104 it is 0 in fp32.
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x - whole * ln 2, whose second half fp32 does not hold.
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693147182f), x);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-1.90465421e-9f), r);
  // exp(r) = 1 + r + r^2 q(r) on [-ln(2)/2, ln(2)/2], relative error 4e-9 before rounding.
  __m512 q = _mm512_set1_ps(0.00138145405f);
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.00836874545f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.0416683890f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.166665211f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.499999940f));
  const __m512 e = _mm512_fmadd_ps(_mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f)), r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, whole);
}

// As many elements as fill a register, widened; the first `len` where there are fewer. For loops to which
// the order of elements means nothing.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kVectors = 1;
  static constexpr int64_t kLen = 16;
  SIMD_INLINE static void load(const float *p, int64_t len, __m512 *values) { values[0] = load16(p, len); }
  SIMD_INLINE static void store(float *p, int64_t len, const __m512 *values) { store16(p, len, values[0]); }
  SIMD_INLINE static void put_in_order(__m512 *) {}
};
// Even elements in one vector and odd ones in the other: no lane changes its place.
template <>
struct Lanes<c10::BFloat16> {
  static constexpr int kVectors = 2;
  static constexpr int64_t kLen = 32;
  SIMD_INLINE static __mmask32 mask(int64_t len) { return len >= kLen ? 0xffffffffu : (1u << len) - 1; }
  SIMD_INLINE static void load(const c10::BFloat16 *p, int64_t len, __m512 *values) {
    const __m512i raw = _mm512_maskz_loadu_epi16(mask(len), p);
    values[0] = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    values[1] = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(0xffff0000)));
  }
  SIMD_INLINE static void store(c10::BFloat16 *p, int64_t len, const __m512 *values) {
    const __m512i even = _mm512_srli_epi32(rounded(values[0]), 16);
    _mm512_mask_storeu_epi16(p, mask(len), _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded(values[1])));
  }
  // Even and odd elements to the first 16 and the last 16.
  SIMD_INLINE static void put_in_order(__m512 *values) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 low = _mm512_permutex2var_ps(values[0], first, values[1]);
    values[1] = _mm512_permutex2var_ps(values[0], _mm512_add_epi32(first, _mm512_set1_epi32(8)), values[1]);
    values[0] = low;
  }
};
#endif

}  // namespace simd
