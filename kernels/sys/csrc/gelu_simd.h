// GELU by tanh and its derivative, 16 values at a time: one exponential and one reciprocal, no tanh.
#pragma once
#include "simd.h"

#if SIMD_AVX512
namespace gelu_simd {

// With u = sqrt(2/pi) (x + 0.044715 x^3), (1 + tanh u) / 2 is the sigmoid of 2u. From e = exp(-|2u|) <= 1
// it follows without overflow and, for negative x, without cancellation.
struct Sigmoid {
  __m512 e;
  __m512 inverse;  // 1 / (1 + e)
  __mmask16 negative;
};

SIMD_INLINE Sigmoid sigmoid_2u(__m512 x, __m512 x2) {
  // 2u / ln 2.
  const __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(x2, _mm512_set1_ps(0.10294324f), _mm512_set1_ps(2.3022082f)));
  // Below -200, e is 0 in fp32. NaN passes: max returns its second operand then.
  const __m512 minus = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_or_ps(t, _mm512_set1_ps(-0.0f)));
  const __m512 whole = _mm512_roundscale_ps(minus, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(minus, whole);
  // 2^f on [-1/2, 1/2], relative error 2e-9 before rounding.
  __m512 e = _mm512_set1_ps(1.5345812e-4f);
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.3399931e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(9.618489e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.055503288f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.24022647f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.6931472f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.0f));
  e = _mm512_scalef_ps(e, whole);
  const __m512 sum = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
  // 14 bits and one Newton step.
  const __m512 near = _mm512_rcp14_ps(sum);
  const __m512 inverse = _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2.0f)));
  return {e, inverse, _mm512_movepi32_mask(_mm512_castps_si512(t))};
}

SIMD_INLINE __m512 value16(__m512 x) {
  const Sigmoid s = sigmoid_2u(x, _mm512_mul_ps(x, x));
  return _mm512_mul_ps(_mm512_mask_mul_ps(x, s.negative, x, s.e), s.inverse);
}

SIMD_INLINE __m512 derivative16(__m512 x) {
  // Nothing changes beyond 16, and infinity times 0 is avoided.
  x = _mm512_max_ps(_mm512_set1_ps(-16.0f), _mm512_min_ps(_mm512_set1_ps(16.0f), x));
  const __m512 x2 = _mm512_mul_ps(x, x);
  const Sigmoid s = sigmoid_2u(x, x2);
  // x times the derivative of 2u.
  const __m512 slope =
      _mm512_mul_ps(x, _mm512_fmadd_ps(x2, _mm512_set1_ps(0.21406445f), _mm512_set1_ps(1.5957691f)));
  const __m512 smaller = _mm512_mul_ps(s.e, s.inverse);
  const __m512 value = _mm512_mask_mov_ps(s.inverse, s.negative, smaller);
  return _mm512_fmadd_ps(_mm512_mul_ps(s.inverse, smaller), slope, value);
}

}  // namespace gelu_simd
#endif
