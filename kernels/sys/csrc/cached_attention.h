/* Attention of a few new tokens over the keys and values of their sequences, on a CPU: what a step of completions
 * needs. Reads the cache once, in place; raw pointers, no libtorch. A row's result does not depend on the others. */
#pragma once
#include "fused.h"

/* A sequence: keys and values [kv_heads, capacity, head_dim], `cached` of which count. */
struct cached_run {
  void *k, *v;
  int64_t capacity, cached;
  int64_t first, tokens; /* its new tokens among the rows */
};

struct cached_attention {
  const void *qkv; /* [rows, (heads + 2 kv_heads) head_dim]: all queries of a token, its keys, its values */
  void *out;       /* [rows, heads head_dim] */
  fused_dtype dtype; /* of all */
  int64_t heads, kv_heads, head_dim, runs;
  const cached_run *run;
};

/* Adds the new tokens to the caches, and writes what they see among all tokens up to themselves. False where the CPU has
 * no AVX-512, or a head is no multiple of 16 wide or wider than 256. */
bool cached_attention_cpu(const cached_attention &args);
