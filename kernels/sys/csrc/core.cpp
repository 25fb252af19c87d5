// Autograd, optimizer and switches that tch lacks. CPU and CUDA alike: libtorch dispatches.
#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#ifdef __linux__
#include <malloc.h>
#endif

#include "guard.h"
#include "simd.h"

using TensorList = std::vector<at::Tensor>;

std::string &tf_error_slot() {
  static thread_local std::string message;
  return message;
}

const char *tf_last_error(void) { return tf_error_slot().c_str(); }

int tf_no_cuda(const char *what) {
  tf_error_slot() = std::string(what) + ": no CUDA device is available";
  return TF_NO_CUDA;
}

static at::Tensor &ref(tf_tensor tensor) { return *static_cast<at::Tensor *>(tensor); }

static TensorList list(const tf_tensor *tensors, size_t len) {
  TensorList out;
  out.reserve(len);
  for (size_t i = 0; i < len; ++i) out.push_back(ref(tensors[i]));
  return out;
}

int tf_grad(const tf_tensor *outputs, const tf_tensor *grad_outputs, size_t outputs_len,
            const tf_tensor *inputs, size_t inputs_len, tf_tensor *grads) {
  return tf_guard([&] {
    auto result = torch::autograd::grad(list(outputs, outputs_len), list(inputs, inputs_len),
                                        list(grad_outputs, outputs_len));
    for (size_t i = 0; i < inputs_len; ++i) grads[i] = new at::Tensor(std::move(result[i]));
  });
}

int tf_fused_adamw(const tf_tensor *params, const tf_tensor *grads, const tf_tensor *exp_avgs,
                   const tf_tensor *exp_avg_sqs, size_t len, tf_tensor step,
                   tf_tensor grad_divisor, tf_tensor found_nonfinite,
                   const struct tf_adamw *options) {
  return tf_guard([&] {
    at::NoGradGuard no_grad;
    TensorList steps(len, ref(step));
    at::_fused_adamw_(list(params, len), list(grads, len), list(exp_avgs, len),
                      list(exp_avg_sqs, len), {}, steps, options->learning_rate, options->beta1,
                      options->beta2, options->weight_decay, options->epsilon,
                      /*amsgrad=*/false, /*maximize=*/false, ref(grad_divisor),
                      ref(found_nonfinite));
  });
}

namespace {
// libtorch's own linear would save the weight under its version counter, and refuse the backward pass
// once a scratch buffer was written to in between.
struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x,
                            const at::Tensor &weight, const std::optional<at::Tensor> &bias) {
    context->saved_data["weight"] = weight;
    return at::linear(x, weight, bias);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext *context,
                                               torch::autograd::tensor_list grads) {
    return {at::matmul(grads[0], context->saved_data["weight"].toTensor()), at::Tensor(), at::Tensor()};
  }
};
}  // namespace

int tf_frozen_linear(tf_tensor x, tf_tensor weight, tf_tensor bias, tf_tensor *out) {
  return tf_guard([&] {
    std::optional<at::Tensor> given;
    if (bias != nullptr) given = ref(bias);
    *out = new at::Tensor(FrozenLinear::apply(ref(x), ref(weight), given));
  });
}

int tf_foreach_norm(const tf_tensor *tensors, size_t len, tf_tensor *norms) {
  return tf_guard([&] {
    auto result = at::_foreach_norm(list(tensors, len), 2);
    for (size_t i = 0; i < len; ++i) norms[i] = new at::Tensor(std::move(result[i]));
  });
}

int tf_cpu_bf16_matmul_is_native(int *native) {
  return tf_guard([&] {
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("mkldnn::_is_mkldnn_bf16_supported", "")
                         .typed<bool()>();
    *native = op.call();
  });
}

bool simd::has_avx512() {
#if SIMD_AVX512
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          at::get_cpu_capability() == "AVX512";
  return has;
#else
  return false;
#endif
}

int tf_set_deterministic(int on) {
  return tf_guard([&] {
    at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    at::globalContext().setDeterministicMkldnn(on != 0);
    // Filling fresh memory with NaN costs a pass over every tensor; all of ours are written.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

void tf_keep_freed_memory(void) {
#ifdef __GLIBC__
  // 32 MiB is the most that glibc takes from its heap instead of from the system.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TOP_PAD, 64 << 20);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

int tf_data_ptr(tf_tensor tensor, void **data) {
  return tf_guard([&] {
    TORCH_CHECK(ref(tensor).device().is_cpu(), "tensor is not on the CPU");
    *data = ref(tensor).data_ptr();
  });
}
