// silu(gate) * up on the CPU in AVX-512, and both gradients in one pass.
#include <ATen/Parallel.h>

#include "columns_cpu.h"
#include "simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
using simd::Lanes;

// The sigmoid of x, from an exponential that cannot overflow.
SIMD_INLINE __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = simd::exp16(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
  const __m512 larger = _mm512_div_ps(one, _mm512_add_ps(one, e));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  return _mm512_mask_mul_ps(larger, negative, larger, e);
}

template <typename T>
SIMD_INLINE void forward_lanes(const fused_gated &args, int64_t at, int64_t len) {
  __m512 gate[Lanes<T>::kVectors], up[Lanes<T>::kVectors];
  Lanes<T>::load(static_cast<const T *>(args.gate) + at, len, gate);
  Lanes<T>::load(static_cast<const T *>(args.up) + at, len, up);
  for (int v = 0; v < Lanes<T>::kVectors; ++v) up[v] = _mm512_mul_ps(_mm512_mul_ps(gate[v], sigmoid16(gate[v])), up[v]);
  Lanes<T>::store(static_cast<T *>(args.out) + at, len, up);
}

// silu'(x) = s + x s (1 - s).
template <typename T>
SIMD_INLINE void backward_lanes(const fused_gated &args, int64_t at, int64_t len) {
  __m512 gate[Lanes<T>::kVectors], up[Lanes<T>::kVectors], dout[Lanes<T>::kVectors];
  Lanes<T>::load(static_cast<const T *>(args.gate) + at, len, gate);
  Lanes<T>::load(static_cast<const T *>(args.up) + at, len, up);
  Lanes<T>::load(static_cast<const T *>(args.dout) + at, len, dout);
  for (int v = 0; v < Lanes<T>::kVectors; ++v) {
    const __m512 s = sigmoid16(gate[v]), value = _mm512_mul_ps(gate[v], s);
    const __m512 slope = _mm512_fmadd_ps(value, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
    gate[v] = _mm512_mul_ps(_mm512_mul_ps(dout[v], up[v]), slope);
    up[v] = _mm512_mul_ps(dout[v], value);
  }
  Lanes<T>::store(static_cast<T *>(args.out) + at, len, gate);
  Lanes<T>::store(static_cast<T *>(args.dup) + at, len, up);
}

template <typename T>
SIMD_TARGET void run(const fused_gated &args, int64_t first, int64_t end) {
  constexpr int64_t kLen = Lanes<T>::kLen;
  const bool forward = args.dout == nullptr;
  for (int64_t at = first; at < end; at += kLen) {
    const int64_t len = end - at < kLen ? end - at : kLen;
    forward ? forward_lanes<T>(args, at, len) : backward_lanes<T>(args, at, len);
  }
}

}  // namespace
#endif

void fused_cpu::gated(const fused_gated &args) {
#if SIMD_AVX512
  const auto part = args.dtype == FUSED_F32 ? run<float> : run<BFloat16>;
  at::parallel_for(0, args.len, kGrain, [&](int64_t first, int64_t end) { part(args, first, end); });
#else
  (void)args;
#endif
}
