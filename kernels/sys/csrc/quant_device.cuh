// What quant.cu and quant_adamw.cu share: arithmetic as --use_fast_math rounds it, words, the search in
// an 8-bit code, launches.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;

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

template <int BYTES>
using Word = std::conditional_t<
    BYTES == 2, uint16_t,
    std::conditional_t<BYTES == 4, uint32_t, std::conditional_t<BYTES == 8, uint2, uint4>>>;

// `whole`: all N values are there, at a multiple of the word that holds them (of 16 bytes at most).
// Otherwise `count` of them are, and the others read as 0. A constant `whole` leaves no branch.
template <typename T, int N>
__device__ __forceinline__ void load(const T *from, int64_t count, bool whole, T (&to)[N]) {
  constexpr int WIDTH = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  if (whole) {
    Word<WIDTH> words[N * sizeof(T) / WIDTH];
#pragma unroll
    for (int i = 0; i < int(N * sizeof(T) / WIDTH); i++)
      words[i] = reinterpret_cast<const Word<WIDTH> *>(from)[i];
    memcpy(to, words, sizeof(words));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = i < count ? from[i] : T(0.0f);
  }
}

template <typename T, int N>
__device__ __forceinline__ void store(T *to, int64_t count, bool whole, const T (&from)[N]) {
  if (whole) {
    Word<N * sizeof(T)> word;
    memcpy(&word, from, sizeof(word));
    *reinterpret_cast<Word<N * sizeof(T)> *>(to) = word;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) to[i] = from[i];
  }
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

template <typename... Params, typename... Args>
void launch(const char *op, void (*kernel)(Params...), dim3 grid, void *stream, Args... args) {
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

bool at_multiple_of(size_t bytes, const void *pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace
