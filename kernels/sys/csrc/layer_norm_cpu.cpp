// Layer norm, and RMS norm, on the CPU in AVX-512. A row stays in the first-level cache between its passes, and the backward
// pass makes all three gradients at once, where libtorch's reads its tensors twice.
#include <cmath>

#include "columns_cpu.h"
#include "simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
using simd::load16;
using simd::mask16;
using simd::store16;

// Of four chains of sums, so that they do not wait for one another.
SIMD_INLINE float reduce(const __m512 *sums) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

template <typename T>
SIMD_INLINE float mean_of(const T *x, int64_t columns) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] = _mm512_add_ps(sums[v], load16(x + i + v * 16, 16));
  }
  for (; i < columns; i += 16) sums[0] = _mm512_add_ps(sums[0], load16(x + i, columns - i));
  return reduce(sums) / static_cast<float>(columns);
}

template <typename T>
SIMD_INLINE float variance_of(const T *x, int64_t columns, __m512 mean) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 apart = _mm512_sub_ps(load16(x + i + v * 16, 16), mean);
      sums[v] = _mm512_fmadd_ps(apart, apart, sums[v]);
    }
  }
  for (; i < columns; i += 16) {
    const __m512 apart = _mm512_maskz_sub_ps(mask16(columns - i), load16(x + i, columns - i), mean);
    sums[0] = _mm512_fmadd_ps(apart, apart, sums[0]);
  }
  return reduce(sums) / static_cast<float>(columns);
}

template <typename T, bool RMS>
SIMD_TARGET void forward_rows(const fused_layer_norm &args, int64_t first, int64_t end) {
  const T *weight = static_cast<const T *>(args.weight), *bias = static_cast<const T *>(args.bias);
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * args.columns;
    T *out = static_cast<T *>(args.out) + row * args.columns;
    const __m512 mean = RMS ? _mm512_setzero_ps() : _mm512_set1_ps(args.mean[row] = mean_of(x, args.columns));
    const float variance = variance_of(x, args.columns, mean);
    args.rstd[row] = 1.0f / std::sqrt(variance + static_cast<float>(args.epsilon));
    const __m512 rstd = _mm512_set1_ps(args.rstd[row]);
    for (int64_t i = 0; i < args.columns; i += 16) {
      const int64_t left = args.columns - i;
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load16(x + i, left), mean), rstd);
      const __m512 scale = load16(weight + i, left);
      store16(out + i, left,
              RMS ? _mm512_mul_ps(normed, scale) : _mm512_fmadd_ps(normed, scale, load16(bias + i, left)));
    }
  }
}

// With g = dout * weight and xhat = (x - mean) * rstd: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).
// Of RMS norm, mean and mean(g) count as 0. `sums` takes dweight and dbias, where it is not null. Behind the last
// column dout is 0, and so are all sums.
template <typename T, bool RMS>
SIMD_TARGET void backward_rows(const fused_layer_norm_grad &args, int64_t first, int64_t end, float *sums) {
  const int64_t columns = args.columns;
  const T *weight = static_cast<const T *>(args.weight);
  for (int64_t row = first; row < end; ++row) {
    const T *x = static_cast<const T *>(args.x) + row * columns;
    const T *dout = static_cast<const T *>(args.dout) + row * columns;
    T *dx = static_cast<T *>(args.dx) + row * columns;
    const __m512 mean = RMS ? _mm512_setzero_ps() : _mm512_set1_ps(args.mean[row]);
    const __m512 rstd = _mm512_set1_ps(args.rstd[row]);
    __m512 sum_g = _mm512_setzero_ps(), sum_g_xhat = _mm512_setzero_ps();
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t left = columns - i;
      const __m512 d = load16(dout + i, left), g = _mm512_mul_ps(d, load16(weight + i, left));
      const __m512 xhat = _mm512_mul_ps(_mm512_sub_ps(load16(x + i, left), mean), rstd);
      sum_g = _mm512_add_ps(sum_g, g);
      sum_g_xhat = _mm512_fmadd_ps(g, xhat, sum_g_xhat);
      if (sums != nullptr) {
        float *dweight = sums + i;
        store16(dweight, left, _mm512_fmadd_ps(d, xhat, load16(dweight, left)));
        if (!RMS) {
          float *dbias = sums + columns + i;
          store16(dbias, left, _mm512_add_ps(load16(dbias, left), d));
        }
      }
    }
    const float count = static_cast<float>(columns);
    const __m512 mean_g = RMS ? _mm512_setzero_ps() : _mm512_set1_ps(_mm512_reduce_add_ps(sum_g) / count);
    const __m512 mean_g_xhat = _mm512_set1_ps(_mm512_reduce_add_ps(sum_g_xhat) / count);
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t left = columns - i;
      const __m512 g = _mm512_mul_ps(load16(dout + i, left), load16(weight + i, left));
      const __m512 xhat = _mm512_mul_ps(_mm512_sub_ps(load16(x + i, left), mean), rstd);
      const __m512 centred = _mm512_fnmadd_ps(xhat, mean_g_xhat, _mm512_sub_ps(g, mean_g));
      store16(dx + i, left, _mm512_mul_ps(rstd, centred));
    }
  }
}

}  // namespace
#endif

void fused_cpu::layer_norm(const fused_layer_norm &args) {
#if SIMD_AVX512
  const bool is_f32 = args.dtype == FUSED_F32;
  auto rows = is_f32 ? forward_rows<float, false> : forward_rows<BFloat16, false>;
  if (args.bias == nullptr) rows = is_f32 ? forward_rows<float, true> : forward_rows<BFloat16, true>;
  for_rows(args.rows, args.columns, 0, nullptr,
           [&](int64_t first, int64_t end, float *) { rows(args, first, end); });
#else
  (void)args;
#endif
}

void fused_cpu::layer_norm_grad(const fused_layer_norm_grad &args) {
#if SIMD_AVX512
  const bool is_f32 = args.dtype == FUSED_F32, is_rms = args.mean == nullptr;
  auto rows = is_f32 ? backward_rows<float, false> : backward_rows<BFloat16, false>;
  if (is_rms) rows = is_f32 ? backward_rows<float, true> : backward_rows<BFloat16, true>;
  for_rows(args.rows, args.columns, is_rms ? 1 : 2, args.partials,
           [&](int64_t first, int64_t end, float *sums) { rows(args, first, end, sums); });
#else
  (void)args;
#endif
}
