// gelu(x + bias), tanh form, on the CPU in AVX-512: the sum is never written, and the backward pass adds up
// the bias's gradient as it goes.
#include "columns_cpu.h"
#include "gelu_simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
using simd::Lanes;

// x + bias as it would be, had it been written.
SIMD_INLINE void load_sum(const float *x, const float *bias, int64_t len, __m512 *sum) {
  sum[0] = _mm512_add_ps(simd::load16(x, len), simd::load16(bias, len));
}
SIMD_INLINE void load_sum(const BFloat16 *x, const BFloat16 *bias, int64_t len, __m512 *sum) {
  __m512 biases[2];
  Lanes<BFloat16>::load(x, len, sum);
  Lanes<BFloat16>::load(bias, len, biases);
  for (int v = 0; v < 2; ++v) {
    const __m512i bits = simd::rounded(_mm512_add_ps(sum[v], biases[v]));
    sum[v] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
  }
}

template <typename T>
SIMD_INLINE void forward_lanes(const T *x, const T *bias, T *out, int64_t len) {
  __m512 values[Lanes<T>::kVectors];
  load_sum(x, bias, len, values);
  for (__m512 &value : values) value = gelu_simd::value16(value);
  Lanes<T>::store(out, len, values);
}

// `sums`, where it is not null, takes a whole register's sums in the order of Lanes, whatever `len` is.
template <typename T>
SIMD_INLINE void backward_lanes(const T *dout, const T *x, const T *bias, T *dx, int64_t len, float *sums) {
  __m512 values[Lanes<T>::kVectors], grads[Lanes<T>::kVectors];
  load_sum(x, bias, len, values);
  Lanes<T>::load(dout, len, grads);
  for (int v = 0; v < Lanes<T>::kVectors; ++v) {
    grads[v] = _mm512_mul_ps(grads[v], gelu_simd::derivative16(values[v]));
    if (sums != nullptr) _mm512_storeu_ps(sums + v * 16, _mm512_add_ps(_mm512_loadu_ps(sums + v * 16), grads[v]));
  }
  Lanes<T>::store(dx, len, grads);
}

template <typename T>
SIMD_TARGET void forward_rows(const fused_bias_gelu &args, int64_t first, int64_t end, float *) {
  const T *bias = static_cast<const T *>(args.bias);
  const int64_t columns = args.columns, whole = columns / Lanes<T>::kLen * Lanes<T>::kLen;
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * columns;
    T *out = static_cast<T *>(args.out) + row * columns;
    for (int64_t i = 0; i < whole; i += Lanes<T>::kLen) forward_lanes(x + i, bias + i, out + i, Lanes<T>::kLen);
    if (whole < columns) forward_lanes(x + whole, bias + whole, out + whole, columns - whole);
  }
}

template <typename T>
SIMD_TARGET void backward_rows(const fused_bias_gelu &args, int64_t first, int64_t end, float *sums) {
  constexpr int64_t kLen = Lanes<T>::kLen;
  const T *bias = static_cast<const T *>(args.bias);
  const int64_t columns = args.columns, whole = columns / kLen * kLen;
  // Of the columns that do not fill a register; behind the last one dout is 0, and so is the sum.
  float last[kLen] = {};
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * columns;
    const T *dout = static_cast<const T *>(args.dout) + row * columns;
    T *dx = static_cast<T *>(args.out) + row * columns;
    for (int64_t i = 0; i < whole; i += kLen) {
      backward_lanes(dout + i, x + i, bias + i, dx + i, kLen, sums == nullptr ? nullptr : sums + i);
    }
    if (whole < columns) {
      backward_lanes(dout + whole, x + whole, bias + whole, dx + whole, columns - whole,
                     sums == nullptr ? nullptr : last);
    }
  }
  if (sums == nullptr) return;
  for (int64_t i = 0; i < columns; i += kLen) {
    const float *from = i < whole ? sums + i : last;
    __m512 values[Lanes<T>::kVectors];
    for (int v = 0; v < Lanes<T>::kVectors; ++v) values[v] = _mm512_loadu_ps(from + v * 16);
    Lanes<T>::put_in_order(values);
    for (int64_t v = 0; v < Lanes<T>::kVectors && i + v * 16 < columns; ++v) {
      simd::store16(sums + i + v * 16, columns - i - v * 16, values[v]);
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
