// Cross-entropy over logits on the GPU: `fused_cuda::softmax_cross_entropy` of fused.h.
#include <cmath>

#include "device.cuh"
#include "fused.h"

namespace {

// Maximum and sum of exp(x - maximum) of some elements (Milakov and Gimelshein 2018).
struct Normaliser {
  float most, sum;
};

// What is subtracted from exponents: of elements that are all minus infinity, every exponential is 0.
__device__ __forceinline__ float offset_of(float most) { return most == -INFINITY ? 0.0f : most; }

__device__ __forceinline__ Normaliser combine(Normaliser a, Normaliser b) {
  const float most = fmaxf(a.most, b.most), offset = offset_of(most);
  return {most, a.sum * expf(a.most - offset) + b.sum * expf(b.most - offset)};
}

// Of the whole block, in every thread; the same tree each time.
__device__ Normaliser combine_block(Normaliser mine) {
  __shared__ Normaliser warps[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    const Normaliser other = {__shfl_xor_sync(kWarp, mine.most, offset), __shfl_xor_sync(kWarp, mine.sum, offset)};
    mine = combine(mine, other);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = warps[0];
  for (int w = 1; w < kWarps; w++) mine = combine(mine, warps[w]);
  return mine;
}

// A block per row. Floor per element: its own bytes, read and written; the second reading hits a cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(fused_cross_entropy args, bool aligned) {
  constexpr int N = 16 / sizeof(T);
  const int64_t vocab = args.vocab;
  T *row = static_cast<T *>(args.logits) + blockIdx.x * vocab;
  const int64_t target = args.targets[blockIdx.x];
  const bool ignored = target == args.ignored;
  const bool outside = !ignored && (target < 0 || target >= vocab);
  // Read before the row is written: the other threads wait in combine_block().
  const float own = threadIdx.x == 0 && !ignored && !outside ? to_float(row[target]) : 0.0f;

  Normaliser all = {-INFINITY, 0.0f};
  if (!ignored) {
    for (int64_t at = threadIdx.x * N; at < vocab; at += kThreads * N) {
      T x[N];
      const bool whole = aligned && vocab - at >= N;
      load(row + at, vocab - at, whole, x);
      float most = all.most;
#pragma unroll
      for (int i = 0; i < N; i++)
        if (whole || i < vocab - at) most = fmaxf(most, to_float(x[i]));
      const float offset = offset_of(most);
      float sum = all.sum * expf(all.most - offset);
#pragma unroll
      for (int i = 0; i < N; i++)
        if (whole || i < vocab - at) sum += expf(to_float(x[i]) - offset);
      all = {most, sum};
    }
    all = combine_block(all);
  }
  const float inverse = ignored ? 0.0f : outside ? NAN : 1.0f / all.sum;
  for (int64_t at = threadIdx.x * N; at < vocab; at += kThreads * N) {
    T x[N];
    const bool whole = aligned && vocab - at >= N;
    if (!ignored) load(row + at, vocab - at, whole, x);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float p = ignored ? 0.0f : expf(to_float(x[i]) - all.most) * inverse;
      if (at + i == target && !ignored) p -= 1.0f;
      x[i] = from_float<T>(p);
    }
    store(row + at, vocab - at, whole, x);
  }
  if (threadIdx.x == 0) args.losses[blockIdx.x] = ignored ? 0.0f : outside ? NAN : logf(all.sum) - (own - all.most);
}

template <typename T>
void run(const fused_cross_entropy &args, void *stream) {
  const bool aligned = at_multiple_of(16, args.logits) && args.vocab * sizeof(T) % 16 == 0;
  launch("cross-entropy", cross_entropy_kernel<T>, dim3(static_cast<unsigned>(args.rows)), stream, args, aligned);
}

}  // namespace

void fused_cuda::softmax_cross_entropy(const fused_cross_entropy &args, void *stream) {
  if (args.dtype == FUSED_F32) run<float>(args, stream);
  else run<__nv_bfloat16>(args, stream);
}
