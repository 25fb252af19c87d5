// GELU, tanh form, on the CPU: one exponential and one reciprocal per element in AVX-512, where libtorch
// calls a tanh for each vector. Computed in fp32, rounded once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "capi.h"
#include "gelu_simd.h"
#include "guard.h"

namespace {

// Elements that one thread takes at least: below, starting it costs more.
constexpr int64_t kGrain = 1 << 14;

#if SIMD_AVX512
using namespace gelu_simd;
using simd::Lanes;

template <typename T>
SIMD_TARGET void forward_range(const T *x, T *out, int64_t len) {
  for (int64_t i = 0; i < len; i += Lanes<T>::kLen) {
    __m512 values[Lanes<T>::kVectors];
    Lanes<T>::load(x + i, len - i, values);
    for (__m512 &value : values) value = value16(value);
    Lanes<T>::store(out + i, len - i, values);
  }
}

template <typename T>
SIMD_TARGET void backward_range(const T *grad, const T *x, T *out, int64_t len) {
  for (int64_t i = 0; i < len; i += Lanes<T>::kLen) {
    __m512 values[Lanes<T>::kVectors], grads[Lanes<T>::kVectors];
    Lanes<T>::load(x + i, len - i, values);
    Lanes<T>::load(grad + i, len - i, grads);
    for (int v = 0; v < Lanes<T>::kVectors; ++v) values[v] = _mm512_mul_ps(grads[v], derivative16(values[v]));
    Lanes<T>::store(out + i, len - i, values);
  }
}

// Whether the loops above take it; else libtorch does.
bool suits(const at::Tensor &x) {
  return simd::has_avx512() && x.device().is_cpu() && x.layout() == at::kStrided && x.is_contiguous() &&
         (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat);
}

template <typename T>
at::Tensor forward_of(const at::Tensor &x) {
  at::Tensor out = at::empty_like(x);
  const T *from = x.const_data_ptr<T>();
  T *to = out.mutable_data_ptr<T>();
  at::parallel_for(0, x.numel(), kGrain,
                   [&](int64_t first, int64_t end) { forward_range(from + first, to + first, end - first); });
  return out;
}

template <typename T>
at::Tensor backward_of(const at::Tensor &grad, const at::Tensor &x) {
  at::Tensor out = at::empty_like(x);
  const T *grads = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>();
  T *to = out.mutable_data_ptr<T>();
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t first, int64_t end) {
    backward_range(grads + first, from + first, to + first, end - first);
  });
  return out;
}

struct GeluTanh : torch::autograd::Function<GeluTanh> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x) {
    context->save_for_backward({x});
    return x.scalar_type() == at::kFloat ? forward_of<float>(x) : forward_of<at::BFloat16>(x);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext *context,
                                               torch::autograd::tensor_list grads) {
    const at::Tensor x = context->get_saved_variables()[0];
    // A gradient of the gradient needs libtorch's graph.
    if (at::GradMode::is_enabled() || grads[0].scalar_type() != x.scalar_type()) {
      return {at::gelu_backward(grads[0], x, "tanh")};
    }
    const at::Tensor grad = grads[0].contiguous();
    return {x.scalar_type() == at::kFloat ? backward_of<float>(grad, x) : backward_of<at::BFloat16>(grad, x)};
  }
};
#endif

at::Tensor gelu(const at::Tensor &x, bool tanh_form) {
#if SIMD_AVX512
  if (tanh_form && suits(x)) return GeluTanh::apply(x);
#endif
  return at::gelu(x, tanh_form ? "tanh" : "none");
}

}  // namespace

int tf_gelu_cpu(tf_tensor x, int tanh_form, tf_tensor *out) {
  return tf_guard([&] { *out = new at::Tensor(gelu(*static_cast<at::Tensor *>(x), tanh_form != 0)); });
}
