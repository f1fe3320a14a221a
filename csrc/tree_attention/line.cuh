// How CTAs share the work. All of it is straight-line code that a CTA runs once, so it is kept short: an instruction
// that is not in the caches costs as much as 15 that are (measured on an H200).
#pragma once

#include <cstdint>

#include "tree_attention/visible.cuh"

namespace specvlm {

constexpr int kSegmentCost = 3;  // what an item costs a CTA besides its tiles, in tiles

// The packed rows of a KV head (node, head of the group) in tiles of whole nodes.
struct RowTiles {
  int count;
  int nodes;  // per tile
  int group;  // q_heads / kv_heads
  int rows;   // nodes * group
};

// A run of tiles of one item.
struct ItemRun {
  int request, head, row_tile;
  int begin, end;     // tiles of the item; none if the run holds nothing but overhead
  int item_tiles;     // all tiles of the item
  int context, live;  // of the request: tokens before the tree, nodes
  int units;          // how far the run goes on the line
};

// The line: the tiles of all items, one after the other. An item is a request, a KV head and a row tile; it comes as
// kSegmentCost units of no tile and then its tiles, so that an even cut of the line is an even cut of the time.
struct ItemLine {
  const TreeAttentionParams& p;
  const RowTiles& rows_of;

  __device__ ItemLine(const TreeAttentionParams& params, const RowTiles& rows) : p(params), rows_of(rows) {}

  __device__ int context(int request) const { return min(max(p.kv_lens[request], 0), p.capacity); }
  __device__ int live(int request) const {
    return p.tree_lens == nullptr ? p.nodes : min(max(p.tree_lens[request], 0), p.nodes);
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
    return (end(context, live, row_tile) + kTile - 1) / kTile;
  }
  __device__ int units(int context, int live, int row_tile) const {
    const int count = tiles(context, live, row_tile);
    return count == 0 ? 0 : kSegmentCost + count;
  }
  __device__ int units_per_head(int context, int live) const {
    int sum = units(context, live, 0);
#pragma unroll 1
    for (int r = 1; r < rows_of.count; ++r) sum += units(context, live, r);
    return sum;
  }

  // A warp's scan over the batch: prefix[b] = units before request b; returns those of all.
  __device__ int scan(int* prefix) const {
    const int lane = threadIdx.x % 32;
    int before = 0;
    if (p.batch == 1) {  // every lane by itself
      before = p.kv_heads * units_per_head(context(0), live(0));
      if (lane < 2) prefix[lane] = lane * before;
      __syncwarp();
      return before;
    }
#pragma unroll 1
    for (int first = 0; first < p.batch; first += 32) {
      const int request = first + lane;
      int sum = request < p.batch ? p.kv_heads * units_per_head(context(request), live(request)) : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (request < p.batch) prefix[request + 1] = before + sum;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) prefix[0] = 0;
    __syncwarp();
    return before;
  }

  // The run that starts at a unit of the line and ends before `limit`.
  __device__ ItemRun run(const int* prefix, int unit, int limit) const {
    ItemRun s;
    s.request = 0;
    if (p.batch > 1)
#pragma unroll 1
      while (prefix[s.request + 1] <= unit) ++s.request;
    s.context = context(s.request), s.live = live(s.request);
    const int per_head = units_per_head(s.context, s.live);
    int rest = unit - prefix[s.request];
    s.head = static_cast<int>(static_cast<unsigned>(rest) / static_cast<unsigned>(per_head));
    rest -= s.head * per_head;
    s.row_tile = 0;
    int length = units(s.context, s.live, 0);
#pragma unroll 1
    while (rest >= length) {
      rest -= length;
      length = units(s.context, s.live, ++s.row_tile);
    }
    s.item_tiles = length - kSegmentCost;
    s.units = min(length - rest, limit - unit);
    s.begin = max(rest - kSegmentCost, 0);
    s.end = max(rest + s.units - kSegmentCost, s.begin);
    return s;
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
