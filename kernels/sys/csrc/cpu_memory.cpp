// Counts what CPU tensors take: an allocator around libtorch's own. A header in front of each tensor holds
// its size, so that whoever frees it, on whatever thread, finds it.
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <limits>
#include <mutex>

#include "guard.h"

namespace {

std::atomic<int64_t> allocated{0}, allocated_peak{0};

// As long as libtorch's alignment, which the tensor behind it keeps.
struct alignas(64) Header {
  int64_t bytes;
  void *context;
  c10::DeleterFnPtr deleter;
};
static_assert(sizeof(Header) == 64);

void free_counted(void *data) {
  if (data == nullptr) return;
  const Header header = *(static_cast<Header *>(data) - 1);
  header.deleter(header.context);
  allocated.fetch_sub(header.bytes, std::memory_order_relaxed);
}

class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator *inner) : inner_(inner) {}

  // The context is the data, as raw_allocate() and raw_deallocate() require.
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_counted, c10::Device(c10::DeviceType::CPU)};
    TORCH_CHECK(bytes <= std::numeric_limits<int64_t>::max() - sizeof(Header), bytes,
                " bytes are more than a CPU tensor can have");
    c10::DataPtr given = inner_->allocate(bytes + sizeof(Header));
    auto *header = static_cast<Header *>(given.get());
    const c10::DeleterFnPtr deleter = given.get_deleter();
    *header = {static_cast<int64_t>(bytes), given.release_context(), deleter};
    count(static_cast<int64_t>(bytes));
    return {header + 1, header + 1, &free_counted, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_counted; }

  void copy_data(void *to, const void *from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void count(int64_t bytes) {
    const int64_t now = allocated.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    int64_t peak = allocated_peak.load(std::memory_order_relaxed);
    while (peak < now && !allocated_peak.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
    }
  }

  c10::Allocator *inner_;
};

}  // namespace

int tf_count_cpu_memory(void) {
  return tf_guard([] {
    static std::once_flag once;
    std::call_once(once, [] {
      // Never freed: tensors may outlive every destructor.
      auto *counting = new CountingAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(counting, std::numeric_limits<uint8_t>::max());
    });
  });
}

void tf_cpu_memory(struct tf_cpu_memory *memory) {
  memory->allocated = allocated.load(std::memory_order_relaxed);
  memory->allocated_peak = allocated_peak.load(std::memory_order_relaxed);
}

void tf_cpu_reset_peak(void) {
  allocated_peak.store(allocated.load(std::memory_order_relaxed), std::memory_order_relaxed);
}
