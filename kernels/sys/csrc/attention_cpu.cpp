// Attention on the CPU. The forward pass is libtorch's; its backward pass uses no matrix instructions, so
// this one replaces it for bf16: the flash algorithm over libtorch's brgemm (AMX where there is one).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "attention_cpu.h"
#include "guard.h"

namespace {

at::Tensor libtorch_attention(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, bool causal) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0.0, causal, std::nullopt, /*enable_gqa=*/true);
}

#if ATTENTION_AVX512
using namespace attention_simd;
namespace blas = at::native::cpublas;

// Partial sums of dK and dV at least, whatever the number of threads: their order of summation is fixed.
constexpr int64_t kParts = 16;
constexpr int64_t kLeastQueries = 16;

int64_t tiles(int64_t len, int64_t tile) { return (len + tile - 1) / tile; }

Rows rows_of(const at::Tensor &x_bhtc, int64_t batch, int64_t head) {
  return {static_cast<BFloat16 *>(x_bhtc.data_ptr()) + batch * x_bhtc.stride(0) + head * x_bhtc.stride(1),
          x_bhtc.stride(2)};
}

template <typename T>
T *take(char *&memory, int64_t len) {
  T *taken = reinterpret_cast<T *>(memory);
  memory += tiles(len * sizeof(T), 64) * 64;
  return taken;
}

// What one thread works in: it stays in the second-level cache.
struct Scratch {
  static int64_t bytes(int64_t c) { return kQueries * (c * 12 + kKeys * 14 + 8); }
  Scratch(char *memory, int64_t c)
      : q(take<BFloat16>(memory, kQueries * c)), dout(take<BFloat16>(memory, kQueries * c)),
        q_t(take<BFloat16>(memory, kQueries * c)), dout_t(take<BFloat16>(memory, kQueries * c)),
        p_pairs(take<BFloat16>(memory, kQueries * kKeys)), ds(take<BFloat16>(memory, kQueries * kKeys)),
        ds_pairs(take<BFloat16>(memory, kQueries * kKeys)), dq(take<float>(memory, kQueries * c)),
        scores(take<float>(memory, kQueries * kKeys)), dp(take<float>(memory, kQueries * kKeys)),
        minus_lse(take<float>(memory, kQueries)), delta(take<float>(memory, kQueries)) {}
  BFloat16 *q, *dout, *q_t, *dout_t, *p_pairs, *ds, *ds_pairs;
  float *dq, *scores, *dp, *minus_lse, *delta;
};

// Runs body(task, thread) for every task; a thread that is done takes the next.
template <typename Body>
void run_tasks(int64_t tasks, int64_t threads, const Body &body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
    for (int64_t thread = first; thread < end; ++thread) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, thread);
    }
    blas::brgemm_release();
  });
}

