// residual + dropout(x + bias) on the CPU. The mask is computed where it is used, 64 elements at a time.
#include <cstring>

#include "columns_cpu.h"
#include "philox.h"
#include "simd.h"

namespace {

using c10::BFloat16;

template <typename T>
struct Row {
  const T *residual, *x, *bias;  // residual and bias may be null
  T *out;                        // may be null
  uint64_t index;                // of the first element in the whole tensor
};

template <typename T>
Row<T> row_of(const fused_dropout &args, int64_t row) {
  const int64_t first = row * args.columns;
  const auto at = [&](const void *p) { return p == nullptr ? nullptr : static_cast<const T *>(p) + first; };
  T *out = args.out == nullptr ? nullptr : static_cast<T *>(args.out) + first;
  return {at(args.residual), at(args.x), static_cast<const T *>(args.bias), out, static_cast<uint64_t>(first)};
}

template <typename T>
void rows_plain(const fused_dropout &args, int64_t first, int64_t end, float *sums) {
  const fused_mask &mask = args.mask;
  for (int64_t i = first; i < end; ++i) {
    const Row<T> row = row_of<T>(args, i);
    philox::Words words{};
    for (int64_t c = 0; c < args.columns; ++c) {
      const uint64_t index = row.index + static_cast<uint64_t>(c);
      if (mask.threshold > 0 && (c == 0 || index % 4 == 0)) words = philox::words(mask.seed, mask.stream, index / 4);
      float value = static_cast<float>(row.x[c]);
      if (row.bias != nullptr) value += static_cast<float>(row.bias[c]);
      value = words.at[index % 4] >= mask.threshold ? value * mask.scale : 0.0f;
      if (row.residual != nullptr) value += static_cast<float>(row.residual[c]);
      if (row.out != nullptr) row.out[c] = static_cast<T>(value);
      if (sums != nullptr) sums[c] += value;
    }
  }
}

#if SIMD_AVX512
using simd::load16;
using simd::store16;

constexpr int64_t kChunk = 4096;  // elements whose mask is there at once

// As intrinsics take words.
SIMD_INLINE int word(uint64_t value) { return static_cast<int>(static_cast<uint32_t>(value)); }

// Both halves of a product of 32-bit words.
SIMD_INLINE void multiply(__m512i a, __m512i factor, __m512i *high, __m512i *low) {
  const __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

// Of 64 elements from `block * 64` on, the kept ones as bits.
SIMD_INLINE uint64_t kept64(const fused_mask &mask, uint64_t block) {
  // Counter 4 k + j of the 16 in lane 4 j + k: a transposition within quarters then brings the words in order.
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const uint64_t counter = block * 16;
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(word(counter)), lanes), c1 = _mm512_set1_epi32(word(counter >> 32));
  __m512i c2 = _mm512_set1_epi32(word(mask.stream)), c3 = _mm512_set1_epi32(word(mask.stream >> 32));
  __m512i k0 = _mm512_set1_epi32(word(mask.seed)), k1 = _mm512_set1_epi32(word(mask.seed >> 32));
  const __m512i multiply0 = _mm512_set1_epi32(word(philox::kMultiply0));
  const __m512i multiply1 = _mm512_set1_epi32(word(philox::kMultiply1));
  for (int round = 0; round < philox::kRounds; ++round) {
    __m512i high0, low0, high1, low1;
    multiply(c0, multiply0, &high0, &low0);
    multiply(c2, multiply1, &high1, &low1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, k0, 0x96);  // exclusive or of three
    c1 = low1;
    c2 = _mm512_ternarylogic_epi32(high0, c3, k1, 0x96);
    c3 = low0;
    k0 = _mm512_add_epi32(k0, _mm512_set1_epi32(word(philox::kWeyl0)));
    k1 = _mm512_add_epi32(k1, _mm512_set1_epi32(word(philox::kWeyl1)));
  }
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  const __m512i threshold = _mm512_set1_epi32(word(mask.threshold));
  const uint64_t kept0 = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(low01, low23), threshold);
  const uint64_t kept1 = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(low01, low23), threshold);
  const uint64_t kept2 = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(high01, high23), threshold);
  const uint64_t kept3 = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(high01, high23), threshold);
  return kept0 | kept1 << 16 | kept2 << 32 | kept3 << 48;
}

template <typename T>
SIMD_TARGET void rows_avx512(const fused_dropout &args, int64_t first, int64_t end, float *sums) {
  const __m512 scale = _mm512_set1_ps(args.mask.scale);
  // A bit for each element of a chunk from the multiple of 64 before it, and room to read behind the last.
  uint64_t kept[kChunk / 64 + 2];
  for (uint64_t &bits : kept) bits = ~0ull;
  for (int64_t i = first; i < end; ++i) {
    const Row<T> row = row_of<T>(args, i);
    for (int64_t chunk = 0; chunk < args.columns; chunk += kChunk) {
      const int64_t chunk_end = std::min(chunk + kChunk, args.columns);
      const uint64_t index = row.index + static_cast<uint64_t>(chunk), block = index / 64;
      if (args.mask.threshold > 0) {
        const uint64_t last = (index + static_cast<uint64_t>(chunk_end - chunk) - 1) / 64;
        for (uint64_t b = block; b <= last; ++b) kept[b - block] = kept64(args.mask, b);
      }
      for (int64_t c = chunk; c < chunk_end; c += 16) {
        const int64_t left = chunk_end - c;
        const uint64_t bit = index % 64 + static_cast<uint64_t>(c - chunk);
        uint32_t bits;
        std::memcpy(&bits, reinterpret_cast<const char *>(kept) + bit / 8, sizeof(bits));
        const auto keep = static_cast<__mmask16>(bits >> bit % 8);
        __m512 value = load16(row.x + c, left);
        if (row.bias != nullptr) value = _mm512_add_ps(value, load16(row.bias + c, left));
        value = _mm512_maskz_mul_ps(keep, value, scale);
        if (row.residual != nullptr) value = _mm512_add_ps(value, load16(row.residual + c, left));
        if (row.out != nullptr) store16(row.out + c, left, value);
        if (sums != nullptr) store16(sums + c, left, _mm512_add_ps(load16(sums + c, left), value));
      }
    }
  }
}
#endif

template <typename T>
void run(const fused_dropout &args) {
  auto rows = rows_plain<T>;
#if SIMD_AVX512
  if (simd::has_avx512()) rows = rows_avx512<T>;
#endif
  fused_cpu::for_rows(args.rows, args.columns, 1, args.partials,
                      [&](int64_t first, int64_t end, float *sums) { rows(args, first, end, sums); });
}

}  // namespace

void fused_cpu::residual_dropout(const fused_dropout &args) {
  if (args.dtype == FUSED_F32) {
    run<float>(args);
  } else {
    run<BFloat16>(args);
  }
}
