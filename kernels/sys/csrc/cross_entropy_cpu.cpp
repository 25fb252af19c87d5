// Cross-entropy over logits on the CPU: each row is read from memory once and written once, between which it
// stays in the second-level cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "fused.h"
#include "simd.h"

namespace {

using c10::BFloat16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// fp32 at a multiple of 64 bytes.
struct Free {
  void operator()(float *p) const { ::operator delete[](p, std::align_val_t(64)); }
};
std::unique_ptr<float, Free> take(int64_t len) {
  return std::unique_ptr<float, Free>(
      static_cast<float *>(::operator new[](static_cast<size_t>(len) * sizeof(float), std::align_val_t(64))));
}

template <typename T>
T *row_at(const fused_cross_entropy &args, int64_t row) {
  return static_cast<T *>(args.logits) + row * args.vocab;
}

// Maximum and sum of exp(x - maximum).
struct Normaliser {
  float most, sum;
};

// The gradient of the target's own logit and the row's loss; `x` is that logit as it was.
template <typename T>
void finish_row(const Normaliser &n, float x, T *target, float *loss) {
  *loss = std::log(n.sum) - (x - n.most);
  *target = static_cast<T>(std::exp(x - n.most) / n.sum - 1.0f);
}

template <typename T>
void row_plain(T *row, int64_t vocab, int64_t target, float *loss, float *) {
  const float x = static_cast<float>(row[target]);
  Normaliser n{-kInfinity, 0.0f};
  for (int64_t i = 0; i < vocab; ++i) n.most = std::max(n.most, static_cast<float>(row[i]));
  double sum = 0.0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<float>(row[i]) - n.most);
  n.sum = static_cast<float>(sum);
  for (int64_t i = 0; i < vocab; ++i) {
    row[i] = static_cast<T>(std::exp(static_cast<float>(row[i]) - n.most) / n.sum);
  }
  finish_row(n, x, row + target, loss);
}

#if SIMD_AVX512
using simd::exp16;
using simd::Lanes;

// Steps of four vectors at least, so that their maxima and sums do not wait for one another.
template <typename T>
constexpr int kUnrolled = 4 / Lanes<T>::kVectors;

// `whole` elements are a multiple of a step; what is left is done one by one.
template <typename T>
SIMD_INLINE float maximum(const T *row, int64_t whole, int64_t vocab) {
  __m512 most[4];
  for (__m512 &m : most) m = _mm512_set1_ps(-kInfinity);
  for (int64_t i = 0; i < whole; i += kUnrolled<T> * Lanes<T>::kLen) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int u = 0; u < kUnrolled<T>; ++u) {
      Lanes<T>::load(row + i + u * Lanes<T>::kLen, Lanes<T>::kLen, x + u * Lanes<T>::kVectors);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) most[v] = _mm512_max_ps(x[v], most[v]);
  }
  float result =
      _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
  for (int64_t i = whole; i < vocab; ++i) result = std::max(result, static_cast<float>(row[i]));
  return result;
}

// exp(x - most) into `exps`, in the order of Lanes, and their sum.
template <typename T>
SIMD_INLINE float exponentials(const T *row, int64_t whole, int64_t vocab, float most, float *exps) {
  // Sums of sums: the rounding error of a long one would be larger than that of an exponential.
  constexpr int64_t kBlock = 1024;
  const __m512 most16 = _mm512_set1_ps(most);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t block = 0; block < whole; block += kBlock) {
    __m512 sums[4];
    for (__m512 &s : sums) s = _mm512_setzero_ps();
    const int64_t end = std::min(block + kBlock, whole);
    for (int64_t i = block; i < end; i += kUnrolled<T> * Lanes<T>::kLen) {
      __m512 x[4];
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled<T>; ++u) {
        Lanes<T>::load(row + i + u * Lanes<T>::kLen, Lanes<T>::kLen, x + u * Lanes<T>::kVectors);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512 e = exp16(_mm512_sub_ps(x[v], most16));
        _mm512_storeu_ps(exps + i + v * 16, e);
        sums[v] = _mm512_add_ps(sums[v], e);
      }
    }
    sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  }
  float result = _mm512_reduce_add_ps(sum);
  for (int64_t i = whole; i < vocab; ++i) {
    exps[i] = std::exp(static_cast<float>(row[i]) - most);
    result += exps[i];
  }
  return result;
}

template <typename T>
SIMD_TARGET void row_avx512(T *row, int64_t vocab, int64_t target, float *loss, float *scratch) {
  // fp32 exponentials lie where their logits did.
  float *exps;
  if constexpr (std::is_same_v<T, float>) {
    exps = row;
  } else {
    exps = scratch;
  }
  const float x = static_cast<float>(row[target]);
  const int64_t whole = vocab / 64 * 64;
  Normaliser n{};
  n.most = maximum(row, whole, vocab);
  n.sum = exponentials(row, whole, vocab, n.most, exps);
  const float inverse = 1.0f / n.sum;
  const __m512 inverse16 = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < whole; i += Lanes<T>::kLen) {
    __m512 p[Lanes<T>::kVectors];
    for (int v = 0; v < Lanes<T>::kVectors; ++v) p[v] = _mm512_mul_ps(_mm512_loadu_ps(exps + i + v * 16), inverse16);
    Lanes<T>::store(row + i, Lanes<T>::kLen, p);
  }
  for (int64_t i = whole; i < vocab; ++i) row[i] = static_cast<T>(exps[i] * inverse);
  finish_row(n, x, row + target, loss);
}
#endif

template <typename T>
void rows_of(const fused_cross_entropy &args) {
  auto row_of = row_plain<T>;
#if SIMD_AVX512
  if (simd::has_avx512()) row_of = row_avx512<T>;
#endif
  at::parallel_for(0, args.rows, 1, [&](int64_t first, int64_t end) {
    const auto scratch = take(std::is_same_v<T, float> ? 0 : args.vocab);
    for (int64_t i = first; i < end; ++i) {
      T *row = row_at<T>(args, i);
      if (args.targets[i] == args.ignored) {
        std::fill(row, row + args.vocab, static_cast<T>(0.0f));
        args.losses[i] = 0.0f;
      } else {
        row_of(row, args.vocab, args.targets[i], args.losses + i, scratch.get());
      }
    }
  });
}

}  // namespace

void fused_cpu::softmax_cross_entropy(const fused_cross_entropy &args) {
  if (args.dtype == FUSED_F32) {
    rows_of<float>(args);
  } else {
    rows_of<BFloat16>(args);
  }
}
