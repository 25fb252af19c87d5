// Partial sums over rows to one sum, on the CPU: `fused_cpu::sum_parts` of fused.h.
#include "columns_cpu.h"

#include "simd.h"

namespace {

using c10::BFloat16;
constexpr int64_t kColumns = 256;  // of a task

// `partials` and `out` begin at the first of `count` columns.
template <typename T>
void sum_plain(const float *partials, int64_t parts, int64_t stride, int64_t count, T *out) {
  float total[kColumns] = {};
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < count; ++i) total[i] += partials[part * stride + i];
  }
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(total[i]);
}

#if SIMD_AVX512
template <typename T>
SIMD_TARGET void sum_avx512(const float *partials, int64_t parts, int64_t stride, int64_t count, T *out) {
  for (int64_t i = 0; i < count; i += 16) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t part = 0; part < parts; ++part) {
      total = _mm512_add_ps(total, simd::load16(partials + part * stride + i, count - i));
    }
    simd::store16(out + i, count - i, total);
  }
}
#endif

template <typename T>
void sum_of(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs) {
  auto sum = sum_plain<T>;
#if SIMD_AVX512
  if (simd::has_avx512()) sum = sum_avx512<T>;
#endif
  const int64_t tasks = (columns + kColumns - 1) / kColumns;
  at::parallel_for(0, sums * tasks, std::max<int64_t>(1, fused_cpu::kGrain / (kColumns * parts)),
                   [&](int64_t first, int64_t end) {
                     for (int64_t task = first; task < end; ++task) {
                       const int64_t which = task / tasks, column = task % tasks * kColumns;
                       sum(partials + which * columns + column, parts, sums * columns,
                           std::min(kColumns, columns - column), static_cast<T *>(outs[which]) + column);
                     }
                   });
}

}  // namespace

void fused_cpu::sum_parts(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs,
                          fused_dtype dtype) {
  if (dtype == FUSED_F32) {
    sum_of<float>(partials, parts, sums, columns, outs);
  } else {
    sum_of<BFloat16>(partials, parts, sums, columns, outs);
  }
}
