/* The contract between Rust and libtorch, where tch has no binding.
 *
 * Every function returns a status: 0 is success; otherwise tf_last_error() holds the message of
 * this thread's last failure until its next call. No C++ exception crosses this line. Tensors are
 * `at::Tensor*` as in torch-sys; those returned belong to the caller. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void *tf_tensor;

enum { TF_OK = 0, TF_ERROR = 1, TF_NO_CUDA = 2 };

const char *tf_last_error(void);

/* Gradients of `outputs` (weighted by `grad_outputs`) with respect to `inputs`; an input that the
 * outputs do not depend on is an error. Frees the graph. */
int tf_grad(const tf_tensor *outputs, const tf_tensor *grad_outputs, size_t outputs_len,
            const tf_tensor *inputs, size_t inputs_len, tf_tensor *grads);

struct tf_adamw {
  double learning_rate;
  double beta1;
  double beta2;
  double weight_decay;
  double epsilon;
};

/* One fused AdamW update in place. Gradients are divided by `grad_divisor`; when `found_nonfinite`
 * is 1 nothing changes. `step` counts from 1 (fp32 scalar). All on one device, fp32. */
int tf_fused_adamw(const tf_tensor *params, const tf_tensor *grads, const tf_tensor *exp_avgs,
                   const tf_tensor *exp_avg_sqs, size_t len, tf_tensor step,
                   tf_tensor grad_divisor, tf_tensor found_nonfinite,
                   const struct tf_adamw *options);

/* Quantised weights, as quant.h describes them. `code`: 0 NF4, 1 FP4. Flat, dense tensors on one device. */
struct tf_nested_scales {
  tf_tensor codes;
  tf_tensor code8;
  tf_tensor offset;
};
int tf_quantize_4bit(tf_tensor values, int code, int64_t block, tf_tensor codes, tf_tensor absmax);
/* Mean of fp32 values into one fp32 value, in an order that the number of threads does not change. */
int tf_serial_mean(tf_tensor values, tf_tensor out);
/* `nested` may be null. */
int tf_dequantize_4bit(tf_tensor codes, tf_tensor absmax, const struct tf_nested_scales *nested, int code,
                       int64_t block, tf_tensor out);
/* As bitsandbytes finds codes on this device; with `is_signed`, as adamw_8bit encodes its moments (on the
 * CPU alone). */
int tf_quantize_8bit(tf_tensor values, tf_tensor code8, int64_t block, int is_signed, tf_tensor codes,
                     tf_tensor absmax);
int tf_dequantize_8bit(tf_tensor codes, tf_tensor absmax, tf_tensor code8, int64_t block, tf_tensor out);
int tf_quantize_int8_rows(tf_tensor values, tf_tensor codes, tf_tensor scales);
int tf_dequantize_int8_rows(tf_tensor codes, tf_tensor scales, tf_tensor out);
/* The 256 ascending values of the dynamic 8-bit code, on the CPU. */
int tf_dynamic_code(int is_signed, tf_tensor *table);

/* One AdamW update with 8-bit moments, in place; `step` counts from 1. */
struct tf_adamw_8bit_state {
  tf_tensor param;
  tf_tensor grad;
  tf_tensor exp_avg;
  tf_tensor exp_avg_scales;
  tf_tensor exp_avg_sq;
  tf_tensor exp_avg_sq_scales;
  tf_tensor signed8;
  tf_tensor unsigned8;
  tf_tensor grad_divisor;
  tf_tensor found_nonfinite;
};
int tf_adamw_8bit(const struct tf_adamw_8bit_state *state, int64_t step, const struct tf_adamw *options);

/* x W^T + bias of a few rows x `[N, I]` (fp32 or bf16) on a CPU, in x's dtype; a row's results do not depend on the
 * others. Not differentiable. A matrix `[outputs, I]`: `values` are fp32 or bf16 (`held` 0 and 1), the codes of
 * tf_quantize_int8_rows (2) or of tf_quantize_4bit (3), with their `scales`, and what else those take. `*out` is null
 * where this CPU or this shape does not suit. */
struct tf_held_matrix {
  int held;
  int64_t outputs;
  tf_tensor values;
  tf_tensor scales; /* null of a matrix that is not quantised */
  struct tf_nested_scales nested; /* nulls where there are none */
  int code;
  int64_t block;
};
int tf_few_rows(tf_tensor x, const struct tf_held_matrix *matrix, tf_tensor bias, tf_tensor *out);

/* x W^T + bias, differentiable in x alone. The graph keeps the handle of `weight` and reads it again in
 * the backward pass: whoever rewrites it must have put the same values back by then. */
int tf_frozen_linear(tf_tensor x, tf_tensor weight, tf_tensor bias, tf_tensor *out);

/* Attention of whole sequences without dropout, q `[B, H, T, C]`, k and v `[B, K, S, C]` with H a multiple
 * of K; differentiable. On a CPU in bf16 the backward pass is ours, elsewhere libtorch's. */
int tf_attention_cpu(tf_tensor q_bhtc, tf_tensor k_bksc, tf_tensor v_bksc, int causal, tf_tensor *out_bhtc);

/* Which kernel causal attention of these tensors would run on: TF_ATTENTION_OWN for tf_attention_cpu's own
 * backward pass, else libtorch's choice by its number in at::SDPBackend. */
enum { TF_ATTENTION_OWN = 100 };
int tf_attention_backend(tf_tensor q_bhtc, tf_tensor k_bksc, tf_tensor v_bksc, double dropout, int *backend);

/* Attention of a few new tokens over the keys and values of their sequences, on a CPU: qkv `[N, (H + 2K) C]` holds of
 * each token all queries, its keys and its values; those are added to the caches `[K, S, C]`, which hold `cached`
 * tokens. `*out` is `[N, H C]`, of which the rows of the runs are written, or null where this CPU or this shape does not
 * suit. Not differentiable. */
