// Partial sums over rows to one sum, on the GPU: `fused_cuda::sum_parts` of fused.h.
#include "device.cuh"
#include "fused.h"

namespace {

// A block adds up 32 columns: each warp some of the parts, then the warps one another.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float *partials, int64_t parts, int64_t sums, int64_t columns, T *first, T *second) {
  __shared__ double shared[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t width = sums * columns, at = int64_t(blockIdx.x) * 32 + lane;
  double total = 0.0;
  if (at < width) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kWarps) total += partials[part * width + at];
  }
  shared[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || at >= width) return;
  for (int w = 1; w < kWarps; w++) total += shared[w][lane];
  if (at < columns) first[at] = from_float<T>(float(total));
  else second[at - columns] = from_float<T>(float(total));
}

template <typename T>
void run(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs, void *stream) {
  if (sums > 2) throw std::runtime_error("sums over rows: at most two at once");
  T *first = static_cast<T *>(outs[0]), *second = sums > 1 ? static_cast<T *>(outs[1]) : nullptr;
  launch("sums over rows", sum_parts_kernel<T>, dim3(static_cast<unsigned>((sums * columns + 31) / 32)), stream,
         partials, parts, sums, columns, first, second);
}

}  // namespace

void fused_cuda::sum_parts(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs,
                           fused_dtype dtype, void *stream) {
  if (dtype == FUSED_F32) run<float>(partials, parts, sums, columns, outs, stream);
  else run<__nv_bfloat16>(partials, parts, sums, columns, outs, stream);
}
