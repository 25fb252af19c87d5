// Quantised weights on the GPU: `quant_cuda` of quant.h but for its optimizer, see quant_adamw.cu.
//
// Codes, scales and values are those of bitsandbytes' CUDA kernels, to the bit. That library is
// compiled with --use_fast_math: its products, sums and maxima flush denormals, and its reciprocal is
// the hardware's approximation. Such operations are spelled out here, so that no compiler flag can
// change a result; whatever is not flushed is an intrinsic that is never contracted.
#include <cfloat>

#include "quant.h"
#include "quant_device.cuh"

namespace {

constexpr int kGroup = 8;     // elements that a thread quantises at once
constexpr int kSteps = 4;     // words that a thread dequantises
constexpr int kDynamic8 = 2;  // beside QUANT_NF4 and QUANT_FP4: 8-bit codes into a table

__device__ const float kValues[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f,
     -0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f}};

// The number of thresholds below x, by four comparisons; a NaN is above none.
__device__ __forceinline__ uint32_t nf4_code(float x) {
  const bool a = x > 0.03979014977812767f;
  const bool b = x > (a ? 0.3893125355243683f : -0.33967943489551544f);
  const bool c = x > (a ? (b ? 0.6427869200706482f : 0.2035212516784668f)
                        : (b ? -0.13791173323988914f : -0.6106329262256622f));
  const float top = b ? (c ? 0.8614784181118011f : 0.5016634166240692f)
                      : (c ? 0.2920137718319893f : 0.1202552504837513f);
  const float bottom = b ? (c ? -0.045525018125772476f : -0.23460740596055984f)
                         : (c ? -0.4599952697753906f : -0.8480964004993439f);
  return uint32_t(a) << 3 | uint32_t(b) << 2 | uint32_t(c) << 1 | uint32_t(x > (a ? top : bottom));
}

// As above for the magnitude, whose rank differs from its code in one bit, and the sign in front.
__device__ __forceinline__ uint32_t fp4_code(float x) {
  const float y = fabsf(x);
  const bool a = y > 0.29166667f;
  const bool b = y > (a ? 0.583333f : 0.0859375f);
  const bool c = y > (a ? (b ? 0.8333333f : 0.4166667f) : (b ? 0.20833333f : 0.00260417f));
  return (x < 0.0f ? 8u : 0u) | uint32_t(a != b) << 2 | uint32_t(b) << 1 | uint32_t(c);
}

// Scale and codes of each block, by `lanes` neighbouring lanes that take `groups` groups each. A block
// of zeros has the scale 0 and, 0 / 0 being NaN, the codes 0.
// Floor per element: its own bytes, 1/2 or 1 byte of code, 4/block bytes of scale.
template <typename T, int CODE>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T *values, int64_t len, const float *code8, int lanes, int groups,
                    uint8_t *codes, float *absmax, bool aligned) {
  constexpr int PER_BYTE = CODE == kDynamic8 ? 1 : 2;
  __shared__ float tree[CODE == kDynamic8 ? 256 : 1];
  if constexpr (CODE == kDynamic8) {
    build_tree(code8, tree);
    __syncthreads();
  }
  const int lane = int(threadIdx.x) % lanes;
  const int64_t block = int64_t(blockIdx.x) * (kThreads / lanes) + int(threadIdx.x) / lanes;
  const int64_t start = block * lanes * groups * kGroup;

  // Upwards for the scale, downwards for the codes: the group at the turn is still in registers.
  T group[kGroup];
  int64_t at = start + lane * kGroup;
  float peak = -FLT_MAX;
  for (int g = 0;; g++, at += lanes * kGroup) {
    load(values + at, len - at, aligned && len - at >= kGroup, group);
#pragma unroll
    for (int i = 0; i < kGroup; i++) peak = max_ftz(peak, fabsf(to_float(group[i])));
    if (g + 1 == groups) break;
  }
  peak = max_over_lanes(peak, lanes);
  if (lane == 0 && start < len) absmax[block] = peak;
  const float inverse = rcp_ftz(peak);
  for (int g = groups - 1;; g--) {
    uint8_t packed[kGroup / PER_BYTE];
#pragma unroll
    for (int i = 0; i < kGroup; i += PER_BYTE) {
      const float x = mul_ftz(to_float(group[i]), inverse);
      if constexpr (CODE == kDynamic8) {
        packed[i] = uint8_t(nearest(tree, x));
      } else {
        const float y = mul_ftz(to_float(group[i + 1]), inverse);
        packed[i / 2] = uint8_t(CODE == QUANT_NF4 ? nf4_code(x) << 4 | nf4_code(y)
                                                  : fp4_code(x) << 4 | fp4_code(y));
      }
    }
    store(codes + at / PER_BYTE, (len - at + PER_BYTE - 1) / PER_BYTE, aligned && len - at >= kGroup,
          packed);
    if (g == 0) break;
    at -= lanes * kGroup;
    load(values + at, len - at, aligned && len - at >= kGroup, group);
  }
}

