// The inner loops of attention's backward pass in AVX-512; attention_cpu.cpp has the algorithm.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ATTENTION_AVX512 1
#else
#define ATTENTION_AVX512 0
#endif

#if ATTENTION_AVX512
namespace attention_simd {

using c10::BFloat16;

// Always inlined: the development profile compiles with -O1, which would call them.
#define ATTENTION_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define ATTENTION_INLINE \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline)) inline

constexpr int64_t kKeys = 64;      // of a key tile: the widest packed operand that brgemm takes
constexpr int64_t kQueries = 256;  // of a query tile; many, so that one product is long

// Rows of one (batch, head), `stride` elements apart.
struct Rows {
  BFloat16 *data;
  int64_t stride;
  BFloat16 *row(int64_t i) const { return data + i * stride; }
};

ATTENTION_INLINE __m256i load_half(const BFloat16 *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
ATTENTION_INLINE __m512 widen(const BFloat16 *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
}
ATTENTION_INLINE void store_rounded(BFloat16 *p, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// 16 x 16 words, in registers.
ATTENTION_INLINE void transpose16(__m512i *r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Two neighbouring rows as one row of pairs: what brgemm wants of its second operand.
ATTENTION_INLINE __m512i pair16(const BFloat16 *even, const BFloat16 *odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(load_half(even)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(odd)), 16));
}

// A dense copy of `valid` rows, the rest up to `padded` zero.
inline void copy_rows(const Rows &from, int64_t valid, int64_t padded, int64_t c, BFloat16 *to) {
  for (int64_t i = 0; i < valid; ++i) std::memcpy(to + i * c, from.row(i), c * sizeof(BFloat16));
  std::memset(static_cast<void *>(to + valid * c), 0, (padded - valid) * c * sizeof(BFloat16));
}

// [rows, C] to [C, kQueries]; rows a multiple of 32.
ATTENTION_TARGET inline void transpose_rows(const BFloat16 *from, int64_t rows, int64_t c, BFloat16 *to) {
  for (int64_t row = 0; row < rows; row += 32) {
    for (int64_t col = 0; col < c; col += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const BFloat16 *even = from + (row + 2 * i) * c + col;
        r[i] = pair16(even, even + c);
      }
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (col + i) * kQueries + row, r[i]);
    }
  }
}

// [kKeys, C] to its transpose in pairs: [C / 2, kKeys, 2].
ATTENTION_TARGET inline void pack_transposed(const BFloat16 *from, int64_t c, BFloat16 *to) {
  for (int64_t row = 0; row < kKeys; row += 16) {
    for (int64_t col = 0; col < c; col += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + (row + i) * c + col);
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + ((col / 2 + i) * kKeys + row) * 2, r[i]);
    }
  }
}

// [kKeys, C] in pairs of rows: [C / width, kKeys / 2, width, 2].
ATTENTION_TARGET inline void pack_pairs(const BFloat16 *from, int64_t c, int64_t width, BFloat16 *to) {
  for (int64_t col = 0; col < c; col += 16) {
    BFloat16 *block = to + col / width * (kKeys * width) + col % width * 2;
    for (int64_t row = 0; row < kKeys; row += 2) {
      _mm512_storeu_si512(block + row * width, pair16(from + row * c + col, from + (row + 1) * c + col));
    }
  }
}

// Row sums of a * b.
ATTENTION_TARGET inline void row_dots(const BFloat16 *a, const Rows &b, int64_t rows, int64_t c, float *dots) {
  for (int64_t i = 0; i < rows; ++i) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t col = 0; col < c; col += 16) {
      sum = _mm512_fmadd_ps(widen(a + i * c + col), widen(b.row(i) + col), sum);
    }
    dots[i] = _mm512_reduce_add_ps(sum);
  }
}

ATTENTION_TARGET inline void round_rows(const float *from, int64_t rows, int64_t c, const Rows &to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t col = 0; col < c; col += 16) {
      store_rounded(to.row(i) + col, _mm512_loadu_ps(from + i * c + col));
    }
  }
}

