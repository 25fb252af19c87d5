// Elementwise work on matrices on the GPU, with sums over rows: a warp holds neighbouring columns and walks
// over rows, the warps of a block add up in fp64 through shared memory, blocks write partial sums. No atomics:
// the order of additions is that of the launch, which is that of the shape.
#pragma once
#include <algorithm>

#include "device.cuh"
#include "fused.h"

namespace {

// Elements of a word of 16 bytes.
template <typename T>
constexpr int kWord = 16 / int(sizeof(T));

// `Op` has `kSums`, and `row(row, column, left, whole, sums)`: what is done to the N elements from `column` on,
// `left` of which there are unless `whole`, and what is added to `sums[kSums][N]`.
template <typename T, typename Op>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(Op op, int64_t rows, int64_t columns, float *partials, bool whole) {
  constexpr int N = kWord<T>;
  __shared__ float shared[kWarps][32 * N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip = int64_t(blockIdx.x) * 32 * N, column = strip + lane * N;
  const int64_t first = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  float sums[Op::kSums][N];
#pragma unroll
  for (int s = 0; s < Op::kSums; s++)
#pragma unroll
    for (int i = 0; i < N; i++) sums[s][i] = 0.0f;
  if (column < columns)
    for (int64_t row = first + warp; row < end; row += kWarps) op.row(row, column, columns - column, whole, sums);
  if (partials == nullptr) return;
#pragma unroll
  for (int s = 0; s < Op::kSums; s++) {
    if (s > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) shared[warp][lane * N + i] = sums[s][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * N && strip + i < columns; i += kThreads) {
      double total = 0.0;
      for (int w = 0; w < kWarps; w++) total += shared[w][i];
      partials[(int64_t(blockIdx.y) * Op::kSums + s) * columns + strip + i] = float(total);
    }
  }
}

// `aligned`: every pointer of `op` is at a multiple of 16 bytes.
template <typename T, typename Op>
void run_columns(const char *name, const Op &op, int64_t rows, int64_t columns, float *partials, bool aligned,
                 void *stream) {
  constexpr int64_t kStrip = 32 * kWord<T>;
  const int64_t blocks = std::min<int64_t>((rows + kWarps - 1) / kWarps, 65535);
  const int64_t parts = partials != nullptr ? fused_parts(rows) : blocks;
  const dim3 grid(static_cast<unsigned>((columns + kStrip - 1) / kStrip), static_cast<unsigned>(parts));
  launch(name, columns_kernel<T, Op>, grid, stream, op, rows, columns, partials,
         aligned && columns % kWord<T> == 0);
}

}  // namespace
