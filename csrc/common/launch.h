// Launching kernels: attributes set once per device, overlap with the kernel before.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>

#include "common/check.h"

namespace specvlm {

// Allows a kernel that much dynamic shared memory and asks for the shared-memory side of L1, so that kernels that
// alternate do not make the SMs change over. Only the first call on a device costs anything.
template <auto KERNEL>
void prepare_kernel(int dynamic_shared) {
  constexpr int kDevices = 64;
  static std::atomic<int> allowed[kDevices];  // 1 + bytes
  int device;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) > dynamic_shared) return;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) > dynamic_shared) return;
  check_cuda(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_shared),
             "shared memory");
  check_cuda(
      cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "shared memory carveout");
  if (device < kDevices) allowed[device].store(dynamic_shared + 1, std::memory_order_relaxed);
}

// Launches a kernel that may start while the one before it in the stream drains: it must wait for that one
// (overlap.cuh) before it touches anything that the other wrote or reads.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, int dynamic_shared, cudaStream_t stream,
                       const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace specvlm
