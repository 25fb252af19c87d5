// Quantised weights and 8-bit optimizer states on the CPU. Blocks are independent: threads take
// ranges of them. AVX-512 where the CPU has it, plain loops elsewhere; results are the same bits.
// Compiled without contraction of products and sums: bitsandbytes rounds each of them.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "quant.h"
#include "quant_simd.h"

namespace {

using c10::BFloat16;
using c10::Half;

// Weights that one thread takes at least: below, starting it costs more.
constexpr int64_t kGrain = 1 << 15;

template <typename Body>
void dispatch(quant_dtype dtype, Body body) {
  switch (dtype) {
    case QUANT_F32: return body(float{});
    case QUANT_BF16: return body(BFloat16{});
    case QUANT_F16: return body(Half{});
  }
}

template <typename Body>
void for_blocks(int64_t len, int64_t block, Body body) {
  const int64_t blocks = (len + block - 1) / block;
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block), [&](int64_t first, int64_t end) {
    for (int64_t b = first; b < end; ++b) body(b, b * block, std::min(block, len - b * block));
    quant_simd::finish_stores();
  });
}

// bitsandbytes' own clamp of a scale before it divides.
constexpr float kLeastScale = static_cast<float>(1e-38);

uint8_t code_of(const quant_simd::Table4 &table, float scaled) {
  int below = 0;  // ties take the lower code
  while (below < 15 && table.bounds[below] < scaled) ++below;
  return static_cast<uint8_t>(table.order[below]);
}

template <typename T>
float largest(const T *values, int64_t len) {
  float most = 0;
  for (int64_t i = 0; i < len; ++i) most = std::max(most, std::fabs(static_cast<float>(values[i])));
  return most;
}

// Every full block multiplies by the reciprocal; a shorter last one divides, and its scale is clamped.
template <typename T>
void quantize_block(const quant_simd::Table4 &table, const T *values, int64_t len, bool full, uint8_t *codes,
                    float *absmax) {
  if (full && quant_simd::quantize_4bit(table, values, len, codes, absmax)) return;
  const float most = largest(values, len);
  const float scale = std::max(most, kLeastScale);
  const float inverse = 1.0f / scale;
  *absmax = full ? most : scale;
  auto code = [&](int64_t i) -> uint8_t {
    if (i >= len) return code_of(table, 0.0f);
    const float value = static_cast<float>(values[i]);
    return code_of(table, std::clamp(full ? value * inverse : value / scale, -1.0f, 1.0f));
  };
  for (int64_t i = 0; i < len; i += 2) codes[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
}

float scale_of(const quant_scales &scales, int64_t block) {
  if (scales.codes == nullptr) return scales.absmax[block];
  const float product = scales.code8[scales.codes[block]] * scales.absmax[block / 256];
  return product + *scales.offset;
}

// Nearest of 256 ascending values; a tie takes the lower one.
uint8_t nearest(const float *code8, float value) {
  const float *right = std::lower_bound(code8, code8 + 256, value);
  if (right == code8) return 0;
  if (right == code8 + 256) return 255;
  const int index = static_cast<int>(right - code8);
  return static_cast<uint8_t>(*right - value < value - code8[index - 1] ? index : index - 1);
}

// Codes of one block by its largest value; see quant_adamw8.
void encode_moments(const float *values, int64_t count, const float *code8, uint8_t *codes, float *scale) {
  float above = 0, below = 0;
  for (int64_t i = 0; i < count; ++i) {
    above = std::max(above, values[i]);
    below = std::max(below, -values[i]);
  }
  // Denormals have no reciprocal: they are held as zeros.
  const bool is_zero = std::max(above, below) < kLeastScale;
  *scale = is_zero ? 0.0f : above >= below ? above : -below;
  const float inverse = is_zero ? 0.0f : 1.0f / *scale;
  const bool is_unsigned = code8[0] == 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t code = nearest(code8, values[i] * inverse);
    // Never 0 where it is not: the next step would divide by next to nothing.
    codes[i] = is_unsigned && !is_zero && code == 0 && values[i] > 0 ? 1 : code;
  }
}

// bitsandbytes finds 8-bit codes through a table of 65,536 steps over [-1, 1]: not always the nearest,
// and what its scales were made with.
constexpr int kSteps = 65536;

std::array<uint8_t, kSteps> steps_of(const float *code8) {
  std::array<uint8_t, kSteps> steps;
  int code = 0;
  for (int i = 0; i < kSteps; ++i) {
    const float value = -1.0f + (2.0f * i) / (kSteps - 1);
    while (code < 255 && 0.5f * (code8[code] + code8[code + 1]) < value) ++code;
    steps[i] = static_cast<uint8_t>(code);
  }
  return steps;
}

}  // namespace

