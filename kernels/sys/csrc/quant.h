/* Quantised weights and 8-bit optimizer states: raw pointers, no libtorch, so that the CUDA compiler
 * needs none of its headers. `quant_cpu.cpp` and `quant.cu` implement the same functions; which one
 * runs is decided in `quant.cpp`, where tensors become pointers.
 *
 * Formats are those of bitsandbytes 0.50. Values lie in blocks of `block` elements, the last one
 * possibly shorter; `absmax` holds the largest magnitude of each. Two 4-bit codes share a byte, the
 * first in the high half; an odd count leaves the last low half at the code of 0 (on CUDA, in a block
 * of zeros, at 0). The two devices differ where bitsandbytes' do: its CUDA kernels flush denormals to
 * zero and take an approximate reciprocal. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum quant_dtype { QUANT_F32 = 0, QUANT_BF16 = 1, QUANT_F16 = 2 };
enum quant_code { QUANT_NF4 = 0, QUANT_FP4 = 1 };

/* Scales of a 4-bit tensor. Plain: `absmax[i]`. Nested (`codes` not null): of block i
 * code8[codes[i]] * absmax[i / 256] + *offset, each operation rounded to fp32. */
struct quant_scales {
  const float *absmax;
  const uint8_t *codes;
  const float *code8;  /* the 256 values of the signed dynamic code, ascending */
  const float *offset; /* one value, where `absmax` lies */
};

/* Block-wise 8-bit AdamW states: codes into `signed8` and `unsigned8` (256 ascending values each),
 * scales per 256 elements: the largest value of each with its sign (bitsandbytes' have none), so that
 * it takes the code of 1 and survives exactly. A second moment above 0 never takes the code of 0, unlike in bitsandbytes:
 * where gradients of one block lie four decades apart, its next update would be enormous. */
struct quant_adamw8 {
  float *param;
  const float *grad;
  uint8_t *exp_avg;
  float *exp_avg_scales;
  uint8_t *exp_avg_sq;
  float *exp_avg_sq_scales;
  const float *signed8;
  const float *unsigned8;
  const float *grad_divisor;    /* gradients are divided by this */
  const float *found_nonfinite; /* 1: nothing changes */
  int64_t len;
  int64_t step; /* from 1 */
  double learning_rate, beta1, beta2, weight_decay, epsilon;
};

namespace quant_cpu {
void quantize_4bit(const void *values, quant_dtype dtype, int64_t len, quant_code code, int64_t block,
                   uint8_t *codes, float *absmax);
void dequantize_4bit(const uint8_t *codes, const quant_scales &scales, int64_t len, quant_code code,
                     int64_t block, void *out, quant_dtype dtype);
/* `code8` is ascending; the nearest value wins, as each library's own search decides ties. */
void quantize_8bit(const float *values, int64_t len, const float *code8, int64_t block, uint8_t *codes,
                   float *absmax);
/* Always the nearest, a tie takes the lower value; scales as those of quant_adamw8, and of the unsigned
 * code no value above 0 takes the code of 0. */
void quantize_8bit_signed(const float *values, int64_t len, const float *code8, int64_t block,
                           uint8_t *codes, float *scales);
void dequantize_8bit(const uint8_t *codes, const float *absmax, int64_t len, const float *code8,
                     int64_t block, float *out);
/* Row-wise: codes = round(value * (127 / absmax of the row)), value = code * scale * fp32(1 / 127). */
void quantize_int8_rows(const void *values, quant_dtype dtype, int64_t rows, int64_t columns,
                        int8_t *codes, float *scales);
void dequantize_int8_rows(const int8_t *codes, const float *scales, int64_t rows, int64_t columns,
                          void *out, quant_dtype dtype);
void adamw_8bit(const quant_adamw8 &state);
} // namespace quant_cpu

/* The same on the current CUDA device and `stream` (a cudaStream_t); a launch that fails throws
 * std::runtime_error with CUDA's message. No function waits for the device. */
namespace quant_cuda {
void quantize_4bit(const void *values, quant_dtype dtype, int64_t len, quant_code code, int64_t block,
                   uint8_t *codes, float *absmax, void *stream);
void dequantize_4bit(const uint8_t *codes, const quant_scales &scales, int64_t len, quant_code code,
                     int64_t block, void *out, quant_dtype dtype, void *stream);
void quantize_8bit(const float *values, int64_t len, const float *code8, int64_t block, uint8_t *codes,
                   float *absmax, void *stream);
void dequantize_8bit(const uint8_t *codes, const float *absmax, int64_t len, const float *code8,
                     int64_t block, float *out, void *stream);
void quantize_int8_rows(const void *values, quant_dtype dtype, int64_t rows, int64_t columns,
                        int8_t *codes, float *scales, void *stream);
void dequantize_int8_rows(const int8_t *codes, const float *scales, int64_t rows, int64_t columns,
                          void *out, quant_dtype dtype, void *stream);
void adamw_8bit(const quant_adamw8 &state, void *stream);
} // namespace quant_cuda
