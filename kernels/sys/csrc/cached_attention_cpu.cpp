// The loops of cached_attention.h: a softmax that is corrected as larger scores come (Milakov and Gimelshein 2018), over
// blocks of 16 tokens, for a few queries that share keys and values.
// Floor: the bytes of the keys and values once for every kQueries queries of a head.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cached_attention.h"
#include "simd.h"

#if SIMD_AVX512

namespace {

constexpr int64_t kQueries = 4;  // that share a reading of keys and values
constexpr int64_t kMostVectors = 16;

// Queries of one key-value head of one run; number i is of token i / group and of head i % group of the head's.
struct Part {
  const cached_run *run;
  int64_t kv_head, first, end;
};

template <typename T>
void keep(const cached_attention &a, const cached_run &run) {
  const int64_t c = a.head_dim, width = (a.heads + 2 * a.kv_heads) * c;
  for (int64_t t = 0; t < run.tokens; ++t) {
    const T *keys = static_cast<const T *>(a.qkv) + (run.first + t) * width + a.heads * c;
    const T *values = keys + a.kv_heads * c;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t at = (head * run.capacity + run.cached + t) * c;
      std::memcpy(static_cast<T *>(run.k) + at, keys + head * c, c * sizeof(T));
      std::memcpy(static_cast<T *>(run.v) + at, values + head * c, c * sizeof(T));
    }
  }
}

// QUERIES queries from number `first` of the part on. `scratch`: QUERIES x head_dim floats for them, as many for results.
template <typename T, int QUERIES>
SIMD_TARGET void attend(const cached_attention &a, const Part &part, int64_t first, float *scratch) {
  const cached_run &run = *part.run;
  const int64_t c = a.head_dim, group = a.heads / a.kv_heads, width = (a.heads + 2 * a.kv_heads) * c;
  const auto *keys = static_cast<const T *>(run.k) + part.kv_head * run.capacity * c;
  const auto *values = static_cast<const T *>(run.v) + part.kv_head * run.capacity * c;
  const float scale = 1.0f / std::sqrt(static_cast<float>(c));
  float *queries = scratch, *results = scratch + QUERIES * c;
  int64_t sees[QUERIES], most = 0;
  for (int q = 0; q < QUERIES; ++q) {
    const int64_t token = (first + q) / group, head = part.kv_head * group + (first + q) % group;
    const T *from = static_cast<const T *>(a.qkv) + (run.first + token) * width + head * c;
    for (int64_t i = 0; i < c; i += 16)
      simd::store16(queries + q * c + i, 16, _mm512_mul_ps(simd::load16(from + i, 16), _mm512_set1_ps(scale)));
    sees[q] = run.cached + token + 1;
    most = std::max(most, sees[q]);
  }
  std::memset(results, 0, QUERIES * c * sizeof(float));
  float largest[QUERIES], total[QUERIES];
  for (int q = 0; q < QUERIES; ++q) largest[q] = -INFINITY, total[q] = 0.0f;
  for (int64_t s = 0; s < most; s += 16) {
    const int64_t count = std::min<int64_t>(16, most - s);
    alignas(64) float weights[QUERIES][16];
    for (int64_t j = 0; j < count; ++j) {
      __m512 sum[QUERIES];
      SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) sum[q] = _mm512_setzero_ps();
      for (int64_t i = 0; i < c; i += 16) {
        const __m512 key = simd::load16(keys + (s + j) * c + i, 16);
        SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) sum[q] = _mm512_fmadd_ps(key, _mm512_loadu_ps(queries + q * c + i), sum[q]);
      }
      SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) weights[q][j] = _mm512_reduce_add_ps(sum[q]);
    }
    for (int q = 0; q < QUERIES; ++q) {
      // Tokens behind it weigh nothing.
      const __mmask16 seen = simd::mask16(std::clamp<int64_t>(sees[q] - s, 0, count));
      if (seen == 0) {
        _mm512_store_ps(weights[q], _mm512_setzero_ps());
        continue;
      }
      const __m512 scores = _mm512_load_ps(weights[q]);
      const float now = std::max(largest[q], _mm512_mask_reduce_max_ps(seen, scores));
      if (now > largest[q] && s > 0) {
        const float factor = std::exp(largest[q] - now);
        total[q] *= factor;
        for (int64_t i = 0; i < c; i += 16) {
          float *at = results + q * c + i;
          _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(factor)));
        }
      }
      largest[q] = now;
      const __m512 exponents = _mm512_sub_ps(scores, _mm512_set1_ps(now));
      const __m512 weight = _mm512_maskz_mov_ps(seen, simd::exp16(exponents));
      total[q] += _mm512_reduce_add_ps(weight);
      _mm512_store_ps(weights[q], weight);
    }
    for (int64_t i = 0; i < c; i += 16) {
      __m512 sum[QUERIES];
      SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) sum[q] = _mm512_loadu_ps(results + q * c + i);
      for (int64_t j = 0; j < count; ++j) {
        const __m512 value = simd::load16(values + (s + j) * c + i, 16);
        SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) sum[q] = _mm512_fmadd_ps(value, _mm512_set1_ps(weights[q][j]), sum[q]);
      }
      SIMD_UNROLL for (int q = 0; q < QUERIES; ++q) _mm512_storeu_ps(results + q * c + i, sum[q]);
    }
  }
  for (int q = 0; q < QUERIES; ++q) {
    const int64_t token = (first + q) / group, head = part.kv_head * group + (first + q) % group;
    T *to = static_cast<T *>(a.out) + (run.first + token) * a.heads * c + head * c;
    const __m512 inverse = _mm512_set1_ps(1.0f / total[q]);
    for (int64_t i = 0; i < c; i += 16)
      simd::store16(to + i, 16, _mm512_mul_ps(_mm512_loadu_ps(results + q * c + i), inverse));
  }
}

template <typename T>
void attend_part(const cached_attention &a, const Part &part, float *scratch) {
  int64_t first = part.first;
  for (; first + kQueries <= part.end; first += kQueries) attend<T, kQueries>(a, part, first, scratch);
  for (; first < part.end; ++first) attend<T, 1>(a, part, first, scratch);
}

template <typename T>
void run_all(const cached_attention &a) {
  const int64_t group = a.heads / a.kv_heads;
  std::vector<Part> parts;
  for (int64_t r = 0; r < a.runs; ++r) {
    keep<T>(a, a.run[r]);
    const int64_t queries = a.run[r].tokens * group;
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t first = 0; first < queries; first += kQueries)
        parts.push_back({&a.run[r], head, first, std::min(first + kQueries, queries)});
  }
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t end) {
    std::vector<float> scratch(2 * kQueries * a.head_dim);
    for (int64_t i = first; i < end; ++i) attend_part<T>(a, parts[i], scratch.data());
  });
}

}  // namespace

bool cached_attention_cpu(const cached_attention &a) {
  if (!simd::has_avx512() || a.head_dim % 16 != 0 || a.head_dim > 16 * kMostVectors) return false;
  a.dtype == FUSED_F32 ? run_all<float>(a) : run_all<c10::BFloat16>(a);
  return true;
}

#else

bool cached_attention_cpu(const cached_attention &) { return false; }

#endif
