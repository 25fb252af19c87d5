// Tensors to pointers for what of fused.h is not differentiable.
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "fused_tensors.h"

using namespace fused_tensors;

namespace {

// A target outside the vocabulary would be read and written outside the row. A GPU is not waited for.
void check_targets(const int64_t *targets, int64_t rows, int64_t vocab, int64_t ignored) {
  const auto is_bad = [&](int64_t target) { return target != ignored && (target < 0 || target >= vocab); };
  const auto *bad = std::find_if(targets, targets + rows, is_bad);
  if (bad == targets + rows) return;
  TORCH_CHECK(false, "target ", *bad, " of row ", bad - targets, " is outside the vocabulary of ",
              vocab, " and not the ignored ", ignored);
}

bool is_direct(const at::Tensor &into, const at::Tensor &grad, bool is_cuda) {
  return is_known(into) && is_known(grad) && into.is_contiguous() && grad.is_contiguous() &&
         into.is_cuda() == is_cuda && grad.device() == into.device();
}

}  // namespace

int tf_softmax_cross_entropy_(tf_tensor logits_cv, tf_tensor targets_c, int64_t ignored, tf_tensor *losses_c) {
  return tf_guard([&] {
    const at::Tensor &logits = ref(logits_cv), &targets = ref(targets_c);
    at::Tensor losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
    const fused_cross_entropy args{logits.data_ptr(), dtype_of(logits), logits.size(0), logits.size(1),
                                   targets.const_data_ptr<int64_t>(), ignored, losses.mutable_data_ptr<float>()};
    if (args.rows > 0) {
      if (logits.is_cpu()) check_targets(args.targets, args.rows, args.vocab, ignored);
      run_on_device_of(logits, fused_cpu::softmax_cross_entropy, fused_cuda::softmax_cross_entropy, args);
    }
    *losses_c = new at::Tensor(std::move(losses));
  });
}

int tf_accumulate(const tf_tensor *into, const tf_tensor *grads, size_t len, int first) {
  return tf_guard([&] {
    const at::NoGradGuard no_grad;
    if (len == 0) return;
    const at::Tensor &device_of_all = ref(into[0]);
    std::vector<fused_pair> pairs;
    std::vector<size_t> others, direct;
    for (size_t i = 0; i < len; ++i) {
      const at::Tensor &to = ref(into[i]), &grad = ref(grads[i]);
      if (!is_direct(to, grad, device_of_all.is_cuda()) || to.device() != device_of_all.device()) {
        others.push_back(i);
      } else if (to.numel() > 0) {
        direct.push_back(i);
        pairs.push_back({to.data_ptr(), grad.const_data_ptr(), to.numel(), dtype_of(to), dtype_of(grad)});
      }
    }
    const auto cpu = [&] {
      if (!fused_cpu::accumulate(pairs.data(), pairs.size(), first != 0)) {
        others.insert(others.end(), direct.begin(), direct.end());
      }
    };
    const auto cuda = [&](void *stream) { fused_cuda::accumulate(pairs.data(), pairs.size(), first != 0, stream); };
    if (!pairs.empty()) run_on_device_of(device_of_all, cpu, cuda);
    for (const size_t i : others) {
      if (first) {
        ref(into[i]).copy_(ref(grads[i]));
      } else {
        ref(into[i]).add_(ref(grads[i]));
      }
    }
  });
}