struct Backward {
  const at::Tensor q, k, v, out, lse, dout;
  const bool causal;
  const int64_t B = q.size(0), H = q.size(1), K = k.size(1), T = q.size(2), C = q.size(3);
  const int64_t key_tiles = tiles(T, kKeys), query_tiles = tiles(T, kQueries);
  // Of a packed operand with C columns.
  const int64_t width = C % 64 == 0 ? 64 : 32;
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(C)));
  // A group is the query heads of one (batch, kv head). Its query tiles are dealt to `parts` tasks, which sum
  // dK and dV each for itself.
  const int64_t groups = B * K, heads = H / K, units = heads * query_tiles;
  const int64_t parts = std::min(units, tiles(kParts, groups));
  // K transposed, V transposed and K, packed, of each key tile of each group.
  const int64_t tile_len = kKeys * C, packed_len = 3 * tile_len;
  at::Tensor packed, sums, scratch, dq, dk, dv;
  std::vector<int64_t> reached = std::vector<int64_t>(groups * parts);  // key tiles that a task has summed

  BFloat16 *packed_at(int64_t group, int64_t tile) const {
    return static_cast<BFloat16 *>(packed.data_ptr()) + (group * key_tiles + tile) * packed_len;
  }
  // dK^T and dV^T [C, kKeys] of a task.
  float *sum_at(int64_t task, int64_t tile, int64_t which) const {
    return static_cast<float *>(sums.data_ptr()) + ((task * key_tiles + tile) * 2 + which) * tile_len;
  }

  // [batch, rows, heads, C] in memory, as the projections that made them want their gradients.
  static at::Tensor grad_like(const at::Tensor &x) {
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  }

  void run() {
    const int64_t threads = at::get_num_threads();
    const int64_t scratch_bytes = tiles(Scratch::bytes(C), 4096) * 4096;
    packed = at::empty({groups * key_tiles * packed_len}, q.options());
    sums = at::empty({groups * parts * key_tiles * 2 * tile_len}, q.options().dtype(at::kFloat));
    scratch = at::empty({threads * scratch_bytes}, q.options().dtype(at::kByte));
    dq = grad_like(q), dk = grad_like(k), dv = grad_like(v);
    char *base = static_cast<char *>(scratch.data_ptr());
    const auto memory = [&](int64_t thread) { return base + thread * scratch_bytes; };
    run_tasks(groups * key_tiles, threads, [&](int64_t task, int64_t thread) {
      pack_tile(task / key_tiles, task % key_tiles, reinterpret_cast<BFloat16 *>(memory(thread)));
    });
    run_tasks(groups * parts, threads, [&](int64_t task, int64_t thread) {
      const Scratch buffers(memory(thread), C);
      for (int64_t unit = task % parts * units / parts; unit < (task % parts + 1) * units / parts; ++unit) {
        // Long tiles beside short ones, so that tasks come out even.
        const int64_t rank = unit % query_tiles;
        const int64_t tile = rank % 2 == 0 ? rank / 2 : query_tiles - 1 - rank / 2;
        query_tile(task, unit / query_tiles, tile, buffers);
      }
    });
    run_tasks(groups * key_tiles, threads,
              [&](int64_t task, int64_t) { sum_tile(task / key_tiles, task % key_tiles); });
  }

  void pack_tile(int64_t group, int64_t tile, BFloat16 *dense) const {
    const int64_t first = tile * kKeys, valid = std::min(kKeys, T - first);
    BFloat16 *to = packed_at(group, tile);
    const Rows k_rows = rows_of(k, group / K, group % K), v_rows = rows_of(v, group / K, group % K);
    copy_rows({v_rows.row(first), v_rows.stride}, valid, kKeys, C, dense);
    pack_transposed(dense, C, to + tile_len);
    copy_rows({k_rows.row(first), k_rows.stride}, valid, kKeys, C, dense);
    pack_transposed(dense, C, to);
    pack_pairs(dense, C, width, to + 2 * tile_len);
  }

  void query_tile(int64_t task, int64_t head_in_group, int64_t tile, const Scratch &s) {
    const int64_t group = task / parts, batch = group / K, head = group % K * heads + head_in_group;
    const int64_t first = tile * kQueries, valid = std::min(kQueries, T - first), rows = tiles(valid, 32) * 32;
    const Rows q_rows = rows_of(q, batch, head), dout_rows = rows_of(dout, batch, head);
    const Rows out_rows = rows_of(out, batch, head), dq_rows = rows_of(dq, batch, head);
    copy_rows({q_rows.row(first), q_rows.stride}, valid, rows, C, s.q);
    copy_rows({dout_rows.row(first), dout_rows.stride}, valid, rows, C, s.dout);
    transpose_rows(s.q, rows, C, s.q_t);
    transpose_rows(s.dout, rows, C, s.dout_t);
    row_dots(s.dout, {out_rows.row(first), out_rows.stride}, valid, C, s.delta);
    const float *lse_at = lse.const_data_ptr<float>() + batch * lse.stride(0) + head * lse.stride(1);
    for (int64_t i = 0; i < valid; ++i) s.minus_lse[i] = -kLog2E * lse_at[(first + i) * lse.stride(2)];
    std::fill(s.minus_lse + valid, s.minus_lse + rows, 0.0f);
    std::fill(s.delta + valid, s.delta + rows, 0.0f);

    const int64_t end = causal ? std::min(key_tiles, tiles(first + valid, kKeys)) : key_tiles;
    for (int64_t j = 0; j < end; ++j) {
      // Queries before the tile's first key see none of it.
      const int64_t skip = causal ? std::max<int64_t>(0, j * kKeys - first) : 0, m = rows - skip;
      const BFloat16 *k_t = packed_at(group, j), *v_t = k_t + tile_len, *k_pairs = v_t + tile_len;
      blas::brgemm(m, kKeys, C, C, kKeys, kKeys, false, s.q + skip * C, k_t, s.scores);
      blas::brgemm(m, kKeys, C, C, kKeys, kKeys, false, s.dout + skip * C, v_t, s.dp);
      const Softmax softmax{s.scores,  s.dp, s.minus_lse + skip, s.delta + skip,
                            s.p_pairs, s.ds, s.ds_pairs,         scale};
      // In a causal tile a padding query may see padding keys: both are zero, and dropped.
      softmax_backward(softmax, m, causal ? first + skip + 1 - j * kKeys : T - j * kKeys, causal ? 1 : 0);
      const bool add = j < reached[task];
      blas::brgemm(C, kKeys, m, kQueries, kKeys, kKeys, add, s.q_t + skip, s.ds_pairs, sum_at(task, j, 0));
      blas::brgemm(C, kKeys, m, kQueries, kKeys, kKeys, add, s.dout_t + skip, s.p_pairs, sum_at(task, j, 1));
      for (int64_t col = 0; col < C; col += width) {
        blas::brgemm(m, width, kKeys, kKeys, width, C, j > 0, s.ds, k_pairs + col * kKeys, s.dq + skip * C + col);
      }
    }
    reached[task] = std::max(reached[task], end);
    round_rows(s.dq, valid, C, {dq_rows.row(first), dq_rows.stride});
  }

  void sum_tile(int64_t group, int64_t tile) const {
    const int64_t first = tile * kKeys, valid = std::min(kKeys, T - first);
    for (int64_t which = 0; which < 2; ++which) {
      std::vector<const float *> found;
      for (int64_t task = group * parts; task < (group + 1) * parts; ++task) {
        if (tile < reached[task]) found.push_back(sum_at(task, tile, which));
      }
      const Rows to = rows_of(which == 0 ? dk : dv, group / K, group % K);
      sum_parts(found, valid, C, {to.row(first), to.stride});
    }
  }
};

