// Attention on the CPU with a backward pass in matrix instructions. To move into capi.h.
#pragma once
#include "capi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Scaled dot-product attention without dropout, differentiable; scale 1/sqrt(C), H a multiple of K. `causal`
 * as libtorch means it. */
int tf_attention_cpu(tf_tensor q_bhtc, tf_tensor k_bksc, tf_tensor v_bksc, int causal, tf_tensor *out_bhtc);

#ifdef __cplusplus
}
#endif
