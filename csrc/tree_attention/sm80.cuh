// Tree attention with warp-wide matrix products (sm_80 and newer): S = Q K^T, O += P V, any strides, pages of any size.
//
// A CTA holds up to 128 packed rows (node, head of the group), 16 a warp, with Q and O in registers. K and V arrive
// through a ring of tiles in shared memory, filled by cp.async ahead of the arithmetic and across the borders of items.
// The tiles of all requests, heads and row tiles form one line (line.cuh) that is cut evenly among the CTAs; an item
// that several of them share is put together by a second kernel (sm80_combine.cuh), in a fixed order.
#pragma once

#include <cstdint>

#include "common/ampere.cuh"
#include "tree_attention/sm80_loader.cuh"
#include "tree_attention/sm80_rows.cuh"
#include "tree_attention/sm80_store.cuh"

namespace specvlm {

// scale: of scores in log2. heads_per_kv: 1, or into how many heads each head of K and V was cut, so that a group fits.
template <typename T, int D, int WARPS_M, int WARPS_N>
__global__ void __launch_bounds__(Sm80Layout<D, WARPS_M, WARPS_N>::kThreads, Sm80Layout<D, WARPS_M, WARPS_N>::kResident)
    tree_attention_sm80_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ RowTiles rows_of,
                               const __grid_constant__ Sm80Parts<D> parts, float scale, int heads_per_kv) {
  using L = Sm80Layout<D, WARPS_M, WARPS_N>;
  extern __shared__ __align__(1024) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* states = reinterpret_cast<WarpState*>(shared + L::kState);
  WarpState& state = states[warp];
  const ItemLine line(p, rows_of);
  KvLoader<T, D, L::kWarps> loader{line, state, {}};
  {
    const Cut cut(parts.ctas, warp_units(line));
    const int cta = static_cast<int>(blockIdx.x);
    if (cta >= cut.ctas) return;
    loader.set(first_tile(line, cut.start(cta), cut.start(cta + 1) - cut.start(cta)));
  }

  const int slice = warp / WARPS_M * L::kSlice;  // this warp's first position in a tile
  const std::uint32_t k_ring = shared_address(shared);
  // this lane's row for load_matrices, of K: positions 0-7 (chunks 0, 1) and 8-15 (0, 1); of V, transposed: positions
  // 0-7 and 8-15 of chunk 0, then of chunk 1
  const std::uint32_t k_lane = (slice + lane / 16 * 8 + lane % 8) * L::kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  const std::uint32_t v_lane = (slice + lane / 8 % 2 * 8 + lane % 8) * L::kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;

  WarpRows<T, D, L> rows;
  int stage = 0;  // to compute next
#pragma unroll 1
  for (int asked = 0;;) {  // tiles, until the ring is full
    const bool computes = asked == L::kStages - 1;
    const WalkTile& t = state.ring[stage];
    if (computes) {
      if (t.left == 0) break;
      if (t.index == t.begin) rows.begin(p, rows_of, t, state, warp % WARPS_M * 16);
      if ((t.index + 1) * kTile > t.unmasked) state.find_visible(p, t);
      copy_async_wait<L::kStages - 2>();
      __syncthreads();  // the tile is there for all, and all are done with the tile before it
    }
    const int free_stage = !computes ? asked : stage == 0 ? L::kStages - 1 : stage - 1;
    const std::uint32_t free_tile = k_ring + free_stage * L::kTileBytes;
    loader.issue(free_stage, free_tile, free_tile + L::kRingBytes, heads_per_kv);
    if (!computes) {
      ++asked;
      continue;
    }

    const bool masked = (t.index + 1) * kTile > t.unmasked;
    if (masked && p.tree_mask != nullptr) {        // a node that no row sees may hold NaN, and 0 * NaN would spread
      const int inside = t.end - t.index * kTile;  // positions from there on are zeros already
      std::uint64_t unseen = inside >= kTile ? ~0ull : (1ull << inside) - 1;
#pragma unroll
      for (int w = 0; w < WARPS_M; ++w) unseen &= ~states[w].seen_by_any[t.index % 2];
      if (unseen != 0) {
        auto* v_tile = reinterpret_cast<uint4*>(shared + stage * L::kTileBytes + L::kRingBytes);
#pragma unroll 1
        for (int i = threadIdx.x; i < kTile * (D / 8); i += L::kThreads)
          if (unseen >> (i / (D / 8)) & 1) v_tile[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
      }
    }

#pragma unroll 1
    for (int part = 0; part < L::kSlice; part += L::kPart) {
      const std::uint32_t tile = k_ring + stage * L::kTileBytes + part * L::kRowBytes;
      float s[L::kPart / 8][4];
      rows.multiply_keys(s, tile + k_lane);
      rows.weigh(s, scale, masked ? state.seen_by_row : nullptr, slice + part);
      rows.add_values(s, tile + L::kRingBytes + v_lane);
    }

    if (t.left == 1) {
      if constexpr (WARPS_N == 1)
        store_rows(p, parts, state, t, rows);
      else
        merge_and_store_rows(p, parts, states, t, rows, reinterpret_cast<float*>(shared + L::kMerge));
    }
    stage = stage + 1 == L::kStages ? 0 : stage + 1;
  }
}

}  // namespace specvlm
