// GELU, tanh form, on the CPU: one exponential and one reciprocal per element in AVX-512, where libtorch
// calls a tanh for each vector. Computed in fp32, rounded once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "capi.h"
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

// As many elements as fill a register, widened; the first `len` where there are fewer.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kVectors = 1;
  static constexpr int64_t kLen = 16;
  GELU_INLINE static __mmask16 mask(int64_t len) { return len >= kLen ? 0xffff : (1u << len) - 1; }
  GELU_INLINE static void load(const float *p, int64_t len, __m512 *values) {
    values[0] = _mm512_maskz_loadu_ps(mask(len), p);
  }
  GELU_INLINE static void store(float *p, int64_t len, const __m512 *values) {
    _mm512_mask_storeu_ps(p, mask(len), values[0]);
  }
};
// Even elements in one vector and odd ones in the other: no lane changes its place.
template <>
struct Lanes<at::BFloat16> {
  static constexpr int kVectors = 2;
  static constexpr int64_t kLen = 32;
  GELU_INLINE static __mmask32 mask(int64_t len) { return len >= kLen ? 0xffffffffu : (1u << len) - 1; }
  GELU_INLINE static void load(const at::BFloat16 *p, int64_t len, __m512 *values) {
    const __m512i raw = _mm512_maskz_loadu_epi16(mask(len), p);
    values[0] = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    values[1] = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(0xffff0000)));
  }
  GELU_INLINE static void store(at::BFloat16 *p, int64_t len, const __m512 *values) {
    const __m512i even = _mm512_srli_epi32(rounded(values[0]), 16);
    _mm512_mask_storeu_epi16(p, mask(len), _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded(values[1])));
  }
  // By hand: the conversion instruction would flush denormals. The result is in the high half.
  GELU_INLINE static __m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  }
};

// With u = sqrt(2/pi) (x + 0.044715 x^3), (1 + tanh u) / 2 is the sigmoid of 2u. From e = exp(-|2u|) <= 1
// it follows without overflow and, for negative x, without cancellation.
struct Sigmoid {
  __m512 e;
  __m512 inverse;  // 1 / (1 + e)
  __mmask16 negative;
};

GELU_INLINE Sigmoid sigmoid_2u(__m512 x, __m512 x2) {
  // 2u / ln 2.
  const __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(x2, _mm512_set1_ps(0.10294324f), _mm512_set1_ps(2.3022082f)));
  // Below -200, e is 0 in fp32. NaN passes: max returns its second operand then.
  const __m512 minus = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_or_ps(t, _mm512_set1_ps(-0.0f)));
  const __m512 whole = _mm512_roundscale_ps(minus, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(minus, whole);
  // 2^f on [-1/2, 1/2], relative error 2e-9 before rounding.
  __m512 e = _mm512_set1_ps(1.5345812e-4f);
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.3399931e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(9.618489e-3f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.055503288f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.24022647f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.6931472f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.0f));
  e = _mm512_scalef_ps(e, whole);
  const __m512 sum = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
  // 14 bits and one Newton step.
  const __m512 near = _mm512_rcp14_ps(sum);
  const __m512 inverse = _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2.0f)));
  return {e, inverse, _mm512_movepi32_mask(_mm512_castps_si512(t))};
}

GELU_INLINE __m512 value16(__m512 x) {
  const Sigmoid s = sigmoid_2u(x, _mm512_mul_ps(x, x));
  return _mm512_mul_ps(_mm512_mask_mul_ps(x, s.negative, x, s.e), s.inverse);
}

GELU_INLINE __m512 derivative16(__m512 x) {
  // Nothing changes beyond 16, and infinity times 0 is avoided.
  x = _mm512_max_ps(_mm512_set1_ps(-16.0f), _mm512_min_ps(_mm512_set1_ps(16.0f), x));
  const __m512 x2 = _mm512_mul_ps(x, x);
  const Sigmoid s = sigmoid_2u(x, x2);
  // x times the derivative of 2u.
  const __m512 slope =
      _mm512_mul_ps(x, _mm512_fmadd_ps(x2, _mm512_set1_ps(0.21406445f), _mm512_set1_ps(1.5957691f)));
  const __m512 smaller = _mm512_mul_ps(s.e, s.inverse);
  const __m512 value = _mm512_mask_mov_ps(s.inverse, s.negative, smaller);
  return _mm512_fmadd_ps(_mm512_mul_ps(s.inverse, smaller), slope, value);
}

template <typename T>
GELU_TARGET void forward_range(const T *x, T *out, int64_t len) {
  for (int64_t i = 0; i < len; i += Lanes<T>::kLen) {
    __m512 values[Lanes<T>::kVectors];
    Lanes<T>::load(x + i, len - i, values);
    for (__m512 &value : values) value = value16(value);
    Lanes<T>::store(out + i, len - i, values);
  }
}

template <typename T>
GELU_TARGET void backward_range(const T *grad, const T *x, T *out, int64_t len) {
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
