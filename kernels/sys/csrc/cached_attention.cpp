// Tensors to pointers for cached_attention.h. Shapes and dtypes were checked by the safe layer.
#include <ATen/core/grad_mode.h>

#include <vector>

#include "cached_attention.h"
#include "fused_tensors.h"

using fused_tensors::ref;

int tf_cached_attention(tf_tensor qkv_, int64_t heads, int64_t kv_heads, const struct tf_cached_run *runs, size_t len,
                        tf_tensor *out_) {
  return tf_guard([&] {
    const at::NoGradGuard no_grad;
    const at::Tensor qkv = ref(qkv_).contiguous();
    const int64_t head_dim = qkv.size(1) / (heads + 2 * kv_heads);
    at::Tensor out = at::empty({qkv.size(0), heads * head_dim}, qkv.options());
    std::vector<cached_run> raw;
    for (const tf_cached_run *run = runs; run != runs + len; ++run) {
      raw.push_back({ref(run->k).data_ptr(), ref(run->v).data_ptr(), ref(run->k).size(1), run->cached, run->first,
                     run->tokens});
    }
    const cached_attention args{qkv.const_data_ptr(),
                                out.mutable_data_ptr(),
                                fused_tensors::dtype_of(qkv),
                                heads,
                                kv_heads,
                                head_dim,
                                static_cast<int64_t>(len),
                                raw.data()};
    *out_ = cached_attention_cpu(args) ? new at::Tensor(std::move(out)) : nullptr;
  });
}
