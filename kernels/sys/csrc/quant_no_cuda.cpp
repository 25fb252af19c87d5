// quant.h's CUDA half on a build without the CUDA compiler: every call says so.
#include <stdexcept>

#include "quant.h"

[[noreturn]] static void absent() {
  throw std::runtime_error("this build has no CUDA kernels: run `make setup` without CUDA=0 and build again");
}

namespace quant_cuda {
void quantize_4bit(const void *, quant_dtype, int64_t, quant_code, int64_t, uint8_t *, float *, void *) { absent(); }
void dequantize_4bit(const uint8_t *, const quant_scales &, int64_t, quant_code, int64_t, void *, quant_dtype, void *) {
  absent();
}
void quantize_8bit(const float *, int64_t, const float *, int64_t, uint8_t *, float *, void *) { absent(); }
void dequantize_8bit(const uint8_t *, const float *, int64_t, const float *, int64_t, float *, void *) { absent(); }
void quantize_int8_rows(const void *, quant_dtype, int64_t, int64_t, int8_t *, float *, void *) { absent(); }
void dequantize_int8_rows(const int8_t *, const float *, int64_t, int64_t, void *, quant_dtype, void *) { absent(); }
void adamw_8bit(const quant_adamw8 &, void *) { absent(); }
}  // namespace quant_cuda
