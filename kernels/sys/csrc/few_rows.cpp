// Tensors to pointers for few_rows.h. Shapes and dtypes were checked by the safe layer.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "few_rows.h"
#include "guard.h"

namespace {

at::Tensor &ref(tf_tensor tensor) { return *static_cast<at::Tensor *>(tensor); }

template <typename T>
const T *data(tf_tensor tensor) {
  return tensor == nullptr ? nullptr : static_cast<const T *>(ref(tensor).const_data_ptr());
}

}  // namespace

int tf_few_rows(tf_tensor x_, const struct tf_held_matrix *matrix, tf_tensor bias_, tf_tensor *out_) {
  return tf_guard([&] {
    const at::NoGradGuard no_grad;
    const at::Tensor x = ref(x_).contiguous();
    const at::Tensor bias = bias_ != nullptr ? ref(bias_).to(x.scalar_type()).contiguous() : at::Tensor();
    at::Tensor out = at::empty({x.size(0), matrix->outputs}, x.options());
    few_rows_product product{};
    product.x = x.const_data_ptr();
    product.dtype = x.scalar_type() == at::kFloat ? QUANT_F32 : QUANT_BF16;
    product.rows = x.size(0);
    product.columns = x.size(1);
    product.outputs = matrix->outputs;
    product.held = static_cast<few_rows_held>(matrix->held);
    product.values = ref(matrix->values).const_data_ptr();
    product.row_scales = data<float>(matrix->scales);
    product.scales = {data<float>(matrix->scales), data<uint8_t>(matrix->nested.codes),
                      data<float>(matrix->nested.code8), data<float>(matrix->nested.offset)};
    product.code = static_cast<quant_code>(matrix->code);
    product.block = matrix->block;
    product.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    product.out = out.mutable_data_ptr();
    *out_ = few_rows_cpu(product) ? new at::Tensor(std::move(out)) : nullptr;
  });
}
