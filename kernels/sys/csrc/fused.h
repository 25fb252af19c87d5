/* Kernels of training's elementwise work: raw pointers, no libtorch, so that the CUDA compiler needs none of
 * its headers. `*_cpu.cpp` and `*.cu` implement the same functions; which one runs is decided where tensors
 * become pointers, in `fused.cpp` and, with autograd, in `fused_autograd.cpp`.
 *
 * Values are fp32 or bf16, computed in fp32 and rounded once. Matrices are dense and row-major. Results do
 * not depend on the number of threads: a sum over rows is made of `fused_parts(rows)` partial sums of
 * neighbouring rows, added up in their order. A function that takes `partials` (fp32, [parts, sums, columns])
 * sums over rows; where it is null, nothing is summed. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum fused_dtype { FUSED_F32 = 0, FUSED_BF16 = 1 };

inline int64_t fused_parts(int64_t rows) { return rows < 64 ? 1 : rows < 32 * 128 ? rows / 32 : 128; }
inline int64_t fused_part_begin(int64_t rows, int64_t part) { return rows * part / fused_parts(rows); }

struct fused_cross_entropy {
  void *logits; /* [rows, vocab]; becomes softmax - onehot */
  fused_dtype dtype;
  int64_t rows, vocab;
  const int64_t *targets; /* [rows] */
  int64_t ignored;        /* rows with this target: zeros and a loss of 0 */
  float *losses;          /* [rows] */
};

/* into = grad, or += */
struct fused_pair {
  void *into;
  const void *grad;
  int64_t len;
  fused_dtype into_dtype, grad_dtype;
};

/* Without a bias and `mean`, of both directions: RMS norm, in which the mean counts as 0. */
struct fused_layer_norm {
  const void *x, *weight, *bias;
  void *out;
  float *mean, *rstd; /* [rows] */
  fused_dtype dtype;
  int64_t rows, columns;
  double epsilon;
};
struct fused_layer_norm_grad {
  const void *dout, *x, *weight;
  const float *mean, *rstd;
  void *dx;
  float *row_sums; /* [rows, 2], scratch; used by CUDA alone */
  float *partials; /* of dweight and dbias; of dweight alone in RMS norm */
  fused_dtype dtype;
  int64_t rows, columns;
};

struct fused_bias_gelu {
  const void *dout; /* null in the forward pass */
  const void *x, *bias;
  void *out; /* or dx */
  float *partials; /* of dbias; backward pass */
  fused_dtype dtype;
  int64_t rows, columns;
  int tanh_form; /* the exact form on CUDA alone */
};

/* silu(gate) * up, elementwise. */
struct fused_gated {
  const void *dout; /* null in the forward pass */
  const void *gate, *up;
  void *out;  /* or dgate */
  void *dup;  /* backward pass */
  fused_dtype dtype;
  int64_t len;
};

/* The first half of each head against the second: (a, b) to (a cos - b sin, b cos + a sin). */
struct fused_rotation {
  const void *x; /* [rows, heads, 2 pairs] */
  const float *turns; /* [turn_rows, 2, pairs]: cosines, sines; row r of x has turns r % turn_rows */
  void *out;
  fused_dtype dtype;
  int64_t rows, heads, pairs, turn_rows;
  int back; /* by the negative angle: the gradient */
};

/* Dropout's mask, see philox.h: an element is kept when its word is at least `threshold`. */
struct fused_mask {
  uint64_t seed, stream;
  uint64_t threshold; /* probability times 2^32; 0 keeps all, without a random number */
  float scale;        /* 1 / (1 - probability) */
};
struct fused_dropout {
  const void *residual; /* null in the backward pass */
  const void *x;        /* or the gradient of the output */
  const void *bias;     /* may be null */
  void *out;            /* or dx; null where only `partials` are wanted */
  float *partials;      /* of dbias; backward pass */
  fused_dtype dtype;
  int64_t rows, columns;
  fused_mask mask;
};

namespace fused_cpu {
void softmax_cross_entropy(const fused_cross_entropy &args);
/* False where plain loops would have to do it: libtorch's are better. */
bool accumulate(const fused_pair *pairs, size_t len, bool first);
/* These need AVX-512. */
void layer_norm(const fused_layer_norm &args);
void layer_norm_grad(const fused_layer_norm_grad &args);
void bias_gelu(const fused_bias_gelu &args);
void gated(const fused_gated &args);
void rotate(const fused_rotation &args);
void residual_dropout(const fused_dropout &args);
/* Partial sums to `outs`, one vector of `dtype` for each of `sums`. */
void sum_parts(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs,
               fused_dtype dtype);
}  // namespace fused_cpu

/* The same on the current CUDA device and `stream` (a cudaStream_t); a launch that fails throws
 * std::runtime_error with CUDA's message. No function waits for the device. */
namespace fused_cuda {
/* A target outside the vocabulary has a loss of NaN, and so have its gradients. */
void softmax_cross_entropy(const fused_cross_entropy &args, void *stream);
void accumulate(const fused_pair *pairs, size_t len, bool first, void *stream);
void layer_norm(const fused_layer_norm &args, void *stream);
void layer_norm_grad(const fused_layer_norm_grad &args, void *stream);
void bias_gelu(const fused_bias_gelu &args, void *stream);
void gated(const fused_gated &args, void *stream);
void rotate(const fused_rotation &args, void *stream);
void residual_dropout(const fused_dropout &args, void *stream);
void sum_parts(const float *partials, int64_t parts, int64_t sums, int64_t columns, void *const *outs,
               fused_dtype dtype, void *stream);
}  // namespace fused_cuda
