// Gradients into the flat buffer of a unit, on the GPU: `fused_cuda::accumulate` of fused.h.
#include <algorithm>

#include "device.cuh"
#include "fused.h"

namespace {

constexpr int kPairs = 64;  // of one launch: they travel as its arguments, of which there are 4 KB
constexpr int kWide = 8;    // elements that a thread takes at once
constexpr int kTimes = 4;   // how often
constexpr int64_t kTile = int64_t(kThreads) * kWide * kTimes;

struct Pairs {
  fused_pair pairs[kPairs];
  int first_tile[kPairs + 1];  // tiles before each pair
  int len;
};
static_assert(sizeof(Pairs) <= 4000, "arguments of a kernel");

template <typename Into, typename Grad>
__device__ __forceinline__ void tile_of(const fused_pair &pair, int64_t tile, bool first) {
  constexpr int INTO = 16 / sizeof(Into);  // elements of a store
  Into *into = static_cast<Into *>(pair.into);
  const Grad *grad = static_cast<const Grad *>(pair.grad);
  const bool aligned =
      reinterpret_cast<uintptr_t>(into) % 16 == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
#pragma unroll
  for (int time = 0; time < kTimes; time++) {
    const int64_t at = tile * kTile + (int64_t(time) * kThreads + threadIdx.x) * kWide;
    const int64_t left = pair.len - at;
    if (left <= 0) return;
    const bool whole = aligned && left >= kWide;
    Grad g[kWide];
    load(grad + at, left, whole, g);
    Into sum[kWide];
    if (!first) load(into + at, left, whole, sum);
#pragma unroll
    for (int i = 0; i < kWide; i++)
      sum[i] = from_float<Into>(first ? to_float(g[i]) : to_float(sum[i]) + to_float(g[i]));
#pragma unroll
    for (int part = 0; part < kWide; part += INTO) {
      Into word[INTO];
#pragma unroll
      for (int i = 0; i < INTO; i++) word[i] = sum[part + i];
      store(into + at + part, left - part, whole, word);
    }
  }
}

__global__ void __launch_bounds__(kThreads) accumulate_kernel(const __grid_constant__ Pairs all, bool first) {
  const int tile = static_cast<int>(blockIdx.x);
  int low = 0, high = all.len;  // the pair whose tiles begin at or before ours
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (all.first_tile[middle] <= tile) low = middle;
    else high = middle;
  }
  const fused_pair &pair = all.pairs[low];
  const int64_t own = tile - all.first_tile[low];
  if (pair.into_dtype == FUSED_F32) {
    if (pair.grad_dtype == FUSED_F32) tile_of<float, float>(pair, own, first);
    else tile_of<float, __nv_bfloat16>(pair, own, first);
  } else {
    if (pair.grad_dtype == FUSED_F32) tile_of<__nv_bfloat16, float>(pair, own, first);
    else tile_of<__nv_bfloat16, __nv_bfloat16>(pair, own, first);
  }
}

}  // namespace

void fused_cuda::accumulate(const fused_pair *pairs, size_t len, bool first, void *stream) {
  for (size_t done = 0; done < len; done += kPairs) {
    Pairs all;
    all.len = static_cast<int>(std::min<size_t>(kPairs, len - done));
    all.first_tile[0] = 0;
    for (int i = 0; i < all.len; i++) {
      all.pairs[i] = pairs[done + i];
      all.first_tile[i + 1] = all.first_tile[i] + static_cast<int>((all.pairs[i].len + kTile - 1) / kTile);
    }
    launch("accumulating gradients", accumulate_kernel, dim3(static_cast<unsigned>(all.first_tile[all.len])), stream,
           all, first);
  }
}
