// GPU memory figures and the NCCL communicator: libtorch's own c10d::ProcessGroupNCCL, with its
// streams, watchdog and abort. Compiled whenever the CUDA headers are there; see no_cuda.cpp.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstring>

#include "guard.h"

void *tf_current_stream(int device) { return at::cuda::getCurrentCUDAStream(device).stream(); }

namespace {

using c10d::ProcessGroupNCCL;

// The bootstrap's key-value store, served by the caller: no port of c10d's own is opened.
class CallbackStore : public c10d::Store {
 public:
  explicit CallbackStore(const tf_store &callbacks) : callbacks_(callbacks) {}

  void set(const std::string &key, const std::vector<uint8_t> &value) override {
    TORCH_CHECK(callbacks_.set(callbacks_.context, key.data(), key.size(), value.data(),
                               value.size()) == 0,
                "storing bootstrap key ", key);
  }

  std::vector<uint8_t> get(const std::string &key) override {
    std::vector<uint8_t> value(64 * 1024);
    size_t len = value.size();
    TORCH_CHECK(
        callbacks_.get(callbacks_.context, key.data(), key.size(), value.data(), &len) == 0,
        "waiting for bootstrap key ", key);
    value.resize(len);
    return value;
  }

  // c10d's watchdog polls for keys of its own (dump and error signals), which nobody sets here.
  bool check(const std::vector<std::string> &) override { return false; }
  int64_t add(const std::string &, int64_t value) override { return value; }
  bool deleteKey(const std::string &) override { return false; }
  int64_t getNumKeys() override { return 0; }
  void wait(const std::vector<std::string> &keys) override {
    for (const auto &key : keys) get(key);
  }
  void wait(const std::vector<std::string> &keys, const std::chrono::milliseconds &) override {
    wait(keys);
  }
  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::make_intrusive<CallbackStore>(callbacks_);
  }

 private:
  tf_store callbacks_;
};

at::Tensor &ref(tf_tensor tensor) { return *static_cast<at::Tensor *>(tensor); }

}  // namespace

int tf_cuda_managed_zeros(int64_t len, int device, tf_tensor *out) {
  if (at::cuda::device_count() == 0) return tf_no_cuda("allocating managed memory");
  return tf_guard([&] {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    void *memory = nullptr;
    C10_CUDA_CHECK(cudaMallocManaged(&memory, static_cast<size_t>(len) * sizeof(float)));
    auto options = at::TensorOptions().dtype(at::kFloat).device(at::kCUDA, device);
    // Freed late, when the process may be ending: a failure then means nothing.
    at::Tensor tensor = at::from_blob(memory, {len}, [](void *p) { (void)cudaFree(p); }, options);
    tensor.zero_();
    *out = new at::Tensor(std::move(tensor));
  });
}

struct tf_nccl {
  c10::intrusive_ptr<ProcessGroupNCCL> group;
};

struct tf_work {
  c10::intrusive_ptr<c10d::Work> work;
};

int tf_cuda_memory(int device, struct tf_cuda_memory *memory) {
  if (c10::cuda::device_count() == 0) return tf_no_cuda("reading GPU memory");
  return tf_guard([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    memory->allocated = stats.allocated_bytes[all].current;
    memory->allocated_peak = stats.allocated_bytes[all].peak;
    memory->reserved = stats.reserved_bytes[all].current;
    memory->reserved_peak = stats.reserved_bytes[all].peak;
  });
}

int tf_cuda_reset_peak(int device) {
  if (c10::cuda::device_count() == 0) return tf_no_cuda("resetting GPU memory peaks");
  return tf_guard([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

int tf_cuda_uuid(int device, uint8_t *uuid) {
  if (c10::cuda::device_count() == 0) return tf_no_cuda("reading a GPU's identity");
  return tf_guard([&] {
    // libtorch's own copy: the CUDA runtime itself is not linked.
    const auto *properties = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(device));
    static_assert(sizeof(properties->uuid.bytes) == 16);
    std::memcpy(uuid, properties->uuid.bytes, sizeof(properties->uuid.bytes));
  });
}

int tf_nccl_join(int rank, int world, int device, const struct tf_store *store,
                 int64_t timeout_ms, tf_nccl **group) {
  if (c10::cuda::device_count() == 0) return tf_no_cuda("joining an NCCL group");
  return tf_guard([&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto options = ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/true);
    options->timeout = std::chrono::milliseconds(timeout_ms);
    auto joined = c10::make_intrusive<ProcessGroupNCCL>(
        c10::make_intrusive<CallbackStore>(*store), rank, world, options);
    // Connect now: a group that cannot form must say so before the first step.
    joined->eagerConnectSingleDevice(
        at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *group = new tf_nccl{std::move(joined)};
  });
}

int tf_nccl_all_gather(tf_nccl *group, tf_tensor output, tf_tensor input, tf_work **work) {
  return tf_guard([&] {
    *work = new tf_work{group->group->_allgather_base(ref(output), ref(input))};
  });
}

int tf_nccl_reduce_scatter(tf_nccl *group, tf_tensor output, tf_tensor input, tf_work **work) {
  return tf_guard([&] {
    *work = new tf_work{group->group->_reduce_scatter_base(ref(output), ref(input))};
  });
}

int tf_nccl_all_reduce(tf_nccl *group, tf_tensor tensor, tf_work **work) {
  return tf_guard([&] {
    std::vector<at::Tensor> tensors{ref(tensor)};
    *work = new tf_work{group->group->allreduce(tensors)};
  });
}

int tf_nccl_wait(tf_work *work) {
  return tf_guard([&] { work->work->wait(); });
}

int tf_nccl_is_complete(tf_work *work, int *complete) {
  return tf_guard([&] {
    // To c10d a failed operation is a completed one.
    *complete = work->work->isCompleted() && work->work->exception() == nullptr;
  });
}

void tf_work_free(tf_work *work) { delete work; }

int tf_nccl_abort(tf_nccl *group) {
  return tf_guard([&] { group->group->abort(); });
}

void tf_nccl_free(tf_nccl *group) {
  tf_guard([&] { group->group->shutdown(); });
  delete group;
}
