// Layer norm, and RMS norm, on the GPU: `fused_cuda::layer_norm` and `layer_norm_grad` of fused.h. A warp per row where sums
// go over columns; its second and third reading hit a cache.
#include "columns.cuh"

namespace {

// In every lane, by the same tree.
__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWarp, value, offset);
  return value;
}

__device__ __forceinline__ int64_t own_row() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; }

template <typename T, bool RMS>
__global__ void __launch_bounds__(kThreads) forward_kernel(fused_layer_norm args, bool whole) {
  constexpr int N = kWord<T>;
  const int64_t row = own_row(), columns = args.columns;
  if (row >= args.rows) return;
  const T *x = static_cast<const T *>(args.x) + row * columns;
  T *out = static_cast<T *>(args.out) + row * columns;
  const int64_t start = threadIdx.x % 32 * N;
  T v[N];
  float mean = 0.0f;
  if (!RMS) {
    float sum = 0.0f;
    for (int64_t at = start; at < columns; at += 32 * N) {
      load(x + at, columns - at, whole, v);
#pragma unroll
      for (int i = 0; i < N; i++) sum += to_float(v[i]);  // 0 behind the last
    }
    mean = warp_sum(sum) / float(columns);
  }
  float squares = 0.0f;
  for (int64_t at = start; at < columns; at += 32 * N) {
    load(x + at, columns - at, whole, v);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float apart = whole || i < columns - at ? to_float(v[i]) - mean : 0.0f;
      squares += apart * apart;
    }
  }
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / float(columns) + float(args.epsilon));
  for (int64_t at = start; at < columns; at += 32 * N) {
    T w[N], b[N];
    load(x + at, columns - at, whole, v);
    load(static_cast<const T *>(args.weight) + at, columns - at, whole, w);
    if (!RMS) load(static_cast<const T *>(args.bias) + at, columns - at, whole, b);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float normed = (to_float(v[i]) - mean) * rstd * to_float(w[i]);
      v[i] = from_float<T>(RMS ? normed : normed + to_float(b[i]));
    }
    store(out + at, columns - at, whole, v);
  }
  if (threadIdx.x % 32 == 0) {
    if (!RMS) args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// With g = dout * weight and xhat = (x - mean) * rstd: the means of g and g * xhat over each row. Of RMS norm, mean
// and the mean of g count as 0.
template <typename T, bool RMS>
__global__ void __launch_bounds__(kThreads) row_means_kernel(fused_layer_norm_grad args, bool whole) {
  constexpr int N = kWord<T>;
  const int64_t row = own_row(), columns = args.columns;
  if (row >= args.rows) return;
  const float mean = RMS ? 0.0f : args.mean[row], rstd = args.rstd[row];
  float sum_g = 0.0f, sum_g_xhat = 0.0f;
  for (int64_t at = threadIdx.x % 32 * N; at < columns; at += 32 * N) {
    T d[N], x[N], w[N];
    load(static_cast<const T *>(args.dout) + row * columns + at, columns - at, whole, d);
    load(static_cast<const T *>(args.x) + row * columns + at, columns - at, whole, x);
    load(static_cast<const T *>(args.weight) + at, columns - at, whole, w);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float g = to_float(d[i]) * to_float(w[i]);  // 0 behind the last
      sum_g += g;
      sum_g_xhat += g * ((to_float(x[i]) - mean) * rstd);
    }
  }
  sum_g = warp_sum(sum_g);
  sum_g_xhat = warp_sum(sum_g_xhat);
  if (threadIdx.x % 32 == 0) {
    args.row_sums[2 * row] = RMS ? 0.0f : sum_g / float(columns);
    args.row_sums[2 * row + 1] = sum_g_xhat / float(columns);
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), and what is summed to dweight and dbias.
template <typename T, bool RMS>
struct Backward {
  static constexpr int kSums = RMS ? 1 : 2;
  static constexpr int N = kWord<T>;
  fused_layer_norm_grad args;

  __device__ __forceinline__ void row(int64_t row, int64_t column, int64_t left, bool whole,
                                      float (&sums)[kSums][N]) const {
    const int64_t at = row * args.columns + column;
    const float mean = RMS ? 0.0f : args.mean[row], rstd = args.rstd[row];
    const float mean_g = args.row_sums[2 * row], mean_g_xhat = args.row_sums[2 * row + 1];
    T d[N], x[N], w[N];
    load(static_cast<const T *>(args.dout) + at, left, whole, d);
    load(static_cast<const T *>(args.x) + at, left, whole, x);
    load(static_cast<const T *>(args.weight) + column, left, whole, w);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float dout = to_float(d[i]), xhat = (to_float(x[i]) - mean) * rstd;
      sums[0][i] += dout * xhat;
      if constexpr (!RMS) sums[1][i] += dout;
      d[i] = from_float<T>(rstd * (dout * to_float(w[i]) - mean_g - xhat * mean_g_xhat));
    }
    store(static_cast<T *>(args.dx) + at, left, whole, d);
  }
};

dim3 grid_of(int64_t rows) { return dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)); }

template <typename T, bool RMS>
void forward(const fused_layer_norm &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.x) && at_multiple_of(16, args.weight) && at_multiple_of(16, args.bias) &&
                       at_multiple_of(16, args.out);
  launch("layer norm", forward_kernel<T, RMS>, grid_of(args.rows), stream, args, aligned && args.columns % kWord<T> == 0);
}

template <typename T, bool RMS>
void backward(const fused_layer_norm_grad &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.dout) && at_multiple_of(16, args.x) &&
                       at_multiple_of(16, args.weight) && at_multiple_of(16, args.dx);
  launch("layer norm's row means", row_means_kernel<T, RMS>, grid_of(args.rows), stream, args,
         aligned && args.columns % kWord<T> == 0);
  run_columns<T>("layer norm's gradient", Backward<T, RMS>{args}, args.rows, args.columns, args.partials, aligned, stream);
}

}  // namespace

void fused_cuda::layer_norm(const fused_layer_norm &args, void *stream) {
  const bool is_f32 = args.dtype == FUSED_F32;
  if (args.bias == nullptr) is_f32 ? forward<float, true>(args, stream) : forward<__nv_bfloat16, true>(args, stream);
  else is_f32 ? forward<float, false>(args, stream) : forward<__nv_bfloat16, false>(args, stream);
}

void fused_cuda::layer_norm_grad(const fused_layer_norm_grad &args, void *stream) {
  const bool is_f32 = args.dtype == FUSED_F32;
  if (args.mean == nullptr) is_f32 ? backward<float, true>(args, stream) : backward<__nv_bfloat16, true>(args, stream);
  else is_f32 ? backward<float, false>(args, stream) : backward<__nv_bfloat16, false>(args, stream);
}
