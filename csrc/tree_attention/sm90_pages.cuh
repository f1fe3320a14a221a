// What feeds the Hopper kernels with pages of 1, 2 or 4 tokens. A swizzled TMA box has at least 8 rows, so three warps
// copy the rows of a tile, 16 bytes a thread at a time, to where TMA would have put them.
//
// Of the producer's warpgroup, warps 0, 2 and 3 copy; each walks along the line by itself and waits for nothing but
// free stages, so that the whole ring may be under way. Warp 1 has Q brought near, then hands out the runs, asks
// for Q, and passes on to the consumers what has landed: copies write through the generic proxy, wgmma reads through
// the async proxy, and the fence between the two belongs behind the landing.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "tree_attention/sm90_ring.cuh"

namespace specvlm {

constexpr int kBoxShift = 3;  // log2 of the fewest rows of a swizzled box

// Whether pages are too small for TMA; 0 is a contiguous cache.
constexpr bool pages_are_copied(int page_size) { return page_size != 0 && page_size < 1 << kBoxShift; }

constexpr int kCopiers = 3;
constexpr int kCutCopiers = 6;  // named barriers: warp 0 has cut the line; for the copiers
constexpr int kCutRelay = 7;    // and for warp 1

// Barriers of the stages: all threads of the copiers count as soon as their copies are there.
template <class L>
struct LandedRing {
  std::uint64_t *k, *v;

  __device__ explicit LandedRing(char* shared) {
    k = reinterpret_cast<std::uint64_t*>(shared + L::kLanded);
    v = k + L::kStagesK;
  }
};

template <class L>
__device__ __forceinline__ void init_landed(char* shared) {
  const LandedRing<L> landed(shared);
#pragma unroll
  for (int i = 0; i < L::kStagesK + L::kStagesV; ++i) ptx::mbarrier_init(landed.k + i, 32 * kCopiers);
}

// A place in the ring, as it follows from the tiles before.
template <int STAGES>
struct RingPlace {
  unsigned stage;
  std::uint32_t phase;  // 0 in the first round

  __device__ explicit RingPlace(unsigned tile) : stage(tile % STAGES), phase(tile / STAGES % 2) {}
};

// The share of one copier in the tiles: every third group of 8 rows, kRowsAtOnce of them in a step. A lane looks up the
// page of one row (or two), in such an order that the lanes of a step get it from a fixed place of their kChunks lanes.
template <class L>
struct PageCopier {
  static constexpr unsigned kChunks = L::kHalves * 8;  // of 16 bytes in a row
  static constexpr unsigned kRowsAtOnce = 32 / kChunks;
  static constexpr unsigned kGroupSteps = 8 / kRowsAtOnce;
  static constexpr unsigned kSteps = (L::kTile / 8 + kCopiers - 1) / kCopiers * kGroupSteps;
  static constexpr unsigned kLookups = (kSteps + kChunks - 1) / kChunks;

  const TreeAttentionParams& p;
  unsigned copier, page_shift;

  __device__ __forceinline__ void look_up(int (&pages)[kLookups], int request, int tile) const {
    const unsigned lane = thread_again() % 32u;
#pragma unroll
    for (unsigned i = 0; i < kLookups; ++i) {
      const unsigned step = i * kChunks + lane % kChunks;
      const unsigned row =
          (copier + step / kGroupSteps * kCopiers) * 8 + step % kGroupSteps * kRowsAtOnce + lane / kChunks;
      const unsigned index = (tile * L::kTile + row) >> page_shift;
      pages[i] = 0;
      if (index < static_cast<unsigned>(p.max_pages)) pages[i] = p.page_table[request * p.page_table_stride + index];
    }
  }

