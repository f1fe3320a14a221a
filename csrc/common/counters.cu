#include <atomic>
#include <mutex>

#include "common/check.h"
#include "common/counters.h"

namespace specvlm {
namespace {

constexpr int kCountersPerRegion = 1 << 16;
constexpr int kMaxDevices = 64;

// In the module's own memory: zero when the module is loaded, no allocation, so also usable while capturing.
__device__ std::uint32_t counters[2 * kCountersPerRegion];

std::uint32_t* base_of_current_device() {
  static std::mutex mutex;
  static std::uint32_t* bases[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_argument(device < kMaxDevices, "device: expected an index below ", kMaxDevices, ", got ", device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (bases[device] == nullptr) {
    void* address = nullptr;
    check_cuda(cudaGetSymbolAddress(&address, counters), "cudaGetSymbolAddress(counters)");
    bases[device] = static_cast<std::uint32_t*>(address);
  }
  return bases[device];
}

}  // namespace

std::uint32_t* acquire_counters(int count, cudaStream_t stream) {
  check_argument(count > 0 && count <= kCountersPerRegion, "counters: expected 1..", kCountersPerRegion, ", got ",
                 count);
  static std::atomic<std::uint32_t> next[2];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  const int region = status == cudaStreamCaptureStatusNone ? 0 : 1;
  std::uint32_t start = 0, taken = next[region].load(std::memory_order_relaxed);
  do {  // a block of counters never wraps around the end of its region
    start = taken + count <= kCountersPerRegion ? taken : 0;
  } while (!next[region].compare_exchange_weak(taken, start + count, std::memory_order_relaxed));
  return base_of_current_device() + region * kCountersPerRegion + start;
}

}  // namespace specvlm
