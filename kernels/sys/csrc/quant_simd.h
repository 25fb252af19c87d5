// The inner loops of 4-bit quantisation in AVX-512. A function returns false where the CPU lacks it or
// a block does not suit it; the plain loops of quant_cpu.cpp then do the work, to the same bits.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "quant.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define QUANT_AVX512 1
#else
#define QUANT_AVX512 0
#endif

namespace quant_simd {

// A 4-bit code: its values, and for searching the midpoints between its sorted values.
struct Table4 {
  float values[16];
  float bounds[16];  // 15 midpoints, ascending, and one that nothing exceeds
  int32_t order[16]; // code of the i-th smallest value
};

inline Table4 make_table4(const std::array<float, 16> &values) {
  Table4 table;
  std::copy(values.begin(), values.end(), table.values);
  for (int i = 0; i < 16; ++i) table.order[i] = i;
  std::stable_sort(table.order, table.order + 16, [&](int a, int b) { return values[a] < values[b]; });
  for (int i = 0; i < 15; ++i) table.bounds[i] = (values[table.order[i]] + values[table.order[i + 1]]) / 2;
  table.bounds[15] = INFINITY;
  return table;
}

inline const Table4 &table4(quant_code code) {
  // Quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
  static const Table4 nf4 = make_table4(
      {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
       -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
       0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
       0.7229568362236023f, 1.0f});
  // Sign, two bits of exponent, one of fraction; the largest is 12.
  static const Table4 fp4 = make_table4({0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12,
                                         3.0f / 12, 0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12,
                                         -2.0f / 12, -3.0f / 12});
  return code == QUANT_NF4 ? nf4 : fp4;
}

#if QUANT_AVX512
#define QUANT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
}

QUANT_TARGET inline __m512 load16(const float *p) { return _mm512_loadu_ps(p); }
QUANT_TARGET inline __m512 load16(const c10::BFloat16 *p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// A full block of a multiple of 16 weights.
template <typename T>
QUANT_TARGET bool quantize_4bit_avx512(const Table4 &table, const T *values, int64_t len, uint8_t *codes,
                                       float *absmax) {
  __m512 most16 = _mm512_setzero_ps();
  for (int64_t i = 0; i < len; i += 16) most16 = _mm512_max_ps(most16, _mm512_abs_ps(load16(values + i)));
  const float most = _mm512_reduce_max_ps(most16);
  *absmax = most;
  const __m512 inverse = _mm512_set1_ps(1.0f / std::max(most, static_cast<float>(1e-38)));
  const __m512 one = _mm512_set1_ps(1.0f), minus_one = _mm512_set1_ps(-1.0f);
  const __m512 bounds = _mm512_loadu_ps(table.bounds);
  const __m512i order = _mm512_loadu_si512(table.order);
  for (int64_t i = 0; i < len; i += 16) {
    const __m512 scaled =
        _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(load16(values + i), inverse), one), minus_one);
    // Binary search: how many midpoints lie below.
    __m512i below = _mm512_setzero_si512();
    for (int half = 8; half > 0; half /= 2) {
      const __m512i probe = _mm512_add_epi32(below, _mm512_set1_epi32(half - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(probe, bounds), _CMP_GT_OQ);
      below = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(half));
    }
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(below, order));
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(codes + i / 2), _mm_packus_epi16(pairs, pairs));
  }
  return true;
}

// 16 products of one scale, rounded to bf16 as bitsandbytes' build for this CPU rounds them: the
// instruction takes denormals for zeros.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) inline __m256i round16_native(__m512 values) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
}
QUANT_TARGET inline __m256i round16_plain(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// The block's 16 possible values fit one register: each weight is one lane of a permutation. With `past_caches`
// finish_stores() orders what is written: a weight may be far larger than the caches, and reading its old values first
// would double the traffic.
QUANT_TARGET inline bool dequantize_4bit_avx512(const Table4 &table, float scale, const uint8_t *codes,
                                                int64_t len, c10::BFloat16 *out, bool past_caches) {
  static const bool native = __builtin_cpu_supports("avx512bf16");
  const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(table.values), _mm512_set1_ps(scale));
  const __m512i values = _mm512_castsi256_si512(native ? round16_native(products) : round16_plain(products));
  const __m512i low_mask = _mm512_set1_epi32(0x000f0000);
  const bool aligned = past_caches && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int64_t i = 0; i < len; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i / 2));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    // First weight in the low word, second in the high one: the order in memory.
    const __m512i low = _mm512_and_si512(_mm512_slli_epi32(wide, 16), low_mask);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), low);
    const __m512i result = _mm512_permutexvar_epi16(index, values);
    if (aligned) {
      _mm512_stream_si512(reinterpret_cast<__m512i *>(out + i), result);
    } else {
      _mm512_storeu_si512(out + i, result);
    }
  }
  return true;
}
QUANT_TARGET inline bool dequantize_4bit_avx512(const Table4 &table, float scale, const uint8_t *codes,
                                                int64_t len, float *out, bool) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(table.values), _mm512_set1_ps(scale));
  for (int64_t i = 0; i < len; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i / 2));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low));
    const __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low));
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(first, values));
    _mm512_storeu_ps(out + i + 16, _mm512_permutexvar_ps(second, values));
  }
  return true;
}
#endif

// What this thread has streamed is there for others.
inline void finish_stores() {
#if QUANT_AVX512
  _mm_sfence();
#endif
}

template <typename T>
bool quantize_4bit(const Table4 &table, const T *values, int64_t len, uint8_t *codes, float *absmax) {
#if QUANT_AVX512
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>) {
    if (len % 16 == 0 && has_avx512()) return quantize_4bit_avx512(table, values, len, codes, absmax);
  }
#endif
  return false;
}

template <typename T>
bool dequantize_4bit(const Table4 &table, float scale, const uint8_t *codes, int64_t len, T *out,
                     bool past_caches = true) {
#if QUANT_AVX512
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>) {
    if (len % 32 == 0 && has_avx512()) return dequantize_4bit_avx512(table, scale, codes, len, out, past_caches);
  }
#endif
  return false;
}

}  // namespace quant_simd