// Sum of `parts` matrices [C, kKeys], in their order, rounded and transposed into `valid` rows.
ATTENTION_TARGET inline void sum_parts(const std::vector<const float *> &parts, int64_t valid, int64_t c,
                                       const Rows &to) {
  for (int64_t row = 0; row < valid; row += 16) {
    for (int64_t col = 0; col < c; col += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t at = (col + i) * kKeys + row;
        __m512 sum = _mm512_loadu_ps(parts[0] + at);
        for (size_t part = 1; part < parts.size(); ++part) {
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts[part] + at));
        }
        r[i] = _mm512_castps_si512(sum);
      }
      transpose16(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, valid - row); ++i) {
        store_rounded(to.row(row + i) + col, _mm512_castsi512_ps(r[i]));
      }
    }
  }
}

// 2^x, x <= 127; relative error 1e-7. Lanes outside `lanes` are 0; NaN passes (max returns its second operand).
ATTENTION_INLINE __m512 exp2_16(__m512 x, __mmask16 lanes) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 e = _mm512_set1_ps(1.3276472e-3f);
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(9.6755415e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.055507133f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.2402212f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.69314697f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.0000001f));
  return _mm512_maskz_scalef_ps(lanes, e, whole);
}

constexpr float kLog2E = 1.44269504f;

// `minus_lse` is in powers of 2.
struct Softmax {
  const float *scores, *dp, *minus_lse, *delta;
  BFloat16 *p_pairs, *ds, *ds_pairs;
  float scale;
};
// P and dS from the scores and dP of `rows` queries (an even number) against one key tile. Of row i, the first
// `keys + i * keys_step` keys count.
ATTENTION_TARGET inline void softmax_backward(const Softmax &s, int64_t rows, int64_t keys, int64_t keys_step) {
  alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  // The same across two registers: bit 5 of an index says which.
  const __m512i second = _mm512_set1_epi32(0x00100000);
  const __m512i low = _mm512_add_epi16(interleave, second);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512 scale = _mm512_set1_ps(s.scale), scale_log2 = _mm512_set1_ps(s.scale * kLog2E);
  for (int64_t row = 0; row < rows; row += 2) {
    __mmask64 lanes[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t count = keys + (row + i) * keys_step;
      lanes[i] = count >= 64 ? ~0ull : (1ull << count) - 1;
    }
    for (int half = 0; half < 2; ++half) {
      __m512bh ds[2];
      __m512 ds_first[2];
      for (int vec = 0; vec < 2; ++vec) {
        __m512 p[2];
        const int64_t col = half * 32 + vec * 16;
        for (int i = 0; i < 2; ++i) {
          const int64_t at = (row + i) * kKeys + col;
          const __m512 exponent =
              _mm512_fmadd_ps(_mm512_loadu_ps(s.scores + at), scale_log2, _mm512_set1_ps(s.minus_lse[row + i]));
          p[i] = exp2_16(exponent, static_cast<__mmask16>(lanes[i] >> col));
          const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(s.dp + at), _mm512_set1_ps(s.delta[row + i]));
          const __m512 value = _mm512_mul_ps(_mm512_mul_ps(p[i], scale), centred);
          if (vec == 0) {
            ds_first[i] = value;
          } else {
            ds[i] = _mm512_cvtne2ps_pbh(value, ds_first[i]);
          }
        }
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1], p[0]));
        _mm512_storeu_si512(s.p_pairs + row * kKeys + col * 2, _mm512_permutexvar_epi16(interleave, both));
      }
      const __m512i even = reinterpret_cast<__m512i>(ds[0]), odd = reinterpret_cast<__m512i>(ds[1]);
      _mm512_storeu_si512(s.ds + row * kKeys + half * 32, even);
      _mm512_storeu_si512(s.ds + (row + 1) * kKeys + half * 32, odd);
      BFloat16 *pairs = s.ds_pairs + row * kKeys + half * 64;
      _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

}  // namespace attention_simd
#endif
