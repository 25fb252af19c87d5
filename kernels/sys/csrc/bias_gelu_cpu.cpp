// gelu(x + bias), tanh form, on the CPU in AVX-512: the sum is never written, and the backward pass adds up
// the bias's gradient as it goes.
#include "columns_cpu.h"
#include "gelu_simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
using simd::load16;
using simd::store16;

// The sum as it would be, had it been written.
SIMD_INLINE __m512 sum16(const float *x, const float *bias, int64_t len) {
  return _mm512_add_ps(load16(x, len), load16(bias, len));
}
SIMD_INLINE __m512 sum16(const BFloat16 *x, const BFloat16 *bias, int64_t len) {
  const __m512i bits = simd::rounded(_mm512_add_ps(load16(x, len), load16(bias, len)));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}

template <typename T>
SIMD_TARGET void forward_rows(const fused_bias_gelu &args, int64_t first, int64_t end, float *) {
  const T *bias = static_cast<const T *>(args.bias);
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * args.columns;
    T *out = static_cast<T *>(args.out) + row * args.columns;
    for (int64_t i = 0; i < args.columns; i += 16) {
      const int64_t left = args.columns - i;
      store16(out + i, left, gelu_simd::value16(sum16(x + i, bias + i, left)));
    }
  }
}

template <typename T>
SIMD_TARGET void backward_rows(const fused_bias_gelu &args, int64_t first, int64_t end, float *sums) {
  const T *bias = static_cast<const T *>(args.bias);
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * args.columns;
    const T *dout = static_cast<const T *>(args.dout) + row * args.columns;
    T *dx = static_cast<T *>(args.out) + row * args.columns;
    for (int64_t i = 0; i < args.columns; i += 16) {
      const int64_t left = args.columns - i;
      const __m512 derivative = gelu_simd::derivative16(sum16(x + i, bias + i, left));
      const __m512 d = _mm512_mul_ps(load16(dout + i, left), derivative);
      store16(dx + i, left, d);
      if (sums != nullptr) store16(sums + i, left, _mm512_add_ps(load16(sums + i, left), d));
    }
  }
}

}  // namespace
#endif

void fused_cpu::bias_gelu(const fused_bias_gelu &args) {
#if SIMD_AVX512
  const bool is_f32 = args.dtype == FUSED_F32;
  auto rows = is_f32 ? forward_rows<float> : forward_rows<BFloat16>;
  if (args.dout != nullptr) rows = is_f32 ? backward_rows<float> : backward_rows<BFloat16>;
  for_rows(args.rows, args.columns, 1, args.partials,
           [&](int64_t first, int64_t end, float *sums) { rows(args, first, end, sums); });
#else
  (void)args;
#endif
}
