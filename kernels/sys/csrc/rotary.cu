// Rotary positions on the GPU: `fused_cuda::rotate` of fused.h. A thread turns some neighbouring pairs of a head.
#include "columns.cuh"

namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_kernel(fused_rotation args, bool whole) {
  constexpr int N = kWord<T>;
  const int64_t words = (args.pairs + N - 1) / N;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= args.rows * args.heads * words) return;
  const int64_t pair = item % words * N, head = item / words, row = head / args.heads, left = args.pairs - pair;
  const int64_t at = head * 2 * args.pairs + pair;
  const float *turns = args.turns + row % args.turn_rows * 2 * args.pairs + pair;
  T a[N], b[N];
  load(static_cast<const T *>(args.x) + at, left, whole, a);
  load(static_cast<const T *>(args.x) + at + args.pairs, left, whole, b);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i >= left) break;
    const float cosine = turns[i], sine = args.back ? -turns[args.pairs + i] : turns[args.pairs + i];
    const float x = to_float(a[i]), y = to_float(b[i]);
    a[i] = from_float<T>(x * cosine - y * sine);
    b[i] = from_float<T>(y * cosine + x * sine);
  }
  store(static_cast<T *>(args.out) + at, left, whole, a);
  store(static_cast<T *>(args.out) + at + args.pairs, left, whole, b);
}

template <typename T>
void run(const fused_rotation &args, void *stream) {
  constexpr int64_t N = kWord<T>;
  const bool whole = at_multiple_of(16, args.x) && at_multiple_of(16, args.out) && args.pairs % N == 0;
  const int64_t items = args.rows * args.heads * ((args.pairs + N - 1) / N);
  const dim3 grid(static_cast<unsigned>((items + kThreads - 1) / kThreads));
  launch("rotary positions", rotate_kernel<T>, grid, stream, args, whole);
}

}  // namespace

void fused_cuda::rotate(const fused_rotation &args, void *stream) {
  if (args.dtype == FUSED_F32) run<float>(args, stream);
  else run<__nv_bfloat16>(args, stream);
}
