// What fused.cpp and fused_autograd.cpp share: tensors to pointers, and the device that they lie on.
#pragma once
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>

#include "fused.h"
#include "guard.h"

void *tf_current_stream(int device);

namespace fused_tensors {

inline at::Tensor &ref(tf_tensor tensor) { return *static_cast<at::Tensor *>(tensor); }

// Whether the kernels know this kind of tensor at all.
inline bool is_known(const at::Tensor &x) {
  return (x.is_cpu() || x.is_cuda()) && x.layout() == at::kStrided &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

inline fused_dtype dtype_of(const at::Tensor &x) {
  TORCH_CHECK(is_known(x), "expected fp32 or bf16 on a CPU or a CUDA device, got ", x.scalar_type(), " on ",
              x.device());
  return x.scalar_type() == at::kFloat ? FUSED_F32 : FUSED_BF16;
}

// Runs `cpu(args...)`, or `cuda(args..., stream)` on the device of `x`, as its current device.
template <typename Cpu, typename Cuda, typename... Args>
void run_on_device_of(const at::Tensor &x, Cpu cpu, Cuda cuda, const Args &...args) {
  if (x.is_cuda()) {
    const at::OptionalDeviceGuard guard(at::device_of(x));
    cuda(args..., tf_current_stream(x.get_device()));
  } else {
    cpu(args...);
  }
}

}  // namespace fused_tensors
