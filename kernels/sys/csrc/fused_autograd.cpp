// What of fused.h is differentiable: nodes of libtorch's graph that save no more than the backward pass reads.
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "fused_tensors.h"
#include "simd.h"

using namespace fused_tensors;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

namespace {

const void *data_or_null(const at::Tensor &x) { return x.defined() ? x.const_data_ptr() : nullptr; }

float *floats_or_null(const at::Tensor &x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; }

// [.., D] as a matrix. There is at least one element.
int64_t columns_of(const at::Tensor &x) { return x.size(-1); }
int64_t rows_of(const at::Tensor &x) { return x.numel() / columns_of(x); }

// Whether the kernels take x `[.., D]` and vectors `[D]` beside it; else libtorch does.
bool suits(const at::Tensor &x, at::TensorList vectors) {
  if (!is_known(x) || x.dim() == 0 || x.numel() == 0 || !(x.is_cuda() || simd::has_avx512())) return false;
  return std::all_of(vectors.begin(), vectors.end(), [&](const at::Tensor &v) {
    return v.scalar_type() == x.scalar_type() && v.device() == x.device() && v.dim() == 1 && v.size(0) == columns_of(x);
  });
}

void once_only(const char *op) { TORCH_CHECK(!at::GradMode::is_enabled(), op, " has no second derivative"); }

// Partial sums over the rows of x, and from them the sums.
struct RowSums {
  at::Tensor partials;
  int64_t sums = 0;

  RowSums(const at::Tensor &x, int64_t sums, bool wanted) : sums(sums) {
    if (wanted) partials = at::empty({fused_parts(rows_of(x)), sums, columns_of(x)}, x.options().dtype(at::kFloat));
  }
  float *data() const { return partials.defined() ? partials.mutable_data_ptr<float>() : nullptr; }
  // Of x's dtype; undefined where they were not wanted.
  std::vector<at::Tensor> finish(const at::Tensor &x) const {
    std::vector<at::Tensor> results(sums);
    if (!partials.defined()) return results;
    std::vector<void *> outs;
    for (at::Tensor &result : results) {
      result = at::empty({columns_of(x)}, x.options());
      outs.push_back(result.mutable_data_ptr());
    }
    run_on_device_of(x, fused_cpu::sum_parts, fused_cuda::sum_parts, static_cast<const float *>(data()),
                     partials.size(0), sums, columns_of(x), static_cast<void *const *>(outs.data()), dtype_of(x));
    return results;
  }
};

// Without a bias it is RMS norm.
struct LayerNorm : Function<LayerNorm> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x_, const at::Tensor &weight_,
                            const std::optional<at::Tensor> &bias_, double epsilon) {
    const at::Tensor x = x_.contiguous(), weight = weight_.contiguous();
    const at::Tensor bias = bias_.has_value() ? bias_->contiguous() : at::Tensor();
    const auto statistics = x.options().dtype(at::kFloat);
    at::Tensor out = at::empty_like(x), mean, rstd = at::empty({rows_of(x)}, statistics);
    if (bias.defined()) mean = at::empty_like(rstd);
    run_on_device_of(x, fused_cpu::layer_norm, fused_cuda::layer_norm,
                     fused_layer_norm{x.const_data_ptr(), weight.const_data_ptr(), data_or_null(bias),
                                      out.mutable_data_ptr(), floats_or_null(mean), floats_or_null(rstd), dtype_of(x),
                                      rows_of(x), columns_of(x), epsilon});
    context->save_for_backward({x, weight, mean, rstd});
    return out;
  }
  static tensor_list backward(AutogradContext *context, tensor_list grads) {
    once_only("layer norm");
    const auto saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &rstd = saved[3];
    const at::Tensor dout = grads[0].contiguous();
    at::Tensor dx = at::empty_like(x), row_sums;
    if (x.is_cuda()) row_sums = at::empty({rows_of(x), 2}, rstd.options());
    const bool has_bias = mean.defined();
    const bool needs_weight = context->needs_input_grad(1), needs_bias = has_bias && context->needs_input_grad(2);
    const RowSums sums(x, has_bias ? 2 : 1, needs_weight || needs_bias);
    run_on_device_of(x, fused_cpu::layer_norm_grad, fused_cuda::layer_norm_grad,
                     fused_layer_norm_grad{dout.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                                           floats_or_null(mean), floats_or_null(rstd), dx.mutable_data_ptr(),
                                           floats_or_null(row_sums), sums.data(), dtype_of(x), rows_of(x),
                                           columns_of(x)});
    const auto vectors = sums.finish(x);
    return {dx, needs_weight ? vectors[0] : at::Tensor(), needs_bias ? vectors[1] : at::Tensor(), at::Tensor()};
  }
};

