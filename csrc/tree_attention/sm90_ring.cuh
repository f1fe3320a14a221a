// What the consumers and the producers of the Hopper kernels have between them: a ring of K/V tiles, Q, and the runs.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "tree_attention/sm90_line.cuh"

namespace specvlm {

constexpr int kWarpgroup = 128;
constexpr int kAttentionThreads = 3 * kWarpgroup;  // two warpgroups of consumers, and one whose warps produce
constexpr int kReady = 5;                          // named barriers: the mbarriers are initialized;
constexpr int kAhead = 8;                          // the first run is guessed
constexpr float kLag = 8.0f;  // how far (log2) a score may exceed the running reference before rescaling
// Or, where that is found out behind the exponentials, a sum of them: so much may P be.
template <typename T>
constexpr float kMostGrowth = std::is_same_v<T, __nv_bfloat16> ? 0x1p40f : 0x1p15f;

// 384 threads start with 168 registers each: what a producer thread gives back, two consumers share.
__host__ __device__ constexpr int consumer_registers(int of_a_producer) { return (3 * 168 - of_a_producer) / 2; }

// The warpgroups of consumers take turns at the tensor cores, so that one multiplies while the other takes
// exponentials: named barriers 3 and 4. The second one passes the first turn. Both must take as many turns: one that
// does what the other does not takes none for it. No branches, which would make the compiler serialize the products.
struct Turns {
  int warpgroup;

  __device__ __forceinline__ void take(bool turn = true) const {
    named_barrier_if(turn, 3 + warpgroup, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass(bool turn = true) const {
    named_barrier_arrive_if(turn, 4 - warpgroup, 2 * kWarpgroup);
  }
};

// Read anew where it is needed: kept in a register, or what follows from it, it would cost a spill.
__device__ __forceinline__ int thread_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The kernels' mbarriers in shared memory, and the runs that the producer hands to the consumers.
template <class L>
struct AttentionRing {
  std::uint64_t *full_k, *empty_k, *full_v, *empty_v, *full_q, *empty_q;
  volatile ItemRun* runs;  // one, the next, and one whose end is not out; begin == end: no more

  __device__ explicit AttentionRing(char* shared) {
    full_k = reinterpret_cast<std::uint64_t*>(shared + L::kBarriers);
    empty_k = full_k + L::kStagesK, full_v = empty_k + L::kStagesK, empty_v = full_v + L::kStagesV;
    full_q = empty_v + L::kStagesV, empty_q = full_q + 1;
    runs = reinterpret_cast<volatile ItemRun*>(shared + L::kRuns);
  }
};

// By one thread, before anybody looks at them.
template <class L>
__device__ __forceinline__ void init_ring(const AttentionRing<L>& ring, bool paired = false) {
  const int consumers = paired ? 16 : 8;  // warps that say that they are done with a stage
#pragma unroll
  for (int i = 0; i < L::kStagesK; ++i) {
    ptx::mbarrier_init(ring.full_k + i, 1);
    ptx::mbarrier_init(ring.empty_k + i, consumers);
  }
#pragma unroll
  for (int i = 0; i < L::kStagesV; ++i) {
    ptx::mbarrier_init(ring.full_v + i, 1);
    ptx::mbarrier_init(ring.empty_v + i, consumers);
  }
  ptx::mbarrier_init(ring.full_q, 1);
  ptx::mbarrier_init(ring.empty_q, 8);
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

// Behind init_ring, for all threads of a pair that are still there: the barriers of both are initialized.
__device__ __forceinline__ void meet_pair() {
  ptx::barrier_cluster_arrive(ptx::sem_relaxed);
  ptx::barrier_cluster_wait();
}

// A consumer warp is done with a stage; whoever fills it has to know.
__device__ __forceinline__ void release_stage(std::uint64_t* empty, int lane, bool paired) {
  if (lane == 0) ptx::mbarrier_arrive(empty);
  remote_arrive_if(lane == 1 && paired, empty, blockIdx.x % 2 ^ 1);
}

__device__ __forceinline__ void hand_over(volatile ItemRun* run, const ItemRun& s) {
  run->request = s.request;
  run->head = s.head;
  run->row_tile = s.row_tile;
  run->begin = s.begin;
  run->end = s.end;
  run->item_tiles = s.item_tiles;
  run->context = s.context;
  run->live = s.live;
}

// Asks for the Q of a run; the consumers find the run when Q is there.
template <class L>
__device__ __forceinline__ void load_rows(char* shared, const CUtensorMap& q_map, const RowTiles& rows_of,
                                          const volatile ItemRun* run, std::uint64_t* full_q) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full_q,
                                 L::kHalves * rows_of.rows * 128);
#pragma unroll
  for (int h = 0; h < L::kHalves; ++h)
    load_box(shared + L::kQ + h * L::kRows * 128, &q_map, h * 64, run->head * rows_of.group,
             run->row_tile * rows_of.nodes, run->request, full_q);
}

// For all consumers: clears Q where there is no row, which TMA never writes. What lies there must be finite, and the
// same in every launch: a warp's rows vote together whether their references move.
template <class L>
__device__ __forceinline__ void clear_padding(char* shared, int rows) {
  constexpr int kChunks = L::kHalves * 8;
#pragma unroll 1
  for (int i = rows * kChunks + threadIdx.x; i < L::kRows * kChunks; i += 2 * kWarpgroup)
    *reinterpret_cast<uint4*>(shared + L::kQ + (i % kChunks / 8 * L::kRows + i / kChunks) * 128 + i % 8 * 16) =
        make_uint4(0, 0, 0, 0);
  ptx::fence_proxy_async(ptx::space_shared);
}

// What consumers do before their first run.
template <class L>
__device__ __forceinline__ void begin_consuming(char* shared, int rows, bool paired) {
  clear_padding<L>(shared, rows);
  named_barrier(kReady, 2 * kWarpgroup + 32);
  if (paired) meet_pair();
  wait_for_launch_before();
  let_next_launch_start();
}

// For a warp that goes ahead while the kernel before may still run: Q and the first tiles of a run are brought into the
// L2. The lengths may be old ones then, and so may be the tiles: the L2 stays coherent.
template <class L>
__device__ __forceinline__ void bring_near(const TreeAttentionParams& p, const RowTiles& rows_of, const ItemRun& s,
                                           const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map) {
  constexpr int kTiles = 2;
  const int lane = threadIdx.x % 32;
  if (lane < L::kHalves) prefetch_box(&q_map, lane * 64, s.head * rows_of.group, s.row_tile * rows_of.nodes, s.request);
  const int t = s.begin + lane / L::kHalves;
  if (p.page_table != nullptr || lane / L::kHalves >= kTiles || t >= s.end) return;
  prefetch_box(&k_map, lane % L::kHalves * 64, s.head, t * L::kTile, s.request);
  prefetch_box(&v_map, lane % L::kHalves * 64, s.head, t * L::kTile, s.request);
}

}  // namespace specvlm