  __device__ __forceinline__ void copy(char* stage, const void* base, const TreeAttentionStrides& strides, int head,
                                       int tile, const int (&pages)[kLookups]) const {
    const unsigned lane = thread_again() % 32u, chunk = lane % kChunks, in_step = lane / kChunks;
    const std::uint32_t target = shared_address(stage) + chunk / 8 * (L::kTile * 128) + (copier * 8 + in_step) * 128 +
                                 ((chunk % 8) ^ in_step) * 16;
    const int rest = p.capacity - tile * L::kTile - static_cast<int>(copier * 8 + in_step);  // rows that are not zeros
#pragma unroll
    for (unsigned i = 0; i < kLookups; ++i) {
      const int page = min(max(pages[i], 0), p.pages - 1);
      const int inner = (chunk * kRowsAtOnce + in_step) & (p.page_size - 1);
      const std::uint64_t row = reinterpret_cast<std::uint64_t>(base) +
                                (page * strides.batch + inner * strides.token + head * strides.head) * 2;
#pragma unroll
      for (unsigned j = 0; j < kChunks && i * kChunks + j < kSteps; ++j) {
        const unsigned group = (i * kChunks + j) / kGroupSteps * kCopiers, first = j % kGroupSteps * kRowsAtOnce;
        const std::uint64_t source = __shfl_sync(~0u, row, j, kChunks) + chunk * 16;
        if (group + kCopiers <= L::kTile / 8 || copier + group < L::kTile / 8)
          copy_async((target ^ (first * 16)) + (group * 8 + first) * 128, reinterpret_cast<const void*>(source),
                     static_cast<int>(group * 8 + first) < rest ? 16 : 0);
      }
    }
  }
};

// Warps 0, 2 and 3 of the producer's warpgroup.
template <class L>
__device__ __forceinline__ void copy_tiles(const TeamLine& line, const PageCopier<L>& copier, const int* prefix,
                                           const volatile int* limit, const volatile int* start, char* shared) {
  const TreeAttentionParams& p = line.p;
  const AttentionRing<L> ring(shared);
  const LandedRing<L> landed(shared);
  unsigned tiles = 0;
  for (int unit = *start; unit < *limit;) {
    const ItemRun s = line.run(prefix, unit, *limit, blockIdx.x);
    unit += s.units;
    if (s.begin >= s.end) continue;
    int pages[PageCopier<L>::kLookups];
    copier.look_up(pages, s.request, s.begin);
#pragma unroll 1
    for (int t = s.begin; t < s.end; ++t, ++tiles) {
      const RingPlace<L::kStagesK> k(tiles);
      wait_for_phase(ring.empty_k + k.stage, k.phase ^ 1);
      copier.copy(shared + L::kK + k.stage * L::kTileBytes, p.k, p.k_strides, s.head, t, pages);
      ptx::cp_async_mbarrier_arrive_noinc(landed.k + k.stage);
      int next[PageCopier<L>::kLookups];
      copier.look_up(next, s.request, t + 1);
      const RingPlace<L::kStagesV> v(tiles);
      wait_for_phase(ring.empty_v + v.stage, v.phase ^ 1);
      copier.copy(shared + L::kV + v.stage * L::kTileBytes, p.v, p.v_strides, s.head, t, pages);
      ptx::cp_async_mbarrier_arrive_noinc(landed.v + v.stage);
#pragma unroll
      for (unsigned i = 0; i < PageCopier<L>::kLookups; ++i) pages[i] = next[i];
    }
  }
  copy_async_commit();
  copy_async_wait<0>();  // a thread does not leave before its copies are there
}

// Warp 1, behind the wait.
template <class L>
__device__ __forceinline__ void relay_tiles(const CUtensorMap& q_map, const TeamLine& line, const int* prefix,
                                            const volatile int* limit, const volatile int* start, char* shared) {
  const RowTiles& rows_of = line.rows_of;
  const AttentionRing<L> ring(shared);
  const LandedRing<L> landed(shared);
  const int lane = threadIdx.x % 32;
  volatile ItemRun* run = ring.runs;
  unsigned tiles = 0;
  std::uint32_t q_phase = 1;
  for (int unit = *start; unit < *limit;) {
    const ItemRun s = line.run(prefix, unit, *limit, blockIdx.x);
    unit += s.units;
    if (s.begin >= s.end) continue;
    if (lane == 0) hand_over(run, s);
    wait_for_phase(ring.empty_q, q_phase);
    q_phase ^= 1;
    if (lane == 0) load_rows<L>(shared, q_map, rows_of, run, ring.full_q);
    auto pass_on = [&](std::uint64_t* landed, std::uint32_t phase, std::uint64_t* full) {
      wait_for_phase(landed, phase);
      ptx::fence_proxy_async(ptx::space_shared);
      if (lane == 0) ptx::mbarrier_arrive(full);
    };
#pragma unroll 1
    for (int t = s.begin; t < s.end; ++t, ++tiles) {
      const RingPlace<L::kStagesK> k(tiles);
      pass_on(landed.k + k.stage, k.phase, ring.full_k + k.stage);
      const RingPlace<L::kStagesV> v(tiles);
      pass_on(landed.v + v.stage, v.phase, ring.full_v + v.stage);
    }
    run = run == ring.runs + 2 ? ring.runs : run + 1;
    __syncwarp();
  }
  wait_for_phase(ring.empty_q, q_phase);
  if (lane == 0) {
    run->begin = 0;  // no more
    run->end = 0;
    ptx::mbarrier_arrive(ring.full_q);
  }
}

// What produce is with TMA. Threads from 2 * kWarpgroup on.
template <class L>
__device__ __forceinline__ void produce_by_copies(const TreeAttentionParams& p, const CUtensorMap& q_map,
                                                  const RowTiles& rows_of, int page_shift, char* shared) {
  // the shuffle tells the compiler that a warp agrees on it
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = threadIdx.x % 32;
  const TeamLine line(p, rows_of);
  int* prefix = reinterpret_cast<int*>(shared + L::kPrefix);
  volatile int *limit = prefix + p.batch + 1, *start = limit + 1;
  if (warp == 1) {
    int* guess = prefix + line_ints(p.batch);
    const Cut cut = line.cut(gridDim.y, line.scan(guess));
    const int unit = cut.start(blockIdx.y), end = cut.start(blockIdx.y + 1);
    if (unit < end) {
      const ItemRun s = line.run(guess, unit, end, blockIdx.x);
      if (s.begin < s.end) bring_near<L>(p, rows_of, s, q_map, q_map, q_map);
    }
    wait_for_launch_before();
    named_barrier(kCutRelay, 64);
    relay_tiles<L>(q_map, line, prefix, limit, start, shared);
    return;
  }
  if (warp == 0) {
    if (lane == 0) {
      prefetch_map(&q_map);
      init_landed<L>(shared);
      init_ring(AttentionRing<L>(shared));
    }
    __syncwarp();
    named_barrier_arrive(kReady, 2 * kWarpgroup + 32);
  }
  wait_for_launch_before();  // what is above overlaps with the kernel before
  if (warp == 0) {
    const Cut cut = line.cut(gridDim.y, line.scan(prefix));
    if (lane == 0) {
      *start = cut.start(blockIdx.y);
      *limit = cut.start(blockIdx.y + 1);
    }
    __syncwarp();
    named_barrier_arrive(kCutRelay, 64);
  }
  named_barrier(kCutCopiers, 32 * kCopiers);
  const PageCopier<L> copier{p, static_cast<unsigned>(max(warp - 1, 0)), static_cast<unsigned>(page_shift)};
  copy_tiles<L>(line, copier, prefix, limit, start, shared);
}

}  // namespace specvlm