struct BiasGelu : Function<BiasGelu> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x_, const at::Tensor &bias_, bool tanh_form) {
    const at::Tensor x = x_.contiguous(), bias = bias_.contiguous();
    at::Tensor out = at::empty_like(x);
    run(nullptr, x, bias, out, nullptr, tanh_form);
    context->save_for_backward({x, bias});
    context->saved_data["tanh_form"] = tanh_form;
    return out;
  }
  static tensor_list backward(AutogradContext *context, tensor_list grads) {
    once_only("GELU with a bias");
    const auto saved = context->get_saved_variables();
    const at::Tensor dout = grads[0].contiguous(), &x = saved[0];
    at::Tensor dx = at::empty_like(x);
    const RowSums sums(x, 1, context->needs_input_grad(1));
    run(dout.const_data_ptr(), x, saved[1], dx, sums.data(), context->saved_data["tanh_form"].toBool());
    return {dx, sums.finish(x)[0], at::Tensor()};
  }
  static void run(const void *dout, const at::Tensor &x, const at::Tensor &bias, const at::Tensor &out,
                  float *partials, bool tanh_form) {
    run_on_device_of(x, fused_cpu::bias_gelu, fused_cuda::bias_gelu,
                     fused_bias_gelu{dout, x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), partials,
                                     dtype_of(x), rows_of(x), columns_of(x), tanh_form});
  }
};

struct Gated : Function<Gated> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &gate_, const at::Tensor &up_) {
    const at::Tensor gate = gate_.contiguous(), up = up_.contiguous();
    at::Tensor out = at::empty_like(gate);
    run(nullptr, gate, up, out.mutable_data_ptr(), nullptr);
    context->save_for_backward({gate, up});
    return out;
  }
  static tensor_list backward(AutogradContext *context, tensor_list grads) {
    once_only("a gated SiLU");
    const auto saved = context->get_saved_variables();
    const at::Tensor dout = grads[0].contiguous();
    at::Tensor dgate = at::empty_like(saved[0]), dup = at::empty_like(saved[0]);
    run(dout.const_data_ptr(), saved[0], saved[1], dgate.mutable_data_ptr(), dup.mutable_data_ptr());
    return {dgate, dup};
  }
  static void run(const void *dout, const at::Tensor &gate, const at::Tensor &up, void *out, void *dup) {
    run_on_device_of(gate, fused_cpu::gated, fused_cuda::gated,
                     fused_gated{dout, gate.const_data_ptr(), up.const_data_ptr(), out, dup, dtype_of(gate),
                                 gate.numel()});
  }
};

struct Rotate : Function<Rotate> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x_, const at::Tensor &turns) {
    context->save_for_backward({turns});
    return run(x_.contiguous(), turns, false);
  }
  static tensor_list backward(AutogradContext *context, tensor_list grads) {
    once_only("a rotation");
    return {run(grads[0].contiguous(), context->get_saved_variables()[0], true), at::Tensor()};
  }
  static at::Tensor run(const at::Tensor &x, const at::Tensor &turns, bool back) {
    at::Tensor out = at::empty_like(x);
    const int64_t pairs = turns.size(2);
    run_on_device_of(x, fused_cpu::rotate, fused_cuda::rotate,
                     fused_rotation{x.const_data_ptr(), turns.const_data_ptr<float>(), out.mutable_data_ptr(),
                                    dtype_of(x), rows_of(x), columns_of(x) / (2 * pairs), pairs, turns.size(0), back});
    return out;
  }
};

// The same in libtorch's operations.
at::Tensor rotate_plainly(const at::Tensor &x, const at::Tensor &turns) {
  const int64_t pairs = turns.size(2), width = columns_of(x);
  const at::Tensor halves = x.reshape({-1, turns.size(0), width / (2 * pairs), 2, pairs});
  const at::Tensor a = halves.select(3, 0), b = halves.select(3, 1);
  const at::Tensor near = turns.to(x.scalar_type()).unsqueeze(1);
  const at::Tensor cosines = near.select(2, 0), sines = near.select(2, 1);
  return at::stack({a * cosines - b * sines, b * cosines + a * sines}, 3).reshape(x.sizes());
}

fused_mask mask_of(double probability, int64_t seed, int64_t stream) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(stream),
          static_cast<uint64_t>(std::floor(std::ldexp(probability, 32))),
          static_cast<float>(1.0 / (1.0 - probability))};
}

