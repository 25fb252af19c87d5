// Tensors to pointers for quant.h, on the device where they lie. Shapes and dtypes were checked by the
// safe layer; what is checked here is only what it cannot see.
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "guard.h"
#include "quant.h"

void *tf_current_stream(int device);

namespace {

at::Tensor &ref(tf_tensor tensor) { return *static_cast<at::Tensor *>(tensor); }

quant_dtype dtype_of(const at::Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return QUANT_F32;
    case at::kBFloat16: return QUANT_BF16;
    case at::kHalf: return QUANT_F16;
    default: TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " cannot be quantised");
  }
}

// Kernels are launched on the current device: the guard of each call makes it the tensor's.
void *stream_of(const at::Tensor &tensor) { return tf_current_stream(tensor.get_device()); }

template <typename T>
T *data(const at::Tensor &tensor) {
  return static_cast<T *>(tensor.data_ptr());
}

}  // namespace

int tf_quantize_4bit(tf_tensor values_, int code_, int64_t block, tf_tensor codes_, tf_tensor absmax_) {
  return tf_guard([&] {
    const at::Tensor &values = ref(values_), &codes = ref(codes_), &absmax = ref(absmax_);
    const auto code = static_cast<quant_code>(code_);
    const at::OptionalDeviceGuard guard(at::device_of(values));
    if (values.is_cuda()) {
      quant_cuda::quantize_4bit(values.data_ptr(), dtype_of(values), values.numel(), code, block,
                                data<uint8_t>(codes), data<float>(absmax), stream_of(values));
    } else {
      quant_cpu::quantize_4bit(values.data_ptr(), dtype_of(values), values.numel(), code, block,
                               data<uint8_t>(codes), data<float>(absmax));
    }
  });
}

int tf_serial_mean(tf_tensor values, tf_tensor out) {
  return tf_guard([&] {
    // libtorch adds up as on one thread while it believes to be inside a parallel region.
    const c10::ParallelGuard guard(true);
    ref(out).copy_(ref(values).mean().view_as(ref(out)));
  });
}

int tf_dequantize_4bit(tf_tensor codes_, tf_tensor absmax_, const struct tf_nested_scales *nested, int code_,
                       int64_t block, tf_tensor out_) {
  return tf_guard([&] {
    const at::Tensor &codes = ref(codes_), &out = ref(out_);
    const auto code = static_cast<quant_code>(code_);
    quant_scales scales{data<const float>(ref(absmax_)), nullptr, nullptr, nullptr};
    if (nested != nullptr) {
      scales.codes = data<const uint8_t>(ref(nested->codes));
      scales.code8 = data<const float>(ref(nested->code8));
      scales.offset = data<const float>(ref(nested->offset));
    }
    const at::OptionalDeviceGuard guard(at::device_of(out));
    if (out.is_cuda()) {
      quant_cuda::dequantize_4bit(data<const uint8_t>(codes), scales, out.numel(), code, block, out.data_ptr(),
                                  dtype_of(out), stream_of(out));
    } else {
      quant_cpu::dequantize_4bit(data<const uint8_t>(codes), scales, out.numel(), code, block, out.data_ptr(),
                                 dtype_of(out));
    }
  });
}

int tf_quantize_8bit(tf_tensor values_, tf_tensor code8_, int64_t block, int is_signed, tf_tensor codes_,
                     tf_tensor absmax_) {
  return tf_guard([&] {
    const at::Tensor &values = ref(values_);
    const auto *in = data<const float>(values), *code8 = data<const float>(ref(code8_));
    auto *codes = data<uint8_t>(ref(codes_));
    auto *absmax = data<float>(ref(absmax_));
    const at::OptionalDeviceGuard guard(at::device_of(values));
    if (is_signed) {
      TORCH_CHECK(values.is_cpu(), "moments are encoded on the CPU");
      quant_cpu::quantize_8bit_signed(in, values.numel(), code8, block, codes, absmax);
    } else if (values.is_cuda()) {
      quant_cuda::quantize_8bit(in, values.numel(), code8, block, codes, absmax, stream_of(values));
    } else {
      quant_cpu::quantize_8bit(in, values.numel(), code8, block, codes, absmax);
    }
  });
}

