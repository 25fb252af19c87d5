// The same contract on a build without CUDA headers: every call says so.
#include "guard.h"

int tf_cuda_memory(int, struct tf_cuda_memory *) { return tf_no_cuda("reading GPU memory"); }
int tf_cuda_reset_peak(int) { return tf_no_cuda("resetting GPU memory peaks"); }
int tf_cuda_uuid(int, uint8_t *) { return tf_no_cuda("reading a GPU's identity"); }
int tf_cuda_managed_zeros(int64_t, int, tf_tensor *) { return tf_no_cuda("allocating managed memory"); }
void *tf_current_stream(int) { return nullptr; }
int tf_nccl_join(int, int, int, const struct tf_store *, int64_t, tf_nccl **) {
  return tf_no_cuda("joining an NCCL group (this build has no CUDA)");
}
int tf_nccl_all_gather(tf_nccl *, tf_tensor, tf_tensor, tf_work **) { return tf_no_cuda("all-gather"); }
int tf_nccl_reduce_scatter(tf_nccl *, tf_tensor, tf_tensor, tf_work **) { return tf_no_cuda("reduce-scatter"); }
int tf_nccl_all_reduce(tf_nccl *, tf_tensor, tf_work **) { return tf_no_cuda("all-reduce"); }
int tf_nccl_wait(tf_work *) { return tf_no_cuda("waiting for a collective"); }
int tf_nccl_is_complete(tf_work *, int *) { return tf_no_cuda("looking at a collective"); }
void tf_work_free(tf_work *) {}
int tf_nccl_abort(tf_nccl *) { return tf_no_cuda("aborting a group"); }
void tf_nccl_free(tf_nccl *) {}
