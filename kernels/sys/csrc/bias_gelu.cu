// gelu(x + bias) on the GPU: `fused_cuda::bias_gelu` of fused.h.
#include "columns.cuh"

namespace {

// With u = sqrt(2/pi) (x + 0.044715 x^3), (1 + tanh u) / 2 is the sigmoid of 2u.
__device__ __forceinline__ float sigmoid_2u(float x) {
  return 1.0f / (1.0f + expf(-x * (1.5957691f + 0.07135481f * x * x)));
}

// Below, erfc keeps the precision of small values where 1 + erf would lose it.
__device__ __forceinline__ float normal_below(float x) { return 0.5f * erfcf(x * -0.70710678f); }

template <bool TANH>
__device__ __forceinline__ float value(float x) {
  return x * (TANH ? sigmoid_2u(x) : normal_below(x));
}

template <bool TANH>
__device__ __forceinline__ float derivative(float x) {
  // Nothing changes beyond 16, and infinity times 0 is avoided. A NaN stays one.
  if (fabsf(x) > 16.0f) x = copysignf(16.0f, x);
  if (TANH) {
    // Both sigmoids from the exponential that cannot overflow: 1 - s would lose what is left of a small one.
    const float e = expf(-fabsf(x) * (1.5957691f + 0.07135481f * x * x));
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    return (x < 0.0f ? smaller : larger) + larger * smaller * x * (1.5957691f + 0.21406445f * x * x);
  }
  return normal_below(x) + x * 0.39894228f * expf(-0.5f * x * x);
}

template <typename T, bool TANH, bool BACKWARD>
struct BiasGelu {
  static constexpr int kSums = 1;
  static constexpr int N = kWord<T>;
  fused_bias_gelu args;

  __device__ __forceinline__ void row(int64_t row, int64_t column, int64_t left, bool whole,
                                      float (&sums)[kSums][N]) const {
    const int64_t at = row * args.columns + column;
    T x[N], b[N], d[N];
    load(static_cast<const T *>(args.x) + at, left, whole, x);
    load(static_cast<const T *>(args.bias) + column, left, whole, b);
    if (BACKWARD) load(static_cast<const T *>(args.dout) + at, left, whole, d);
#pragma unroll
    for (int i = 0; i < N; i++) {
      // The sum as it would be, had it been written.
      const float sum = to_float(from_float<T>(to_float(x[i]) + to_float(b[i])));
      const float result = BACKWARD ? to_float(d[i]) * derivative<TANH>(sum) : value<TANH>(sum);
      if (BACKWARD) sums[0][i] += result;
      x[i] = from_float<T>(result);
    }
    store(static_cast<T *>(args.out) + at, left, whole, x);
  }
};

template <typename T, bool TANH>
void run(const fused_bias_gelu &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.x) && at_multiple_of(16, args.bias) && at_multiple_of(16, args.out) &&
                       at_multiple_of(16, args.dout);
  if (args.dout == nullptr) {
    run_columns<T>("GELU with a bias", BiasGelu<T, TANH, false>{args}, args.rows, args.columns, nullptr, aligned,
                   stream);
  } else {
    run_columns<T>("gradient of GELU with a bias", BiasGelu<T, TANH, true>{args}, args.rows, args.columns,
                   args.partials, aligned, stream);
  }
}

template <typename T>
void run(const fused_bias_gelu &args, void *stream) {
  if (args.tanh_form) run<T, true>(args, stream);
  else run<T, false>(args, stream);
}

}  // namespace

void fused_cuda::bias_gelu(const fused_bias_gelu &args, void *stream) {
  if (args.dtype == FUSED_F32) run<float>(args, stream);
  else run<__nv_bfloat16>(args, stream);
}