int tf_dequantize_8bit(tf_tensor codes_, tf_tensor absmax_, tf_tensor code8_, int64_t block, tf_tensor out_) {
  return tf_guard([&] {
    const at::Tensor &out = ref(out_);
    const auto *codes = data<const uint8_t>(ref(codes_));
    const auto *absmax = data<const float>(ref(absmax_)), *code8 = data<const float>(ref(code8_));
    const at::OptionalDeviceGuard guard(at::device_of(out));
    if (out.is_cuda()) {
      quant_cuda::dequantize_8bit(codes, absmax, out.numel(), code8, block, data<float>(out), stream_of(out));
    } else {
      quant_cpu::dequantize_8bit(codes, absmax, out.numel(), code8, block, data<float>(out));
    }
  });
}

int tf_quantize_int8_rows(tf_tensor values_, tf_tensor codes_, tf_tensor scales_) {
  return tf_guard([&] {
    const at::Tensor &values = ref(values_);
    auto *codes = data<int8_t>(ref(codes_));
    auto *scales = data<float>(ref(scales_));
    const auto rows = values.size(0), columns = values.size(1);
    const at::OptionalDeviceGuard guard(at::device_of(values));
    if (values.is_cuda()) {
      quant_cuda::quantize_int8_rows(values.data_ptr(), dtype_of(values), rows, columns, codes, scales,
                                     stream_of(values));
    } else {
      quant_cpu::quantize_int8_rows(values.data_ptr(), dtype_of(values), rows, columns, codes, scales);
    }
  });
}

int tf_dequantize_int8_rows(tf_tensor codes_, tf_tensor scales_, tf_tensor out_) {
  return tf_guard([&] {
    const at::Tensor &out = ref(out_);
    const auto *codes = data<const int8_t>(ref(codes_));
    const auto *scales = data<const float>(ref(scales_));
    const auto rows = out.size(0), columns = out.size(1);
    const at::OptionalDeviceGuard guard(at::device_of(out));
    if (out.is_cuda()) {
      quant_cuda::dequantize_int8_rows(codes, scales, rows, columns, out.data_ptr(), dtype_of(out), stream_of(out));
    } else {
      quant_cpu::dequantize_int8_rows(codes, scales, rows, columns, out.data_ptr(), dtype_of(out));
    }
  });
}

// Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", as bitsandbytes builds it: means
// of equal steps from 0.1 to 1, one decade of magnitude for each exponent.
int tf_dynamic_code(int is_signed, tf_tensor *out) {
  return tf_guard([&] {
    constexpr int kExponents = 7;
    std::vector<double> values{0.0, 1.0};
    auto take = [&](const at::Tensor &means, double factor) {
      const at::Tensor scaled = means * factor;
      for (int64_t i = 0; i < scaled.numel(); ++i) values.push_back(scaled[i].item<double>());
    };
    for (int i = 0; i < kExponents; ++i) {
      const int64_t items = (int64_t{1} << (is_signed ? i : i + 1)) + 1;
      const at::Tensor steps = at::linspace(0.1, 1.0, items, at::kFloat);
      const at::Tensor means = (steps.slice(0, 0, -1) + steps.slice(0, 1)) / 2.0;
      const double decade = std::pow(10.0, static_cast<double>(i - (kExponents - 1)));
      take(means, decade);
      if (is_signed) take(means, -decade);
    }
    std::sort(values.begin(), values.end());
    at::Tensor table = at::tensor(values, at::kDouble).to(at::kFloat);
    TORCH_CHECK(table.numel() == 256, "a code of ", table.numel(), " values");
    *out = new at::Tensor(std::move(table));
  });
}

int tf_adamw_8bit(const struct tf_adamw_8bit_state *state, int64_t step, const struct tf_adamw *options) {
  return tf_guard([&] {
    const at::Tensor &param = ref(state->param);
    quant_adamw8 raw{
        data<float>(param), data<const float>(ref(state->grad)),
        data<uint8_t>(ref(state->exp_avg)), data<float>(ref(state->exp_avg_scales)),
        data<uint8_t>(ref(state->exp_avg_sq)), data<float>(ref(state->exp_avg_sq_scales)),
        data<const float>(ref(state->signed8)), data<const float>(ref(state->unsigned8)),
        data<const float>(ref(state->grad_divisor)), data<const float>(ref(state->found_nonfinite)),
        param.numel(), step, options->learning_rate, options->beta1, options->beta2, options->weight_decay,
        options->epsilon};
    const at::OptionalDeviceGuard guard(at::device_of(param));
    if (param.is_cuda()) {
      quant_cuda::adamw_8bit(raw, stream_of(param));
    } else {
      quant_cpu::adamw_8bit(raw);
    }
  });
}