// Values of 4-bit codes. A step reads 2 or 4 bytes per lane and writes 16, each side without gaps over
// the warp; a whole tile's loads do not wait for one another.
// Floor per element: 1/2 byte of code, 4/block (nested: 1/block) bytes of scale, and its own bytes.
template <typename T, bool NESTED>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(const uint8_t *__restrict__ codes, quant_scales scales, int64_t len, int code,
                           int block_log2, T *__restrict__ out, bool aligned) {
  constexpr int N = 16 / sizeof(T);
  constexpr int TILE = kSteps * kThreads * N;
  static_assert(TILE % 4096 == 0, "a tile begins with a block");
  // Each half of a warp holds the table, one value per lane: a shuffle looks up without bank conflicts.
  const float value = kValues[code][threadIdx.x % 16];
  const int64_t tile = int64_t(blockIdx.x) * TILE;
  const int64_t first_block = tile >> block_log2;
  const int64_t left = len - tile;
  codes += tile / 2;
  out += tile;
  const auto run = [&](auto constant) {
    constexpr bool whole = decltype(constant)::value;
    uint32_t word[kSteps];
    float scale[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int at = (s * kThreads + int(threadIdx.x)) * N;
      word[s] = 0;
      scale[s] = 0.0f;
      if (!whole && at >= left) continue;
      if (whole) word[s] = reinterpret_cast<const Word<N / 2> *>(codes)[s * kThreads + threadIdx.x];
      else
        for (int i = 0; i < N / 2 && at + 2 * i < left; i++)
          word[s] |= uint32_t(codes[at / 2 + i]) << (8 * i);
      const int64_t block = first_block + (at >> block_log2);
      if constexpr (NESTED)
        scale[s] = __fadd_rn(mul_ftz(__ldg(scales.code8 + __ldg(scales.codes + block)),
                                     __ldg(scales.absmax + block / 256)),
                             __ldg(scales.offset));
      else scale[s] = __ldg(scales.absmax + block);
    }
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int at = (s * kThreads + int(threadIdx.x)) * N;
      T values[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        // Width 16: only the low four bits choose a lane. The first element is the high half of a byte.
        const float v = __shfl_sync(kWarp, value, int(word[s] >> (i * 4 ^ 4)), 16);
        values[i] = from_float<T>(mul_ftz(v, scale[s]));
      }
      store(out + at, left - at, whole, values);
    }
  };
  if (aligned && left >= TILE) run(std::true_type());
  else run(std::false_type());
}

// Values of 8-bit codes into a table. Floor per element: 1 + 4 bytes, and 4/block of scale.
__global__ void __launch_bounds__(kThreads)
    dequantize_8bit_kernel(const uint8_t *codes, const float *absmax, int64_t len, const float *code8,
                           int block_log2, float *out, bool aligned) {
  constexpr int N = 4;
  __shared__ float table[256];
  table[threadIdx.x] = code8[threadIdx.x];
  __syncthreads();
  for (int s = 0; s < kSteps; s++) {
    const int64_t at = ((int64_t(blockIdx.x) * kSteps + s) * kThreads + threadIdx.x) * N;
    if (at >= len) return;
    const bool whole = aligned && len - at >= N;
    uint8_t bytes[N];
    load(codes + at, len - at, whole, bytes);
    const float scale = absmax[at >> block_log2];
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = mul_ftz(table[bytes[i]], scale);
    store(out + at, len - at, whole, values);
  }
}

// Scale and codes of one row. Floor per element: its own bytes and 1; the second reading hits a cache.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_int8_kernel(const T *values, int64_t columns, int8_t *codes, float *scales, bool aligned) {
  __shared__ float peaks[kThreads / 32];
  values += blockIdx.x * columns;
  codes += blockIdx.x * columns;
  T group[kGroup];
  float peak = 0.0f;
  for (int64_t at = threadIdx.x * kGroup; at < columns; at += kThreads * kGroup) {
    load(values + at, columns - at, aligned, group);
#pragma unroll
    for (int i = 0; i < kGroup; i++) peak = max_ftz(peak, fabsf(to_float(group[i])));
  }
  peak = max_over_lanes(peak, 32);
  if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
  __syncthreads();
  peak = max_over_lanes(peaks[threadIdx.x % (kThreads / 32)], kThreads / 32);
  if (threadIdx.x == 0) scales[blockIdx.x] = peak;
  const float factor = mul_ftz(127.0f, rcp_ftz(peak));
  for (int64_t at = threadIdx.x * kGroup; at < columns; at += kThreads * kGroup) {
    load(values + at, columns - at, aligned, group);
    int8_t packed[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      // 0 for NaN. Only a row below 4e-37, where the factor is infinite, needs the limits.
      const int nearest_integer = __float2int_rn(mul_ftz(to_float(group[i]), factor));
      packed[i] = int8_t(max(-127, min(127, nearest_integer)));
    }
    store(codes + at, columns - at, aligned, packed);
  }
}

// Values of row-wise codes, with the two roundings of the PyTorch expression that bitsandbytes uses.
// Floor per element: 1 byte and its own.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int8_kernel(const int8_t *codes, const float *scales, int64_t rows, int64_t columns,
                           T *out, bool aligned) {
  constexpr int N = 16 / sizeof(T);
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= columns) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    int8_t bytes[N];
    load(codes + row * columns + at, columns - at, aligned, bytes);
    const float scale = scales[row];
    T values[N];
