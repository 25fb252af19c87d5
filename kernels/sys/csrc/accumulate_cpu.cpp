// Gradients into the flat buffer of a unit, on the CPU: all of them in one parallel region.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fused.h"
#include "simd.h"

#if SIMD_AVX512
namespace {

using c10::BFloat16;
// Elements of a task: long enough to outweigh its start, short enough that tasks come out even.
constexpr int64_t kTask = 1 << 15;

// fp32 that may hold any NaN: rounding one whose bits are all ones would make it a zero.
SIMD_INLINE __m512 quiet(__m512 value) {
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

template <typename Into, typename Grad>
SIMD_TARGET void range(Into *into, const Grad *grad, int64_t len, bool first) {
  if (first && std::is_same_v<Into, Grad>) {
    std::memcpy(into, grad, static_cast<size_t>(len) * sizeof(Into));
    return;
  }
  for (int64_t i = 0; i < len; i += 16) {
    __m512 value = simd::load16(grad + i, len - i);
    if (!first) value = _mm512_add_ps(simd::load16(into + i, len - i), value);
    if constexpr (std::is_same_v<Into, BFloat16>) value = quiet(value);
    simd::store16(into + i, len - i, value);
  }
}

void task(const fused_pair &pair, int64_t begin, bool first) {
  const int64_t len = std::min(kTask, pair.len - begin);
  const auto run = [&](auto *into, const auto *grad) { range(into + begin, grad + begin, len, first); };
  const auto from = [&](auto *into) {
    if (pair.grad_dtype == FUSED_F32) {
      run(into, static_cast<const float *>(pair.grad));
    } else {
      run(into, static_cast<const BFloat16 *>(pair.grad));
    }
  };
  if (pair.into_dtype == FUSED_F32) {
    from(static_cast<float *>(pair.into));
  } else {
    from(static_cast<BFloat16 *>(pair.into));
  }
}

}  // namespace
#endif

bool fused_cpu::accumulate(const fused_pair *pairs, size_t len, bool first) {
#if SIMD_AVX512
  if (!simd::has_avx512()) return false;
  std::vector<std::pair<const fused_pair *, int64_t>> tasks;
  for (size_t i = 0; i < len; ++i) {
    for (int64_t begin = 0; begin < pairs[i].len; begin += kTask) tasks.emplace_back(pairs + i, begin);
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t from, int64_t end) {
    for (int64_t i = from; i < end; ++i) task(*tasks[i].first, tasks[i].second, first);
  });
  return true;
#else
  (void)pairs, (void)len, (void)first;
  return false;
#endif
}
