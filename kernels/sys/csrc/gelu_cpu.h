// GELU on the CPU without a library call per lane. To move into capi.h.
#pragma once
#include "capi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* GELU of x, differentiable; `tanh_form` as in at::gelu(x, "tanh"). Keeps x alone for the backward pass. */
int tf_gelu_cpu(tf_tensor x, int tanh_form, tf_tensor *out);

#ifdef __cplusplus
}
#endif
