// Loads around the L1.
#pragma once

namespace specvlm {

// A value from the L2. A kernel may look at lengths before the kernel ahead of it in the stream has ended, to bring
// near what it is likely to need; the L1 must not remember them.
__device__ __forceinline__ int load_anew(const int* address) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
}

}  // namespace specvlm
