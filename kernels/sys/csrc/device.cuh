// What all CUDA kernels share: words, conversions, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else return value;
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