bool has_native_bf16() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bf16") && blas::could_pack(at::kBFloat16);
  return has;
}

// Whether the backward pass above is right and pays off.
bool suits(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v) {
  for (const at::Tensor *x : {&q, &k, &v}) {
    if (!x->device().is_cpu() || x->layout() != at::kStrided || x->scalar_type() != at::kBFloat16) return false;
    if (x->dim() != 4 || x->stride(3) != 1) return false;
  }
  const int64_t K = k.size(1), T = q.size(2), C = q.size(3);
  return has_native_bf16() && at::GradMode::is_enabled() &&
         (q.requires_grad() || k.requires_grad() || v.requires_grad()) && q.numel() > 0 && K > 0 &&
         q.size(1) % K == 0 && k.size(0) == q.size(0) && k.size(2) == T && k.size(3) == C &&
         v.sizes() == k.sizes() && C % 32 == 0 && C <= 256 && T >= kLeastQueries;
}

// A head of K for each of Q, as libtorch would repeat them.
at::Tensor expand_heads(const at::Tensor &x, int64_t heads) {
  if (x.size(1) == heads) return x;
  if (x.size(1) == 1) return x.expand({-1, heads, -1, -1});
  return x.repeat_interleave(heads / x.size(1), 1);
}

struct Attention : torch::autograd::Function<Attention> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &q, const at::Tensor &k,
                            const at::Tensor &v, bool causal) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        q, expand_heads(k, q.size(1)), expand_heads(v, q.size(1)), 0.0, causal);
    context->save_for_backward({q, k, v, out, lse});
    context->saved_data["causal"] = causal;
    return out;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext *context,
                                               torch::autograd::tensor_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "attention has no second derivative");
    const auto saved = context->get_saved_variables();
    const at::Tensor dout = grads[0].stride(3) == 1 ? grads[0] : grads[0].contiguous();
    Backward pass{saved[0], saved[1], saved[2], saved[3], saved[4], dout, context->saved_data["causal"].toBool()};
    pass.run();
    return {pass.dq, pass.dk, pass.dv, at::Tensor()};
  }
};
#endif

at::Tensor attention(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, bool causal) {
#if ATTENTION_AVX512
  if (suits(q, k, v)) return Attention::apply(q, k, v, causal);
#endif
  return libtorch_attention(q, k, v, causal);
}

}  // namespace

int tf_attention_cpu(tf_tensor q_bhtc, tf_tensor k_bksc, tf_tensor v_bksc, int causal, tf_tensor *out_bhtc) {
  return tf_guard([&] {
    *out_bhtc = new at::Tensor(attention(*static_cast<at::Tensor *>(q_bhtc), *static_cast<at::Tensor *>(k_bksc),
                                         *static_cast<at::Tensor *>(v_bksc), causal != 0));
  });
}

int tf_attention_backend(tf_tensor q_bhtc, tf_tensor k_bksc, tf_tensor v_bksc, double dropout, int *backend) {
  return tf_guard([&] {
    const at::Tensor &q = *static_cast<at::Tensor *>(q_bhtc), &k = *static_cast<at::Tensor *>(k_bksc);
    const at::Tensor &v = *static_cast<at::Tensor *>(v_bksc);
#if ATTENTION_AVX512
    if (dropout == 0.0 && suits(q, k, v)) {
      *backend = TF_ATTENTION_OWN;
      return;
    }
#endif
    *backend = static_cast<int>(at::_fused_sdp_choice(q, k, v, {}, dropout, /*is_causal=*/true, std::nullopt,
                                                      /*enable_gqa=*/true));
  });
}
