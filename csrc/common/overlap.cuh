// Where launches overlap, the device's side of launch_overlapped (launch.h). Both do nothing below compute capability
// 9.0, and where the launch before or after does not overlap.
#pragma once

namespace specvlm {

// What the launch before wrote is there. Every CTA has to wait: whoever waits for this launch then waits for both.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next launch may start as soon as all CTAs have come here.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

}  // namespace specvlm