namespace quant_cpu {

void quantize_4bit(const void *values, quant_dtype dtype, int64_t len, quant_code code, int64_t block,
                   uint8_t *codes, float *absmax) {
  const auto &table = quant_simd::table4(code);
  dispatch(dtype, [&](auto zero) {
    const auto *typed = static_cast<const decltype(zero) *>(values);
    for_blocks(len, block, [&](int64_t b, int64_t first, int64_t count) {
      quantize_block(table, typed + first, count, count == block, codes + first / 2, absmax + b);
    });
  });
}

void dequantize_4bit(const uint8_t *codes, const quant_scales &scales, int64_t len, quant_code code,
                     int64_t block, void *out, quant_dtype dtype) {
  const auto &table = quant_simd::table4(code);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    T *typed = static_cast<T *>(out);
    for_blocks(len, block, [&](int64_t b, int64_t first, int64_t count) {
      const float scale = scale_of(scales, b);
      const uint8_t *in = codes + first / 2;
      if (quant_simd::dequantize_4bit(table, scale, in, count, typed + first)) return;
      // A block has at least as many weights as there are codes: their products once, then copies.
      T values[16];
      for (int c = 0; c < 16; ++c) values[c] = static_cast<T>(table.values[c] * scale);
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t byte = in[i / 2];
        typed[first + i] = values[i % 2 == 0 ? byte >> 4 : byte & 15];
      }
    });
  });
}

void quantize_8bit(const float *values, int64_t len, const float *code8, int64_t block, uint8_t *codes,
                   float *absmax) {
  const auto steps = steps_of(code8);
  for_blocks(len, block, [&](int64_t b, int64_t first, int64_t count) {
    const float most = largest(values + first, count);
    absmax[b] = most;
    if (most == 0) return static_cast<void>(std::memset(codes + first, 0, count));
    const float inverse = 1.0f / most;
    for (int64_t i = first; i < first + count; ++i) {
      const float scaled = std::clamp(values[i] * inverse, -1.0f, 1.0f);
      codes[i] = steps[static_cast<uint16_t>(std::fma((scaled + 1.0f) * 0.5f, float(kSteps - 1), 0.5f))];
    }
  });
}

void quantize_8bit_signed(const float *values, int64_t len, const float *code8, int64_t block, uint8_t *codes,
                          float *scales) {
  for_blocks(len, block, [&](int64_t b, int64_t first, int64_t count) {
    encode_moments(values + first, count, code8, codes + first, scales + b);
  });
}

void dequantize_8bit(const uint8_t *codes, const float *absmax, int64_t len, const float *code8, int64_t block,
                     float *out) {
  for_blocks(len, block, [&](int64_t b, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) out[i] = code8[codes[i]] * absmax[b];
  });
}

void quantize_int8_rows(const void *values, quant_dtype dtype, int64_t rows, int64_t columns, int8_t *codes,
                        float *scales) {
  dispatch(dtype, [&](auto zero) {
    const auto *typed = static_cast<const decltype(zero) *>(values);
    for_blocks(rows * columns, columns, [&](int64_t row, int64_t first, int64_t count) {
      const float most = largest(typed + first, count);
      scales[row] = most;
      // A reciprocal and a product, as Python spells 127 / most.
      const float factor = most == 0 ? 0.0f : 1.0f / most * 127.0f;
      for (int64_t i = first; i < first + count; ++i) {
        // The factor of a row of denormals is infinite.
        const float code = std::nearbyint(static_cast<float>(typed[i]) * factor);
        codes[i] = code == code ? static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f)) : int8_t{0};
      }
    });
  });
}

void dequantize_int8_rows(const int8_t *codes, const float *scales, int64_t rows, int64_t columns, void *out,
                          quant_dtype dtype) {
  constexpr float kStep = 0.007874015718698502f;  // 1 / 127, as bitsandbytes spells it
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    T *typed = static_cast<T *>(out);
    for_blocks(rows * columns, columns, [&](int64_t row, int64_t first, int64_t count) {
      const float scale = scales[row];
      for (int64_t i = first; i < first + count; ++i) {
        typed[i] = static_cast<T>(static_cast<float>(codes[i]) * scale * kStep);
      }
    });
  });
}

void adamw_8bit(const quant_adamw8 &s) {
  if (*s.found_nonfinite == 1.0f) return;
  const float divisor = *s.grad_divisor;
  const double correction1 = 1.0 - std::pow(s.beta1, static_cast<double>(s.step));
  const double correction2_root = std::sqrt(1.0 - std::pow(s.beta2, static_cast<double>(s.step)));
  const float step_size = static_cast<float>(s.learning_rate / correction1);
  const float root = static_cast<float>(correction2_root), epsilon = static_cast<float>(s.epsilon);
  const float beta1 = static_cast<float>(s.beta1), beta2 = static_cast<float>(s.beta2);
  const float keep = static_cast<float>(1.0 - s.learning_rate * s.weight_decay);
  for_blocks(s.len, 256, [&](int64_t b, int64_t first, int64_t count) {
    float m[256], v[256];
    for (int64_t i = 0; i < count; ++i) {
      const float grad = s.grad[first + i] / divisor;
      m[i] = beta1 * (s.signed8[s.exp_avg[first + i]] * s.exp_avg_scales[b]) + (1.0f - beta1) * grad;
      v[i] = beta2 * (s.unsigned8[s.exp_avg_sq[first + i]] * s.exp_avg_sq_scales[b]) + (1.0f - beta2) * grad * grad;
      const float denominator = std::sqrt(v[i]) / root + epsilon;
      s.param[first + i] = s.param[first + i] * keep - step_size * (m[i] / denominator);
    }
    encode_moments(m, count, s.signed8, s.exp_avg + first, s.exp_avg_scales + b);
    encode_moments(v, count, s.unsigned8, s.exp_avg_sq + first, s.exp_avg_sq_scales + b);
  });
}

}  // namespace quant_cpu
