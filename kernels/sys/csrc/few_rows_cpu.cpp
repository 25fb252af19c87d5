// The loops of few_rows.h. Eight rows of the matrix at a time, piece by piece in the first cache and in the dtype of x,
// against up to three rows of x in registers.
// Floor: the bytes of the matrix once.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "few_rows.h"
#include "quant_simd.h"
#include "simd.h"

#if SIMD_AVX512

namespace {

constexpr int64_t kOutputs = 8;   // rows of the matrix in one pass
constexpr int64_t kColumns = 512; // columns of them at once: at most 16 KB
constexpr int64_t kRows = 3;      // rows of x whose sums fit the registers beside one another
constexpr float kInt8Step = 0.007874015718698502f;  // 1 / 127, as bitsandbytes spells it

#define FEW_ROWS_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// 16 partial sums of each output and row, between the pieces.
struct Sums {
  float lanes[kOutputs][kRows][16];
};

float scale_of(const quant_scales &scales, int64_t block) {
  if (scales.codes == nullptr) return scales.absmax[block];
  return scales.code8[scales.codes[block]] * scales.absmax[block / 256] + *scales.offset;
}

SIMD_TARGET void convert(const c10::BFloat16 *from, int64_t len, float *to) {
  for (int64_t i = 0; i < len; i += 16) simd::store16(to + i, len - i, simd::load16(from + i, len - i));
}

SIMD_TARGET void convert(const float *from, int64_t len, c10::BFloat16 *to) {
  for (int64_t i = 0; i < len; i += 16) simd::store16(to + i, len - i, simd::load16(from + i, len - i));
}

// Codes are whole numbers below 128: exact in either dtype.
template <typename T>
SIMD_TARGET void convert(const int8_t *from, int64_t len, T *to) {
  for (int64_t i = 0; i < len; i += 16) {
    const __m128i bytes = _mm_maskz_loadu_epi8(simd::mask16(len - i), from + i);
    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    if constexpr (std::is_same_v<T, float>) {
      simd::store16(to + i, len - i, values);
    } else {
      const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
      _mm256_mask_storeu_epi16(to + i, simd::mask16(len - i), _mm512_cvtepi32_epi16(high));
    }
  }
}

// Weights from number `at` of the whole matrix on; a multiple of 32, as are blocks, which are powers of two.
template <typename T>
void convert_4bit(const few_rows_product &p, int64_t at, int64_t len, T *to) {
  const auto &table = quant_simd::table4(p.code);
  const auto *codes = static_cast<const uint8_t *>(p.values);
  const int block_log2 = __builtin_ctzll(static_cast<uint64_t>(p.block));
  for (const int64_t end = at + len; at < end;) {
    const int64_t block = at >> block_log2, count = std::min(end, (block + 1) << block_log2) - at;
    quant_simd::dequantize_4bit(table, scale_of(p.scales, block), codes + at / 2, count, to, false);
    at += count;
    to += count;
  }
}

// `len` columns of a row, in the dtype of x: as they lie, or in `scratch`.
template <typename T>
const T *piece(const few_rows_product &p, int64_t at, int64_t len, T *scratch) {
  switch (p.held) {
    case FEW_ROWS_F32:
      if constexpr (std::is_same_v<T, float>) return static_cast<const float *>(p.values) + at;
      else convert(static_cast<const float *>(p.values) + at, len, scratch);
      break;
    case FEW_ROWS_BF16:
      if constexpr (!std::is_same_v<T, float>) return static_cast<const T *>(p.values) + at;
      else convert(static_cast<const c10::BFloat16 *>(p.values) + at, len, scratch);
      break;
    case FEW_ROWS_INT8: convert(static_cast<const int8_t *>(p.values) + at, len, scratch); break;
    case FEW_ROWS_4BIT: convert_4bit(p, at, len, scratch); break;
  }
  return scratch;
}

// Adds columns of ROWS rows of x, `stride` apart, to what the first ones begin: whole vectors of 16, then what is left.
template <int ROWS>
SIMD_TARGET void add(const float *const *w, const float *x, int64_t stride, int64_t len, bool is_first, Sums &sums) {
  __m512 total[kOutputs][ROWS];
  SIMD_UNROLL for (int r = 0; r < kOutputs; ++r)
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n)
      total[r][n] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums.lanes[r][n]);
  const auto step = [&](int64_t i, __mmask16 mask) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline)) {
    __m512 values[ROWS];
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n) values[n] = _mm512_maskz_loadu_ps(mask, x + n * stride + i);
    SIMD_UNROLL for (int r = 0; r < kOutputs; ++r) {
      const __m512 weights = _mm512_maskz_loadu_ps(mask, w[r] + i);
      SIMD_UNROLL for (int n = 0; n < ROWS; ++n) total[r][n] = _mm512_fmadd_ps(weights, values[n], total[r][n]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= len; i += 16) step(i, 0xffff);
  if (i < len) step(i, simd::mask16(len - i));
  SIMD_UNROLL for (int r = 0; r < kOutputs; ++r)
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n) _mm512_storeu_ps(sums.lanes[r][n], total[r][n]);
}

