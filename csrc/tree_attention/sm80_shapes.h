// How the warps of a CTA share a tile of rows and positions, and what that takes.
#pragma once

#include "tree_attention/visible.cuh"

namespace specvlm {

constexpr int kSm80StateBytes = 592;  // of a warp

// Every warp has 16 rows and kTile / warps_n positions of a tile. Few rows: the warps share the positions, so that all
// of them work and K and V still pass through one CTA.
struct Sm80Shape {
  int warps_m, warps_n;

  constexpr int warps() const { return warps_m * warps_n; }
  constexpr int rows() const { return 16 * warps_m; }
  // Tiles of K and V in shared memory. A CTA that has a multiprocessor to itself hides latency with a third one.
  constexpr int stages(int head_dim) const { return head_dim == 64 || warps() > 6 ? 3 : 2; }
  // CTAs that the registers of a multiprocessor hold: 128 a thread for D 64; 168, or 255 above six warps, for D 128.
  constexpr int resident(int head_dim) const {
    if (head_dim == 64) return warps_n > 1 ? 3 : warps_m == 4 ? 4 : 2;
    return warps() == 4 ? 3 : warps() <= 6 ? 2 : 1;
  }
  // Shared memory in bytes: K, V, what the warps keep there; and to merge warps_n results, 32 dims of them.
  constexpr int tile_bytes(int head_dim) const { return kTile * head_dim * 2; }
  constexpr int state_offset(int head_dim) const { return 2 * stages(head_dim) * tile_bytes(head_dim); }
  constexpr int merge_offset(int head_dim) const { return state_offset(head_dim) + warps() * kSm80StateBytes; }
  constexpr int shared_bytes(int head_dim) const {
    return merge_offset(head_dim) + (warps_n > 1 ? warps() * 16 * 32 * 4 : 0);
  }
};

constexpr Sm80Shape kSm80Shapes[] = {{1, 4}, {2, 2}, {4, 1}, {5, 1}, {6, 1}, {7, 1}, {8, 1}};

// shared_memory: bytes per multiprocessor.
TreeAttentionPlan sm80_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim, int capacity,
                            int multiprocessors, int shared_memory);

template <typename T, int D>
void tree_attention_sm80(const TreeAttentionParams& params, const TreeAttentionPlan& plan, cudaStream_t stream);

}  // namespace specvlm