#pragma unroll
    for (int i = 0; i < N; i++)
      values[i] = from_float<T>(__fmul_rn(__fmul_rn(float(bytes[i]), scale), 7.874015718698502e-3f));
    store(out + row * columns + at, columns - at, aligned, values);
  }
}

template <typename Body>
void with_dtype(quant_dtype dtype, Body body) {
  switch (dtype) {
    case QUANT_F32: return body(float());
    case QUANT_BF16: return body(__nv_bfloat16());
    case QUANT_F16: return body(__half());
  }
  throw std::runtime_error("unknown dtype of a quantised tensor");
}

int log2_of_block(const char *op, int64_t block) {
  for (int bits = 5; bits <= 12; bits++)
    if (block == int64_t(1) << bits) return bits;
  throw std::runtime_error(std::string(op) + ": a block of " + std::to_string(block) +
                           " elements, expected a power of two from 32 to 4096");
}

dim3 grid_of(int64_t work, int64_t per_block) {
  return dim3(unsigned((work + per_block - 1) / per_block));
}

template <int CODE, typename T>
void quantize(const char *op, const T *values, int64_t len, const float *code8, int64_t block,
              uint8_t *codes, float *absmax, void *stream) {
  log2_of_block(op, block);
  if (len == 0) return;
  const int lanes = int(block / kGroup < 32 ? block / kGroup : 32);
  const int64_t blocks = (len + block - 1) / block;
  const bool aligned = at_multiple_of(16, values) && at_multiple_of(8, codes);
  launch(op, quantize_kernel<T, CODE>, grid_of(blocks * lanes, kThreads), stream, values, len, code8,
         lanes, int(block / kGroup / lanes), codes, absmax, aligned);
}

}  // namespace

namespace quant_cuda {

void quantize_4bit(const void *values, quant_dtype dtype, int64_t len, quant_code code, int64_t block,
                   uint8_t *codes, float *absmax, void *stream) {
  with_dtype(dtype, [&](auto zero) {
    const auto *typed = static_cast<const decltype(zero) *>(values);
    const auto run = code == QUANT_NF4 ? quantize<QUANT_NF4, decltype(zero)>
                                       : quantize<QUANT_FP4, decltype(zero)>;
    run("quantize_4bit", typed, len, nullptr, block, codes, absmax, stream);
  });
}

void dequantize_4bit(const uint8_t *codes, const quant_scales &scales, int64_t len, quant_code code,
                     int64_t block, void *out, quant_dtype dtype, void *stream) {
  const int block_log2 = log2_of_block("dequantize_4bit", block);
  if (len == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = at_multiple_of(16, out) && at_multiple_of(4, codes);
    launch("dequantize_4bit",
           scales.codes ? dequantize_4bit_kernel<T, true> : dequantize_4bit_kernel<T, false>,
           grid_of(len, kSteps * kThreads * (16 / sizeof(T))), stream, codes, scales, len, int(code),
           block_log2, static_cast<T *>(out), aligned);
  });
}

void quantize_8bit(const float *values, int64_t len, const float *code8, int64_t block, uint8_t *codes,
                   float *absmax, void *stream) {
  quantize<kDynamic8>("quantize_8bit", values, len, code8, block, codes, absmax, stream);
}

void dequantize_8bit(const uint8_t *codes, const float *absmax, int64_t len, const float *code8,
                     int64_t block, float *out, void *stream) {
  const int block_log2 = log2_of_block("dequantize_8bit", block);
  if (len == 0) return;
  const bool aligned = at_multiple_of(16, out) && at_multiple_of(4, codes);
  launch("dequantize_8bit", dequantize_8bit_kernel, grid_of(len, 4 * kSteps * kThreads), stream, codes,
         absmax, len, code8, block_log2, out, aligned);
}

void quantize_int8_rows(const void *values, quant_dtype dtype, int64_t rows, int64_t columns,
                        int8_t *codes, float *scales, void *stream) {
  if (rows == 0 || columns == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned =
        columns % kGroup == 0 && at_multiple_of(16, values) && at_multiple_of(8, codes);
    launch("quantize_int8_rows", quantize_int8_kernel<T>, dim3(unsigned(rows)), stream,
           static_cast<const T *>(values), columns, codes, scales, aligned);
  });
}

void dequantize_int8_rows(const int8_t *codes, const float *scales, int64_t rows, int64_t columns,
                          void *out, quant_dtype dtype, void *stream) {
  if (rows == 0 || columns == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = 16 / sizeof(T);
    const bool aligned = columns % N == 0 && at_multiple_of(16, out) && at_multiple_of(N, codes);
    dim3 grid = grid_of(columns, kThreads * N);
    grid.y = unsigned(rows < 65535 ? rows : 65535);
    launch("dequantize_int8_rows", dequantize_int8_kernel<T>, grid, stream, codes, scales, rows,
           columns, static_cast<T *>(out), aligned);
  });
}

}  // namespace quant_cuda