// The same in bf16: 16 sums of 32 products.
template <int ROWS>
FEW_ROWS_BF16_TARGET void add(const c10::BFloat16 *const *w, const c10::BFloat16 *x, int64_t stride, int64_t len,
                              bool is_first, Sums &sums) {
  __m512 total[kOutputs][ROWS];
  SIMD_UNROLL for (int r = 0; r < kOutputs; ++r)
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n)
      total[r][n] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums.lanes[r][n]);
  const auto step = [&](int64_t i, __mmask32 mask) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline)) {
    __m512bh values[ROWS];
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n) values[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + n * stride + i);
    SIMD_UNROLL for (int r = 0; r < kOutputs; ++r) {
      const auto weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[r] + i);
      SIMD_UNROLL for (int n = 0; n < ROWS; ++n) total[r][n] = _mm512_dpbf16_ps(total[r][n], weights, values[n]);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= len; i += 32) step(i, 0xffffffffu);
  if (i < len) step(i, (1u << (len - i)) - 1);
  SIMD_UNROLL for (int r = 0; r < kOutputs; ++r)
    SIMD_UNROLL for (int n = 0; n < ROWS; ++n) _mm512_storeu_ps(sums.lanes[r][n], total[r][n]);
}

SIMD_INLINE float sum16(const float *lanes) { return _mm512_reduce_add_ps(_mm512_loadu_ps(lanes)); }

// Outputs `first` to `end` of all rows. The rows of one pass lie apart, so that each is the head of a stream that memory
// is read by in order, far from the others: neighbours would share pages, and the hardware reads no further ahead.
template <typename T>
SIMD_TARGET void run(const few_rows_product &p, int64_t first, int64_t end) {
  const auto *x = static_cast<const T *>(p.x);
  const auto *biases = static_cast<const T *>(p.bias);
  std::vector<T> scratch(kOutputs * kColumns);
  std::vector<Sums> sums((p.rows + kRows - 1) / kRows);
  const int64_t passes = (end - first + kOutputs - 1) / kOutputs;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // Behind the last row it is read again, for nothing.
    const auto output = [&](int64_t r) { return std::min(first + r * passes + pass, end - 1); };
    for (int64_t column = 0; column < p.columns; column += kColumns) {
      const int64_t len = std::min(kColumns, p.columns - column);
      const T *pieces[kOutputs];
      for (int64_t r = 0; r < kOutputs; ++r)
        pieces[r] = piece(p, output(r) * p.columns + column, len, scratch.data() + r * kColumns);
      for (int64_t row = 0; row < p.rows; row += kRows) {
        const T *from = x + row * p.columns + column;
        Sums &into = sums[row / kRows];
        switch (std::min(kRows, p.rows - row)) {
          case 1: add<1>(pieces, from, p.columns, len, column == 0, into); break;
          case 2: add<2>(pieces, from, p.columns, len, column == 0, into); break;
          default: add<3>(pieces, from, p.columns, len, column == 0, into); break;
        }
      }
    }
    for (int64_t r = 0; r < kOutputs; ++r) {
      const int64_t o = output(r);
      const float scale = p.held == FEW_ROWS_INT8 ? p.row_scales[o] * kInt8Step : 1.0f;
      const float bias = biases != nullptr ? static_cast<float>(biases[o]) : 0.0f;
      for (int64_t row = 0; row < p.rows; ++row) {
        const float sum = sum16(sums[row / kRows].lanes[r][row % kRows]);
        static_cast<T *>(p.out)[row * p.outputs + o] = static_cast<T>(sum * scale + bias);
      }
    }
  }
}

}  // namespace

bool few_rows_cpu(const few_rows_product &p) {
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  if (!simd::has_avx512() || (p.dtype == QUANT_BF16 && !has_bf16)) return false;
  if (p.held == FEW_ROWS_4BIT && p.columns % 32 != 0) return false;
  at::parallel_for(0, p.outputs, kOutputs, [&](int64_t first, int64_t end) {
    p.dtype == QUANT_F32 ? run<float>(p, first, end) : run<c10::BFloat16>(p, first, end);
  });
  return true;
}

#else

bool few_rows_cpu(const few_rows_product &) { return false; }

#endif