struct ResidualDropout : Function<ResidualDropout> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &residual_, const at::Tensor &x_,
                            const std::optional<at::Tensor> &bias_, double probability, int64_t seed, int64_t stream) {
    const at::Tensor residual = residual_.contiguous(), x = x_.contiguous();
    const at::Tensor bias = bias_.has_value() ? bias_->contiguous() : at::Tensor();
    context->saved_data["probability"] = probability;
    context->saved_data["seed"] = seed;
    context->saved_data["stream"] = stream;
    context->saved_data["has_bias"] = bias.defined();
    at::Tensor out = at::empty_like(x);
    if (x.numel() == 0) return out;
    run(residual.const_data_ptr(), x, data_or_null(bias), out.mutable_data_ptr(), nullptr,
        mask_of(probability, seed, stream));
    return out;
  }
  static tensor_list backward(AutogradContext *context, tensor_list grads) {
    once_only("dropout");
    auto &saved = context->saved_data;
    const bool has_bias = saved["has_bias"].toBool();
    const double probability = saved["probability"].toDouble();
    const bool needs_bias = has_bias && context->needs_input_grad(2);
    const at::Tensor dout = grads[0].contiguous();
    if (dout.numel() == 0) {
      const at::Tensor dbias = needs_bias ? at::zeros({columns_of(dout)}, dout.options()) : at::Tensor();
      return {dout, dout, dbias, {}, {}, {}};
    }
    // Of a mask that keeps everything the gradient is what came.
    const bool needs_dx = probability > 0.0 && context->needs_input_grad(1);
    at::Tensor dx = needs_dx ? at::empty_like(dout) : dout;
    const RowSums sums(dout, 1, needs_bias);
    if (needs_dx || needs_bias) {
      run(nullptr, dout, nullptr, needs_dx ? dx.mutable_data_ptr() : nullptr, sums.data(),
          mask_of(probability, saved["seed"].toInt(), saved["stream"].toInt()));
    }
    return {dout, dx, sums.finish(dout)[0], {}, {}, {}};
  }
  static void run(const void *residual, const at::Tensor &x, const void *bias, void *out, float *partials,
                  const fused_mask &mask) {
    run_on_device_of(x, fused_cpu::residual_dropout, fused_cuda::residual_dropout,
                     fused_dropout{residual, x.const_data_ptr(), bias, out, partials, dtype_of(x), rows_of(x),
                                   columns_of(x), mask});
  }
};

}  // namespace

int tf_layer_norm(tf_tensor x_, tf_tensor weight_, tf_tensor bias_, double epsilon, tf_tensor *out) {
  return tf_guard([&] {
    const at::Tensor &x = ref(x_), &weight = ref(weight_);
    std::optional<at::Tensor> bias;
    if (bias_ != nullptr) bias = ref(bias_);
    const bool own = bias.has_value() ? suits(x, {weight, *bias}) : suits(x, {weight});
    *out = new at::Tensor(own                ? LayerNorm::apply(x, weight, bias, epsilon)
                          : bias.has_value() ? at::layer_norm(x, weight.sizes(), weight, bias, epsilon)
                                             : at::rms_norm(x, weight.sizes(), weight, epsilon));
  });
}

int tf_gated(tf_tensor gate_, tf_tensor up_, tf_tensor *out) {
  return tf_guard([&] {
    const at::Tensor &gate = ref(gate_), &up = ref(up_);
    const bool own = suits(gate, {}) && up.scalar_type() == gate.scalar_type() && up.device() == gate.device() &&
                     up.sizes() == gate.sizes();
    *out = new at::Tensor(own ? Gated::apply(gate, up) : at::silu(gate) * up);
  });
}

int tf_rotate(tf_tensor x_, tf_tensor turns_, tf_tensor *out) {
  return tf_guard([&] {
    const at::Tensor &x = ref(x_), &turns = ref(turns_);
    *out = new at::Tensor(suits(x, {}) ? Rotate::apply(x, turns) : rotate_plainly(x, turns));
  });
}

int tf_bias_gelu(tf_tensor x_, tf_tensor bias_, int tanh_form, tf_tensor *out) {
  return tf_guard([&] {
    const at::Tensor &x = ref(x_), &bias = ref(bias_);
    // The exact form on a CPU has no loop of ours.
    const bool own = suits(x, {bias}) && (tanh_form || x.is_cuda());
    *out = new at::Tensor(own ? BiasGelu::apply(x, bias, tanh_form != 0)
                              : at::gelu(x + bias, tanh_form ? "tanh" : "none"));
  });
}

int tf_residual_dropout(tf_tensor residual, tf_tensor x, tf_tensor bias, double probability, int64_t seed,
                        int64_t stream, tf_tensor *out) {
  return tf_guard([&] {
    std::optional<at::Tensor> given;
    if (bias != nullptr) given = ref(bias);
    *out = new at::Tensor(ResidualDropout::apply(ref(residual), ref(x), given, probability, seed, stream));
  });
}
