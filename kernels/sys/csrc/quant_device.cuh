// What quant.cu and quant_adamw.cu share: arithmetic as --use_fast_math rounds it, and the search in an
// 8-bit code.
#pragma once
#include "device.cuh"

namespace {

__device__ __forceinline__ float mul_ftz(float a, float b) {
  float r;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float add_ftz(float a, float b) {
  float r;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The other operand where one is NaN.
__device__ __forceinline__ float max_ftz(float a, float b) {
  float r;
  asm("max.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float rcp_ftz(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

__device__ __forceinline__ float max_over_lanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = max_ftz(value, __shfl_xor_sync(kWarp, value, offset));
  return value;
}

// The 255 midpoints of an ascending table as a binary tree, the root at 1 and the children of n at
// 2n and 2n + 1: lanes that stand at different nodes of a level then use different banks.
__device__ void build_tree(const float *code8, float *tree) {
  for (int node = threadIdx.x; node < 256; node += kThreads) {
    if (node == 0) continue;
    const int level = 31 - __clz(node);
    const int below = ((2 * (node - (1 << level)) + 1) << (7 - level)) - 1;
    tree[node] = mul_ftz(add_ftz(code8[below], code8[below + 1]), 0.5f);
  }
}

// Nearest value; half way it is the even code, hence the other comparison at the leaves. NaN: 0.
__device__ __forceinline__ int nearest(const float *tree, float x) {
  int node = 1;
#pragma unroll
  for (int level = 0; level < 7; level++) node = 2 * node + (x >= tree[node]);
  return 2 * node + (x > tree[node]) - 256;
}

}  // namespace
