// How CTAs share the work: what the kernels for Hopper (sm90_line.cuh) and for all others (sm80_walk.cuh) have in
// common.
#pragma once

#include <cstdint>

#include "common/l2.cuh"
#include "tree_attention/visible.cuh"

namespace specvlm {

constexpr int kSegmentCost = 3;  // what an item costs a CTA of the sm_80 kernel besides its tiles, in tiles

// The packed rows of a KV head (node, head of the group) in tiles of whole nodes.
struct RowTiles {
  int count;
  int nodes;                    // per tile
  int group;                    // q_heads / kv_heads
  int rows;                     // nodes * group
  int run_cost = 0;             // what an item costs a CTA of the Hopper kernels besides its tiles, in tiles
  int tile_shift = kTileShift;  // log2 of the cache positions per tile
  int side = 1;                 // row tiles that a team of CTAs takes side by side, see sm90_line.cuh
  bool paired = false;          // two of them form a cluster, and each loads a half of K and V for both
};

// The line: the tiles of all items, one after the other. An item is a request, a KV head and a row tile; it comes as
// kSegmentCost units of no tile and then its tiles, so that an even cut of the line is an even cut of the time.
struct ItemLine {
  const TreeAttentionParams& p;
  const RowTiles& rows_of;

  __device__ ItemLine(const TreeAttentionParams& params, const RowTiles& rows) : p(params), rows_of(rows) {}

  __device__ int context(int request) const { return min(max(load_anew(p.kv_lens + request), 0), p.capacity); }
  __device__ int live(int request) const {
    return p.tree_lens == nullptr ? p.nodes : min(max(load_anew(p.tree_lens + request), 0), p.nodes);
  }
  // One past the last position that any row of the row tile sees.
  __device__ int end(int context, int live, int row_tile) const {
    const int first = row_tile * rows_of.nodes;
    if (first >= live) return 0;
    const int seen = p.tree_mask == nullptr ? min(first + rows_of.nodes, live) : live;
    return min(context + seen, p.capacity);
  }
  // Positions below this are seen by every live row of the row tile.
  __device__ int unmasked(int context, int row_tile) const {
    return min(context + (p.tree_mask == nullptr ? row_tile * rows_of.nodes + 1 : 0), p.capacity);
  }
  __device__ int tiles(int context, int live, int row_tile) const {
    return (end(context, live, row_tile) + (1 << rows_of.tile_shift) - 1) >> rows_of.tile_shift;
  }
  __device__ int units(int context, int live, int row_tile) const {
    const int count = tiles(context, live, row_tile);
    return count == 0 ? 0 : kSegmentCost + count;
  }
};

// An even cut of the line: the first `longer` CTAs get one unit more. CTAs beyond the line's length get nothing, and
// those before have at least one unit, so that an item's CTAs are neighbours.
struct Cut {
  int total, ctas, share, longer;

  __device__ Cut(int grid, int units) : total(units), ctas(min(grid, units)) {
    share = static_cast<int>(static_cast<unsigned>(total) / static_cast<unsigned>(max(ctas, 1)));
    longer = total - share * ctas;
  }
  __device__ int start(int cta) const { return cta >= ctas ? total : cta * share + min(cta, longer); }
  __device__ int cta_at(int unit) const {
    const int rest = unit - longer * (share + 1);
    return rest < 0 ? unit / (share + 1) : longer + rest / share;
  }
};

}  // namespace specvlm
