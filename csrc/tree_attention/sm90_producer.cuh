// What feeds the Hopper kernels: a warp that walks along the line of tiles and asks TMA for Q and for a ring of K/V
// tiles.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "tree_attention/sm90_ring.cuh"

namespace specvlm {

// The tiles of a cache as boxes that TMA can fetch: whole, or page by page, one lane a page.
template <int TILE>
struct TileSource {
  const TreeAttentionParams& p;
  int page_shift, box_shift;  // log2 of the positions in a page and in a box

  __device__ bool has(int lane) const { return lane < TILE >> box_shift; }
  // The request or page, and the first position in it, of a lane's box.
  __device__ int2 place(int lane, int request, int tile) const {
    const int position = tile * TILE + (lane << box_shift);
    if (p.page_table == nullptr) return make_int2(request, position);
    const int index = position >> page_shift;
    if (!has(lane) || index >= p.max_pages) return make_int2(p.pages, 0);  // outside of the map: zeros
    const int page = p.page_table[request * p.page_table_stride + index];
    return make_int2(min(max(page, 0), p.pages - 1), position & (p.page_size - 1));
  }
  template <class L>
  __device__ void load(char* stage, const CUtensorMap* map, int lane, int head, int2 place, std::uint64_t* full,
                       bool paired) const {
    char* box = stage + (lane << box_shift) * 128;
    if constexpr (L::kPairs) {
      if (paired) {
        const int half = blockIdx.x % 2;
        load_box_for_cluster(box + half * TILE * 128, map, half * 64, head, place.y, place.x, full, 0b11);
        return;
      }
    }
#pragma unroll
    for (int half = 0; half < L::kHalves; ++half)
      load_box(box + half * TILE * 128, map, half * 64, head, place.y, place.x, full);
  }
};

// Threads from 2 * kWarpgroup on. L says where everything lies in shared memory. 24 registers a thread.
template <class L>
__device__ __forceinline__ void produce(const TreeAttentionParams& p, const CUtensorMap& q_map,
                                        const CUtensorMap& k_map, const CUtensorMap& v_map, const RowTiles& rows_of,
                                        int page_shift, char* shared) {
  const AttentionRing<L> ring(shared);
  const auto [full_k, empty_k, full_v, empty_v, full_q, empty_q, runs] = ring;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x >= 2 * kWarpgroup + 64) return;
  // A second warp goes ahead while the kernel before may still run, by lengths that may be old ones: it works out the
  // first run, which takes 1 us, and has Q and two tiles brought near.
  const bool ahead = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >= 2 * kWarpgroup + 32, 0);
  const TeamLine line(p, rows_of);
  int* prefix = reinterpret_cast<int*>(shared + L::kPrefix);
  volatile int *limit = prefix + p.batch + 1, *slot = limit + 1;  // in registers they would cost spills
  volatile int *lengths = prefix + kLengthsAt, *next = prefix + kNextAt;
  bool guessed = false;  // right
  const bool paired = L::kPairs && rows_of.paired;
  if (ahead) {
    if (paired) meet_pair();
  } else {
    if (lane == 0) {
      prefetch_map(&k_map);
      prefetch_map(&q_map);
      prefetch_map(&v_map);
      init_ring(ring, paired);
    }
    __syncwarp();
    named_barrier_arrive(kReady, 2 * kWarpgroup + 32);
    if (paired) meet_pair();
    wait_for_launch_before();  // what is above overlaps with the kernel before
    const int context = p.batch == 1 ? line.context(0) : -1, live = p.batch == 1 ? line.live(0) : -1;
    named_barrier(kAhead, 64);
    guessed = p.batch == 1 && context == lengths[0] && live == lengths[1];
  }
  const TileSource<L::kTile> source{p, page_shift, min(page_shift, rows_of.tile_shift)};
  int unit;
  if (guessed) {
    unit = *next;
  } else {
    const Cut cut = line.cut(gridDim.y, line.scan(prefix));
    unit = cut.start(blockIdx.y);
    if (lane == 0) {
      *limit = cut.start(blockIdx.y + 1);
      *slot = 0;
    }
    __syncwarp();
  }
  bool filling = true;
  int k_stage = 0, v_stage = 0;
  std::uint32_t k_phase = 1, v_phase = 1, q_phase = 1;  // the rings start empty, and so does Q
  while (guessed || unit < *limit) {
    volatile ItemRun* run = runs + *slot;
    if (!guessed) {
      const ItemRun s = line.run(prefix, unit, *limit, blockIdx.x);
      unit += s.units;
      if (s.begin >= s.end) {
        if (ahead) break;  // lengths may change meanwhile: no loop may depend on them
        continue;
      }
      if (lane == 0) hand_over(run, s);
      if (ahead) {
        if (lane == 0) *next = unit;
        named_barrier_arrive(kAhead, 64);
        bring_near<L>(p, rows_of, s, q_map, k_map, v_map);
        return;
      }
      __syncwarp();
    }
    guessed = false;
    int t = run->begin;
    int2 place = source.place(thread_again() % 32, run->request, t);
#pragma unroll 1
    for (bool first = true; t < run->end; ++t, first = false) {
      auto load = [&](int ring, int at, const CUtensorMap* map, std::uint64_t* full) {
        if (lane == 0)
          ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + at, L::kTileBytes);
        __syncwarp();
        if (source.has(lane))
          source.template load<L>(shared + ring + at * L::kTileBytes, map, thread_again() % 32, run->head, place,
                                  full + at, paired);
      };
      wait_for_phase(empty_k + k_stage, k_phase);
      load(L::kK, k_stage, &k_map, full_k);
      if (++k_stage == L::kStagesK) k_stage = 0, k_phase ^= 1;
      if (first) {  // behind the first keys: its place is free only when the products of the item before are done
        wait_for_phase(empty_q, q_phase);
        q_phase ^= 1;
        if (lane == 0) load_rows<L>(shared, q_map, rows_of, run, full_q);
        __syncwarp();
      }
      wait_for_phase(empty_v + v_stage, v_phase);
      load(L::kV, v_stage, &v_map, full_v);
      place = source.place(thread_again() % 32, run->request, t + 1);  // ahead: pages have to be looked up
      // All CTAs' rings, asked for at once, would be in the way of what others begin with: two tiles are.
      if (filling) wait_for_phase(full_v + max(v_stage - 1, 0), 0);
      if (++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1, filling = false;
    }
    if (lane == 0) *slot = *slot == 2 ? 0 : *slot + 1;
    __syncwarp();
  }
  if (ahead) {  // no guess
    lengths[0] = -1;
    named_barrier_arrive(kAhead, 64);
    return;
  }
  wait_for_phase(empty_q, q_phase);
  if (lane == 0) {
    runs[*slot].begin = 0;  // no more
    runs[*slot].end = 0;
    ptx::mbarrier_arrive(full_q);
  }
  if constexpr (L::kPairs) {
    if (!paired) return;
    // The other CTA must still find the barriers when it releases its last stages.
#pragma unroll 1
    for (int i = 0; i < L::kStagesK; ++i) {
      wait_for_phase(empty_k + k_stage, k_phase);
      if (++k_stage == L::kStagesK) k_stage = 0, k_phase ^= 1;
    }
#pragma unroll 1
    for (int i = 0; i < L::kStagesV; ++i) {
      wait_for_phase(empty_v + v_stage, v_phase);
      if (++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1;
    }
  }
}

}  // namespace specvlm
