// residual + dropout(x + bias) on the GPU: `fused_cuda::residual_dropout` of fused.h. Every operation rounds by
// itself, so that values equal the CPU's to the bit.
#include "columns.cuh"
#include "philox.h"

namespace {

template <typename T>
struct Dropout {
  static constexpr int kSums = 1;
  static constexpr int N = kWord<T>;
  fused_dropout args;

  __device__ __forceinline__ void row(int64_t row, int64_t column, int64_t left, bool whole,
                                      float (&sums)[kSums][N]) const {
    const int64_t at = row * args.columns + column;
    T x[N], other[N];
    load(static_cast<const T *>(args.x) + at, left, whole, x);
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = to_float(x[i]);
    if (args.bias != nullptr) {
      load(static_cast<const T *>(args.bias) + column, left, whole, other);
#pragma unroll
      for (int i = 0; i < N; i++) values[i] = __fadd_rn(values[i], to_float(other[i]));
    }
    if (args.mask.threshold > 0) {
      bool kept[N];
      if (whole) keep_whole(uint64_t(at), kept);
      else keep_each(uint64_t(at), left, kept);
#pragma unroll
      for (int i = 0; i < N; i++) values[i] = kept[i] ? __fmul_rn(values[i], args.mask.scale) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N; i++) sums[0][i] += values[i];
    if (args.out == nullptr) return;
    if (args.residual != nullptr) {
      load(static_cast<const T *>(args.residual) + at, left, whole, other);
#pragma unroll
      for (int i = 0; i < N; i++) values[i] = __fadd_rn(values[i], to_float(other[i]));
    }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = from_float<T>(values[i]);
    store(static_cast<T *>(args.out) + at, left, whole, x);
  }

  // From a multiple of 4 on.
  __device__ __forceinline__ void keep_whole(uint64_t index, bool (&kept)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const philox::Words words = philox::words(args.mask.seed, args.mask.stream, (index + i) / 4);
#pragma unroll
      for (int j = 0; j < 4; j++) kept[i + j] = words.at[j] >= args.mask.threshold;
    }
  }

  __device__ __forceinline__ void keep_each(uint64_t index, int64_t left, bool (&kept)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++) {
      kept[i] = true;
      if (i >= left) continue;
      const philox::Words words = philox::words(args.mask.seed, args.mask.stream, (index + i) / 4);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if ((index + i) % 4 == j) kept[i] = words.at[j] >= args.mask.threshold;
    }
  }
};

template <typename T>
void run(const fused_dropout &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.x) && at_multiple_of(16, args.bias) && at_multiple_of(16, args.out) &&
                       at_multiple_of(16, args.residual);
  run_columns<T>("dropout", Dropout<T>{args}, args.rows, args.columns, args.partials, aligned, stream);
}

}  // namespace

void fused_cuda::residual_dropout(const fused_dropout &args, void *stream) {
  if (args.dtype == FUSED_F32) run<float>(args, stream);
  else run<__nv_bfloat16>(args, stream);
}
