// Launching kernels: attributes set once per device, overlap with the kernel before.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>

#include "common/check.h"

namespace specvlm {

// Allows a kernel that much dynamic shared memory and asks for the shared-memory side of L1, so that kernels that
// alternate do not make the SMs change over. Only the first call on a device costs anything. BIG_CLUSTERS: of up to 16
// CTAs, where 8 is what every GPU can place.
template <auto KERNEL, bool BIG_CLUSTERS = false>
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
  if (BIG_CLUSTERS)
    check_cuda(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  if (device < kDevices) allowed[device].store(dynamic_shared + 1, std::memory_order_relaxed);
}

// Launches a kernel that may start while the one before it in the stream drains: it must wait for that one
// (overlap.cuh) before it touches anything that the other wrote or reads. cluster: CTAs along x that form one.
template <typename... Parameters, typename... Arguments>
void launch_overlapped_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster, int dynamic_shared,
                                cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, int dynamic_shared, cudaStream_t stream,
                       const Arguments&... arguments) {
  launch_overlapped_clusters(kernel, grid, block, 1, dynamic_shared, stream, arguments...);
}

}  // namespace specvlm
