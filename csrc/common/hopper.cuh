// Hopper's asynchronous machinery: shared-memory matrix descriptors, wgmma, TMA, named barriers.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cuda/ptx>

#include "common/ampere.cuh"
#include "common/wgmma_register_shapes.cuh"
#include "common/wgmma_shapes.cuh"

namespace specvlm {

namespace ptx = cuda::ptx;

// Descriptor of a tile in 128-byte swizzled layout: rows of 128 bytes in groups of 8 (1024 bytes, aligned to that).
// K-major operands: a row is 64 consecutive k. MN-major: a row is 64 consecutive m or n, the 8 rows are k.
// The low half, to which offsets of 16 bytes may be added, holds the address; the high half never changes.
// next: bytes to the next 64 of an MN-major operand's m or n, where there are more.
__device__ __forceinline__ std::uint32_t swizzled_operand(std::uint32_t address, std::uint32_t next = 16) {
  return (next >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// GROUP_STRIDE: bytes from one group of 8 rows to the next.
template <int GROUP_STRIDE = 1024>
__device__ __forceinline__ std::uint64_t swizzled_descriptor(std::uint32_t operand) {
  constexpr std::uint32_t kGroupStride = GROUP_STRIDE >> 4;  // the "stride" offset
  constexpr std::uint32_t kSwizzle128 = 1u << 30;
  return std::uint64_t{kSwizzle128 | kGroupStride} << 32 | operand;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most `PENDING` of the committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across wgmma_wait.
template <int COUNT>
__device__ __forceinline__ void wgmma_keep(float (&acc)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// The same for an operand in registers, which wgmma reads until it is waited for.
template <int STEPS>
__device__ __forceinline__ void wgmma_keep(std::uint32_t (&a)[STEPS][4]) {
#pragma unroll
  for (int i = 0; i < STEPS * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Only if `taking`, without a branch.
__device__ __forceinline__ void named_barrier_if(bool taking, int id, int threads) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p barrier.cta.sync %0, %1;\n}\n" ::"r"(id), "r"(threads),
               "r"(static_cast<int>(taking))
               : "memory");
}

// Counts towards a named barrier without waiting at it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive_if(bool taking, int id, int threads) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p barrier.cta.arrive %0, %1;\n}\n" ::"r"(id), "r"(threads),
               "r"(static_cast<int>(taking))
               : "memory");
}

// A barrier that also says whether any of its threads brought true.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool mine) {
  int any;
  asm volatile(
      "{\n.reg .pred p, r;\nsetp.ne.b32 p, %3, 0;\n"
      "barrier.cta.red.or.pred r, %1, %2, p;\nselp.b32 %0, 1, 0, r;\n}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(mine))
      : "memory");
  return any != 0;
}

// Arrives at the same barrier of another CTA of the cluster, if `arriving`; without a branch. Relaxed: a release would
// be a fence of the whole GPU. So it tells only of reads that have been waited for, as wgmma's.
__device__ __forceinline__ void remote_arrive_if(bool arriving, std::uint64_t* barrier, std::uint32_t rank) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 remote;\nsetp.ne.b32 p, %2, 0;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "@p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank), "r"(static_cast<int>(arriving))
      : "memory");
}

__device__ __forceinline__ void wait_for_phase(std::uint64_t* barrier, std::uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Whether a phase is over; does not wait.
__device__ __forceinline__ bool phase_done(std::uint64_t* barrier, std::uint32_t parity) {
  return ptx::mbarrier_test_wait_parity(barrier, parity);
}

// Writes four 8x8 matrices of 16-bit elements, each transposed; lane i gives the address of row i%8 of matrix i/8.
__device__ __forceinline__ void store_matrices_transposed(std::uint32_t address, std::uint32_t m0, std::uint32_t m1,
                                                          std::uint32_t m2, std::uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(std::uint32_t address, std::uint32_t m0, std::uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address), "r"(m0), "r"(m1)
               : "memory");
}

// Cache hints as the compiler's own createpolicy would give them.
constexpr std::uint64_t kEvictNormal = 0x1000000000000000;
constexpr std::uint64_t kEvictFirst = 0x12F0000000000000;  // read once
constexpr std::uint64_t kEvictLast = 0x14F0000000000000;   // read by many CTAs

// True in one lane of a whole warp. The compiler knows that it is one, and keeps what TMA takes in uniform registers.
__device__ __forceinline__ bool elect_lane() {
  std::uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// Brings a tensor map near, so that the first box need not wait for it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// One box of a 4-dimensional tensor into shared memory; completes on the barrier.
__device__ __forceinline__ void load_box(void* target, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                         std::uint64_t* barrier, std::uint64_t hint = kEvictFirst) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
      : "memory");
}

// The same into the same place of several CTAs of a cluster, on the barrier there; bit i of `ranks` stands for CTA i.
__device__ __forceinline__ void load_box_for_cluster(void* target, const CUtensorMap* map, int c0, int c1, int c2,
                                                     int c3, std::uint64_t* barrier, std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;\n" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(ranks), "l"(kEvictFirst)
      : "memory");
}

// Asks for a box to be brought into the L2; nothing waits for it.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

// load_box or prefetch_box, without a branch: whoever does both, one after the other, then finds the code in the
// caches.
__device__ __forceinline__ void load_or_prefetch_box(bool load, void* target, const CUtensorMap* map, int c0, int c1,
                                                     int c2, int c3, std::uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred load;\nsetp.ne.b32 load, %8, 0;\n"
      "@load cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n"
      "@!load cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%1, {%3, %4, %5, %6}];\n}\n" ::"r"(
          shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(kEvictFirst),
      "r"(static_cast<int>(load))
      : "memory");
}

}  // namespace specvlm
