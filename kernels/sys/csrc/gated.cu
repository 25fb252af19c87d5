// silu(gate) * up on the GPU, and both gradients in one pass: `fused_cuda::gated` of fused.h.
#include "columns.cuh"

namespace {

__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x)), larger = 1.0f / (1.0f + e);
  return x < 0.0f ? e * larger : larger;
}

template <typename T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads) gated_kernel(fused_gated args, bool whole) {
  constexpr int N = kWord<T>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N, left = args.len - at;
  if (left <= 0) return;
  whole = whole && left >= N;
  T gate[N], up[N], dout[N];
  load(static_cast<const T *>(args.gate) + at, left, whole, gate);
  load(static_cast<const T *>(args.up) + at, left, whole, up);
  if (BACKWARD) load(static_cast<const T *>(args.dout) + at, left, whole, dout);
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float x = to_float(gate[i]), y = to_float(up[i]), s = sigmoid(x), value = x * s;
    if (BACKWARD) {
      const float d = to_float(dout[i]);
      gate[i] = from_float<T>(d * y * (s + value * (1.0f - s)));
      up[i] = from_float<T>(d * value);
    } else {
      gate[i] = from_float<T>(value * y);
    }
  }
  store(static_cast<T *>(args.out) + at, left, whole, gate);
  if (BACKWARD) store(static_cast<T *>(args.dup) + at, left, whole, up);
}

template <typename T>
void run(const fused_gated &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.gate) && at_multiple_of(16, args.up) && at_multiple_of(16, args.out) &&
                       at_multiple_of(16, args.dup) && at_multiple_of(16, args.dout);
  constexpr int64_t kBlock = int64_t(kThreads) * kWord<T>;
  const dim3 grid(static_cast<unsigned>((args.len + kBlock - 1) / kBlock));
  if (args.dout == nullptr) launch("gated SiLU", gated_kernel<T, false>, grid, stream, args, aligned);
  else launch("gated SiLU's gradient", gated_kernel<T, true>, grid, stream, args, aligned);
}

}  // namespace

void fused_cuda::gated(const fused_gated &args, void *stream) {
  if (args.dtype == FUSED_F32) run<float>(args, stream);
  else run<__nv_bfloat16>(args, stream);
}
