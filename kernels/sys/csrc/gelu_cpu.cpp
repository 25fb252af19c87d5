// GELU, tanh form, on the CPU: one exponential and one reciprocal per element in AVX-512, where libtorch
// calls a tanh for each vector. Computed in fp32, rounded once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gelu_cpu.h"
#include "guard.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GELU_AVX512 1
#else
#define GELU_AVX512 0
#endif

namespace {

// Elements that one thread takes at least: below, starting it costs more.
constexpr int64_t kGrain = 1 << 14;

#if GELU_AVX512
// Always inlined: the development profile compiles with -O1, which would call them.
#define GELU_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline)) inline
#define GELU_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
}

GELU_INLINE __m512 load16(const float *p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
GELU_INLINE __m512 load16(const at::BFloat16 *p, __mmask16 lanes) {
  const __m256i raw = _mm256_maskz_loadu_epi16(lanes, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
GELU_INLINE void store16(float *p, __mmask16 lanes, __m512 values) { _mm512_mask_storeu_ps(p, lanes, values); }
// By hand: the conversion instruction would flush denormals.
GELU_INLINE void store16(at::BFloat16 *p, __mmask16 lanes, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// With u = sqrt(2/pi) (x + 0.044715 x^3), (1 + tanh u) / 2 is the sigmoid of 2u. From e = exp(-|2u|) <= 1
// it follows without overflow and, for negative x, without cancellation.
struct Sigmoid {
  __m512 value;
  __m512 rest;  // 1 - value
  __m512 x;     // clamped
  __m512 x2;
};

GELU_INLINE Sigmoid sigmoid_2u(__m512 x) {
  // Beyond 16, e is 0 in fp32. NaN passes: min and max return their second operand then.
  x = _mm512_max_ps(_mm512_set1_ps(-16.0f), _mm512_min_ps(_mm512_set1_ps(16.0f), x));
  const __m512 x2 = _mm512_mul_ps(x, x);
  // 2u / ln 2.
  const __m512 t = _mm512_mul_ps(
      x, _mm512_fmadd_ps(x2, _mm512_set1_ps(0.10294324f), _mm512_set1_ps(2.3022082f)));
  const __m512 minus = _mm512_or_ps(t, _mm512_set1_ps(-0.0f));
  const __m512 whole = _mm512_roundscale_ps(minus, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(minus, whole);
  // 2^f on [-1/2, 1/2], relative error 1e-7.
  __m512 e = _mm512_set1_ps(1.3276472e-3f);
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(9.6755415e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.055507133f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.2402212f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.69314697f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.0000001f));
  e = _mm512_scalef_ps(e, whole);
  const __m512 sum = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
  // 14 bits and one Newton step.
  __m512 larger = _mm512_rcp14_ps(sum);
  larger = _mm512_mul_ps(larger, _mm512_fnmadd_ps(sum, larger, _mm512_set1_ps(2.0f)));
  const __m512 smaller = _mm512_mul_ps(e, larger);
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(t));
  return {_mm512_mask_mov_ps(larger, negative, smaller), _mm512_mask_mov_ps(smaller, negative, larger), x, x2};
}

template <typename T>
GELU_TARGET void forward_range(const T *x, T *out, int64_t len) {
  for (int64_t i = 0; i < len; i += 16) {
    const __mmask16 lanes = len - i >= 16 ? 0xffff : (1u << (len - i)) - 1;
    const __m512 value = load16(x + i, lanes);
    store16(out + i, lanes, _mm512_mul_ps(value, sigmoid_2u(value).value));
  }
}

template <typename T>
GELU_TARGET void backward_range(const T *grad, const T *x, T *out, int64_t len) {
  for (int64_t i = 0; i < len; i += 16) {
    const __mmask16 lanes = len - i >= 16 ? 0xffff : (1u << (len - i)) - 1;
    const Sigmoid s = sigmoid_2u(load16(x + i, lanes));
    // x times the derivative of 2u.
    const __m512 slope = _mm512_mul_ps(
        s.x, _mm512_fmadd_ps(s.x2, _mm512_set1_ps(0.21406445f), _mm512_set1_ps(1.5957691f)));
    const __m512 derivative = _mm512_fmadd_ps(_mm512_mul_ps(s.value, s.rest), slope, s.value);
    store16(out + i, lanes, _mm512_mul_ps(load16(grad + i, lanes), derivative));
  }
}

// Whether the loops above take it; else libtorch does.
bool suits(const at::Tensor &x) {
  return has_avx512() && x.device().is_cpu() && x.layout() == at::kStrided && x.is_contiguous() &&
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
#if GELU_AVX512
  if (tanh_form && suits(x)) return GeluTanh::apply(x);
#endif
  return at::gelu(x, tanh_form ? "tanh" : "none");
}

}  // namespace

int tf_gelu_cpu(tf_tensor x, int tanh_form, tf_tensor *out) {
  return tf_guard([&] { *out = new at::Tensor(gelu(*static_cast<at::Tensor *>(x), tanh_form != 0)); });
}
