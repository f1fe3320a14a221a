// How K and V reach shared memory in the sm_80 kernel.
#pragma once

#include <cstdint>

#include "common/ampere.cuh"
#include "tree_attention/sm80_shapes.h"
#include "tree_attention/sm80_walk.cuh"

namespace specvlm {

template <int D, int WARPS_M, int WARPS_N>
struct Sm80Layout {
  static constexpr Sm80Shape kShape{WARPS_M, WARPS_N};
  static constexpr int kWarps = kShape.warps();
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kShape.rows();
  static constexpr int kResident = kShape.resident(D);
  static constexpr int kStages = kShape.stages(D);
  static constexpr int kSlice = kTile / WARPS_N;                     // positions of a tile per warp
  static constexpr int kAtOnce = D == 64 || kWarps > 6 ? 32 : 16;    // as many of them as the registers hold scores of
  static constexpr int kPart = kSlice < kAtOnce ? kSlice : kAtOnce;  // of these at a time
  static constexpr int kRowBytes = D * 2;  // of K and V; 16-byte chunk c of row r lies at c ^ (r % 8)
  static constexpr int kTileBytes = kShape.tile_bytes(D), kRingBytes = kStages * kTileBytes;  // of K, and of V
  static constexpr int kState = kShape.state_offset(D), kMerge = kShape.merge_offset(D);
};

// What all lanes of a warp agree on, and what they hand each other. In shared memory: registers are scarce.
struct WarpState {
  WalkTile load;                                  // to ask for next
  WalkTile ring[3];                               // in the stages of the ring
  int node[16], q_head[16];                       // of the warp's rows; node is -1 for a row without one
  float reference[16], total[16];                 // of the warp's rows
  std::uint64_t seen_by_row[16], seen_by_any[2];  // of a masked tile: bits of its positions; [tile % 2]

  // Fills in the last two. Other warps read seen_by_any between the CTA's next barrier and the one after.
  __device__ __forceinline__ void find_visible(const TreeAttentionParams& p, const WalkTile& t) {
    const int lane = threadIdx.x % 32;
    std::uint64_t bits = 0;
    __syncwarp();
    if (lane < 16) {
      if (node[lane] >= 0) bits = visible_bits(p, t.request, node[lane], t.context, t.live, t.index * kTile);
      seen_by_row[lane] = bits;
    }
    const std::uint32_t low = __reduce_or_sync(~0u, static_cast<std::uint32_t>(bits));
    const std::uint32_t high = __reduce_or_sync(~0u, static_cast<std::uint32_t>(bits >> 32));
    if (lane == 0) seen_by_any[t.index % 2] = static_cast<std::uint64_t>(high) << 32 | low;
  }
};
static_assert(sizeof(WarpState) == kSm80StateBytes, "sm80_shapes.h reserves it");

// Fills the ring. Lane i keeps the outer index (request or page) of positions i and i+32 of the tile to ask for next,
// looked up while the tile before it is on its way.
template <typename T, int D, int WARPS>
struct KvLoader {
  static constexpr int kChunks = D / 8;             // 16-byte chunks of a row
  static constexpr int kWarpRows = 32 / kChunks;    // rows that a warp copies at a time
  static constexpr int kSteps = kTile / kWarpRows;  // to copy a tile

  const ItemLine& line;
  WarpState& state;
  int outer[2];

  // Sets the tile to ask for next, and looks up its positions.
  __device__ __forceinline__ void set(const WalkTile& t) {
    const TreeAttentionParams& p = line.p;
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane == 0) state.load = t;
    __syncwarp();
    outer[0] = outer[1] = t.request;
    if (p.page_table != nullptr && t.left > 0) {
      const std::int32_t* table = p.page_table + t.request * p.page_table_stride;
      const int position = t.index * kTile + lane, shift = 31 - __clz(p.page_size);
      outer[0] = min(max(table[min(position, t.end - 1) >> shift], 0), p.pages - 1);
      outer[1] = min(max(table[min(position + 32, t.end - 1) >> shift], 0), p.pages - 1);
    }
  }

  // Asks for the next tile; closes a group of copies even where there is none. heads_per_kv: that share a head of K.
  __device__ __forceinline__ void issue(int stage, std::uint32_t k_stage, std::uint32_t v_stage, int heads_per_kv) {
    const TreeAttentionParams& p = line.p;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = lane % kChunks;
    WalkTile t = state.load;
    if (lane == 0) state.ring[stage] = t;
    __syncwarp();
    if (t.left > 0) {
      const int inner_mask = p.page_table == nullptr ? ~0 : p.page_size - 1;
      const int kv_head = heads_per_kv == 1 ? t.head : t.head / heads_per_kv;
      const T* k = static_cast<const T*>(p.k) + kv_head * p.k_strides.head + chunk * 8;
      const T* v = static_cast<const T*>(p.v) + kv_head * p.v_strides.head + chunk * 8;
#pragma unroll 2
      for (int step = warp; step < kSteps; step += WARPS) {
        const int row = step * kWarpRows + lane / kChunks, position = t.index * kTile + row;
        const int low = __shfl_sync(~0u, outer[0], row % 32), high = __shfl_sync(~0u, outer[1], row % 32);
        const std::int64_t out = row < 32 ? low : high, in = min(position, t.end - 1) & inner_mask;
        const int bytes = position < t.end ? 16 : 0;
        const std::uint32_t target = row * (D * 2) + (chunk ^ (row % 8)) * 16;
        copy_async(k_stage + target, k + (out * p.k_strides.batch + in * p.k_strides.token), bytes);
        copy_async(v_stage + target, v + (out * p.v_strides.batch + in * p.v_strides.token), bytes);
      }
      ++t.index;
      --t.left;
      find_tile(line, t);
      set(t);
    }
    copy_async_commit();
  }
};

}  // namespace specvlm
