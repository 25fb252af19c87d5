// Rotary positions on the CPU in AVX-512: one pass, rounded once.
#include <ATen/Parallel.h>

#include <algorithm>

#include "columns_cpu.h"
#include "simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
using simd::load16;
using simd::store16;

template <typename T>
SIMD_TARGET void run(const fused_rotation &args, int64_t first, int64_t end) {
  const int64_t pairs = args.pairs, width = args.heads * 2 * pairs;
  const __m512 sign = _mm512_set1_ps(args.back ? -0.0f : 0.0f);
  for (int64_t row = first; row < end; ++row) {
    const float *cosines = args.turns + row % args.turn_rows * 2 * pairs, *sines = cosines + pairs;
    for (int64_t head = 0; head < args.heads; ++head) {
      const T *x = static_cast<const T *>(args.x) + row * width + head * 2 * pairs;
      T *out = static_cast<T *>(args.out) + row * width + head * 2 * pairs;
      for (int64_t i = 0; i < pairs; i += 16) {
        const int64_t left = pairs - i;
        const __m512 cosine = load16(cosines + i, left), sine = _mm512_xor_ps(load16(sines + i, left), sign);
        const __m512 a = load16(x + i, left), b = load16(x + pairs + i, left);
        store16(out + i, left, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
        store16(out + pairs + i, left, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
      }
    }
  }
}

}  // namespace
#endif

void fused_cpu::rotate(const fused_rotation &args) {
#if SIMD_AVX512
  const auto part = args.dtype == FUSED_F32 ? run<float> : run<BFloat16>;
  const int64_t grain = std::max<int64_t>(1, kGrain / (args.heads * 2 * args.pairs));
  at::parallel_for(0, args.rows, grain, [&](int64_t first, int64_t end) { part(args, first, end); });
#else
  (void)args;
#endif
}