struct tf_cached_run {
  tf_tensor k;
  tf_tensor v;
  int64_t cached;
  int64_t first;  /* row of its first token */
  int64_t tokens;
};
int tf_cached_attention(tf_tensor qkv, int64_t heads, int64_t kv_heads, const struct tf_cached_run *runs, size_t len,
                        tf_tensor *out);

/* GELU, by tanh or exact; differentiable. The tanh form is ours on a CPU, else libtorch's. */
int tf_gelu_cpu(tf_tensor x, int tanh_form, tf_tensor *out);

/* Layer norm over the last dimension, of x `[.., D]`, weight and bias `[D]`; without a bias RMS norm. Differentiable. */
int tf_layer_norm(tf_tensor x, tf_tensor weight, tf_tensor bias, double epsilon, tf_tensor *out);

/* gelu(x + bias), x `[.., D]`, bias `[D]`; differentiable. The sum is rounded to x's dtype. */
int tf_bias_gelu(tf_tensor x, tf_tensor bias, int tanh_form, tf_tensor *out);

/* silu(gate) * up, of one shape; differentiable. */
int tf_gated(tf_tensor gate, tf_tensor up, tf_tensor *out);

/* Heads of x `[N, heads * 2P]` rotated, first halves against second halves, by turns `[R, 2, P]` (fp32, dense; cosines,
 * sines), of which row n takes the n % R-th; N a multiple of R. Differentiable in x. */
int tf_rotate(tf_tensor x, tf_tensor turns, tf_tensor *out);

/* residual + dropout(x + bias), by the mask of philox.h; `bias` may be null, `[D]` otherwise. Differentiable. */
int tf_residual_dropout(tf_tensor residual, tf_tensor x, tf_tensor bias, double probability, int64_t seed,
                        int64_t stream, tf_tensor *out);

/* Cross-entropy of logits `[C, V]` (fp32 or bf16, dense) and int64 targets `[C]`; the logits become softmax -
 * onehot, and zeros where the target is `ignored`. Losses are fp32 `[C]`. Not differentiable. */
int tf_softmax_cross_entropy_(tf_tensor logits_cv, tf_tensor targets_c, int64_t ignored, tf_tensor *losses_c);

/* into[i] = grads[i], or += where not `first`; of one shape each. Not differentiable. */
int tf_accumulate(const tf_tensor *into, const tf_tensor *grads, size_t len, int first);

/* fp32 zeros in memory that the GPU shares with the host and pages in as it needs them. */
int tf_cuda_managed_zeros(int64_t len, int device, tf_tensor *out);

/* Euclidean norm of each tensor, as fp32 scalars. */
int tf_foreach_norm(const tf_tensor *tensors, size_t len, tf_tensor *norms);

/* Whether CPU matrix products in bf16 run on hardware instructions. */
int tf_cpu_bf16_matmul_is_native(int *native);

/* Only deterministic algorithms from here on; an op that has none raises an error. */
int tf_set_deterministic(int on);

/* The C allocator keeps freed memory instead of giving it back to the system. No-op where it cannot. */
void tf_keep_freed_memory(void);

/* CPU tensors are counted from here on, once for the process; those made before are not. */
int tf_count_cpu_memory(void);
/* What counted tensors take, as they asked for it, bytes. */
struct tf_cpu_memory {
  int64_t allocated;
  int64_t allocated_peak;
};
void tf_cpu_memory(struct tf_cpu_memory *memory);
void tf_cpu_reset_peak(void);

/* Address of a dense CPU tensor's first element. */
int tf_data_ptr(tf_tensor tensor, void **data);

/* GPU memory of the caching allocator, bytes. TF_NO_CUDA without one. */
struct tf_cuda_memory {
  int64_t allocated;
  int64_t allocated_peak;
  int64_t reserved;
  int64_t reserved_peak;
};
int tf_cuda_memory(int device, struct tf_cuda_memory *memory);
int tf_cuda_reset_peak(int device);
/* 16 bytes that no other GPU (or MIG instance) has. */
int tf_cuda_uuid(int device, uint8_t *uuid);

/* Store callbacks of the NCCL bootstrap. `key` is not terminated. A failing callback returns
 * non-zero. `get` blocks until the key exists and fills `value` (at most *value_len bytes). */
struct tf_store {
  void *context;
  int (*set)(void *context, const char *key, size_t key_len, const uint8_t *value,
             size_t value_len);
  int (*get)(void *context, const char *key, size_t key_len, uint8_t *value, size_t *value_len);
};

typedef struct tf_nccl tf_nccl;
typedef struct tf_work tf_work;

/* Joins a group of `world` ranks on `device`. The store must outlive the group. */
int tf_nccl_join(int rank, int world, int device, const struct tf_store *store,
                 int64_t timeout_ms, tf_nccl **group);
int tf_nccl_all_gather(tf_nccl *group, tf_tensor output, tf_tensor input, tf_work **work);
int tf_nccl_reduce_scatter(tf_nccl *group, tf_tensor output, tf_tensor input, tf_work **work);
int tf_nccl_all_reduce(tf_nccl *group, tf_tensor tensor, tf_work **work);
/* Orders the current stream after the operation. */
int tf_nccl_wait(tf_work *work);
/* Whether the device is through with the operation; waits for nothing. One that failed never is. */
int tf_nccl_is_complete(tf_work *work, int *complete);
void tf_work_free(tf_work *work);
/* From any thread: fails what is under way. */
int tf_nccl_abort(tf_nccl *group);
void tf_nccl_free(tf_nccl *group);

#ifdef __cplusplus
}
#endif
