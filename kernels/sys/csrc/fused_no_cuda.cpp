// fused.h's CUDA half on a build without the CUDA compiler: every call says so.
#include <stdexcept>

#include "fused.h"

[[noreturn]] static void absent() {
  throw std::runtime_error("this build has no CUDA kernels: run `make setup` without CUDA=0 and build again");
}

namespace fused_cuda {
void softmax_cross_entropy(const fused_cross_entropy &, void *) { absent(); }
void accumulate(const fused_pair *, size_t, bool, void *) { absent(); }
void layer_norm(const fused_layer_norm &, void *) { absent(); }
void layer_norm_grad(const fused_layer_norm_grad &, void *) { absent(); }
void bias_gelu(const fused_bias_gelu &, void *) { absent(); }
void gated(const fused_gated &, void *) { absent(); }
void rotate(const fused_rotation &, void *) { absent(); }
void residual_dropout(const fused_dropout &, void *) { absent(); }
void sum_parts(const float *, int64_t, int64_t, int64_t, void *const *, fused_dtype, void *) { absent(); }
}  // namespace fused_cuda
