// AdamW with 8-bit moments on the GPU: `quant_cuda::adamw_8bit` of quant.h.
//
// The states are treated as by bitsandbytes' block-wise 8-bit Adam but for their scales, see quant.h; the
// update is torch.optim.AdamW's.
#include <cmath>

#include "quant.h"
#include "quant_device.cuh"

namespace {

constexpr int kAdamBlock = 256;      // elements that share a scale
constexpr int64_t kAdamGrid = 2048;  // thread blocks at most: each builds its search trees once

struct AdamStep {
  float beta1, beta2, decay, step_size, root_correction2, epsilon;
};

// One warp per block of 256: decode the moments, update, encode them by their new scales. Every
// operation of the update rounds by itself, so that the CPU's version can agree to the bit.
// Floor per element: 8 + 4 bytes of parameter and gradient, 2 x 2 of codes, 16/256 of scales.
__global__ void __launch_bounds__(kThreads)
    adamw_8bit_kernel(quant_adamw8 state, AdamStep step, bool aligned) {
  constexpr int QUAD = 4;
  constexpr int QUADS = kAdamBlock / 32 / QUAD;
  __shared__ float code_m[256], code_v[256], tree_m[256], tree_v[256];
  if (*state.found_nonfinite == 1.0f) return;
  code_m[threadIdx.x] = state.signed8[threadIdx.x];
  code_v[threadIdx.x] = state.unsigned8[threadIdx.x];
  build_tree(state.signed8, tree_m);
  build_tree(state.unsigned8, tree_v);
  __syncthreads();

  const float divisor = *state.grad_divisor;
  const int lane = threadIdx.x % 32;
  const int64_t blocks = (state.len + kAdamBlock - 1) / kAdamBlock;
  const auto update = [&](int64_t block, auto constant) {
    constexpr bool whole = decltype(constant)::value;
    float p[QUADS][QUAD], g[QUADS][QUAD], m[QUADS][QUAD], v[QUADS][QUAD];
    uint8_t cm[QUADS][QUAD], cv[QUADS][QUAD];
    const int64_t first = block * kAdamBlock + lane * QUAD;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const int64_t at = first + q * 32 * QUAD;
      load(state.param + at, state.len - at, whole, p[q]);
      load(state.grad + at, state.len - at, whole, g[q]);
      load(state.exp_avg + at, state.len - at, whole, cm[q]);
      load(state.exp_avg_sq + at, state.len - at, whole, cv[q]);
    }
    const float scale_m = state.exp_avg_scales[block], scale_v = state.exp_avg_sq_scales[block];
    float peak_m = 0.0f, peak_v = 0.0f;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
#pragma unroll
      for (int i = 0; i < QUAD; i++) {
        const float gradient = __fdiv_rn(g[q][i], divisor);
        const float old_m = __fmul_rn(code_m[cm[q][i]], scale_m);
        const float old_v = __fmul_rn(code_v[cv[q][i]], scale_v);
        m[q][i] = __fadd_rn(__fmul_rn(step.beta1, old_m), __fmul_rn(1.0f - step.beta1, gradient));
        v[q][i] = __fadd_rn(__fmul_rn(step.beta2, old_v),
                            __fmul_rn(__fmul_rn(1.0f - step.beta2, gradient), gradient));
        const float root = __fdiv_rn(__fsqrt_rn(v[q][i]), step.root_correction2);
        const float ratio = __fdiv_rn(m[q][i], __fadd_rn(root, step.epsilon));
        p[q][i] = __fsub_rn(__fmul_rn(p[q][i], step.decay), __fmul_rn(step.step_size, ratio));
        const bool there = whole || first + q * 32 * QUAD + i < state.len;
        peak_m = max_ftz(peak_m, there ? fabsf(m[q][i]) : 0.0f);
        peak_v = max_ftz(peak_v, there ? fabsf(v[q][i]) : 0.0f);
      }
    }
    peak_m = max_over_lanes(peak_m, 32);
    peak_v = max_over_lanes(peak_v, 32);
    // The scale of the first moment is its largest value, with its sign.
    bool above = false;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
#pragma unroll
      for (int i = 0; i < QUAD; i++) {
        above |= m[q][i] == peak_m && (whole || first + q * 32 * QUAD + i < state.len);
      }
    }
    if (!__any_sync(kWarp, above)) peak_m = -peak_m;
    const float inverse_m = rcp_ftz(peak_m), inverse_v = rcp_ftz(peak_v);
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const int64_t at = first + q * 32 * QUAD;
#pragma unroll
      for (int i = 0; i < QUAD; i++) {
        cm[q][i] = uint8_t(nearest(tree_m, mul_ftz(m[q][i], inverse_m)));
        // Never 0 where it is not: the next step would divide by next to nothing.
        const int cs = nearest(tree_v, mul_ftz(v[q][i], inverse_v));
        cv[q][i] = uint8_t(cs == 0 && v[q][i] > 0.0f ? 1 : cs);
      }
      store(state.param + at, state.len - at, whole, p[q]);
      store(state.exp_avg + at, state.len - at, whole, cm[q]);
      store(state.exp_avg_sq + at, state.len - at, whole, cv[q]);
    }
    if (lane == 0) {
      state.exp_avg_scales[block] = peak_m;
      state.exp_avg_sq_scales[block] = peak_v;
    }
  };
  constexpr int WARPS = kThreads / 32;
  for (int64_t block = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; block < blocks;
       block += int64_t(gridDim.x) * WARPS) {
    if (aligned && (block + 1) * kAdamBlock <= state.len) update(block, std::true_type());
    else update(block, std::false_type());
  }
}

}  // namespace

namespace quant_cuda {

void adamw_8bit(const quant_adamw8 &state, void *stream) {
  if (state.len == 0) return;
  const double correction1 = 1.0 - std::pow(state.beta1, double(state.step));
  const double correction2 = 1.0 - std::pow(state.beta2, double(state.step));
  AdamStep step;
  step.beta1 = float(state.beta1);
  step.beta2 = float(state.beta2);
  step.decay = float(1.0 - state.learning_rate * state.weight_decay);
  step.step_size = float(state.learning_rate / correction1);
  step.root_correction2 = float(std::sqrt(correction2));
  step.epsilon = float(state.epsilon);
  const bool aligned = at_multiple_of(16, state.param) && at_multiple_of(16, state.grad) &&
                       at_multiple_of(4, state.exp_avg) && at_multiple_of(4, state.exp_avg_sq);
  const int64_t per_grid = kAdamBlock * (kThreads / 32);
  const int64_t grid = (state.len + per_grid - 1) / per_grid;
  launch("adamw_8bit", adamw_8bit_kernel, dim3(unsigned(grid < kAdamGrid ? grid : kAdamGrid)), stream,
         state, step, aligned);
}

}  // namespace quant_cuda
