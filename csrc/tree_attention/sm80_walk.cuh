// A CTA's walk along the line of tiles (line.cuh), from its start in the cut to its end. A warp walks together.
#pragma once

#include "tree_attention/line.cuh"

namespace specvlm {

struct alignas(16) WalkTile {
  int request, head, row_tile;  // the item
  int context, live;            // of the request: tokens before the tree, nodes
  int end;                      // one past the last position that any row sees
  int unmasked;                 // positions below this are seen by every live row
  int index;                    // of the item's tiles
  int begin, left;              // this CTA's run of them: the first, and how many from this one on; 0: there is no tile
  int units;                    // of the line that this CTA has behind the run
  int padding;
};

// Units of one head; the lanes share the row tiles.
__device__ __forceinline__ int warp_units_per_head(const ItemLine& line, int request) {
  const int context = line.context(request), live = line.live(request);
  int sum = 0;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < line.rows_of.count; r += 32) sum += line.units(context, live, r);
  return __reduce_add_sync(~0u, sum);
}

__device__ __forceinline__ int warp_units(const ItemLine& line) {
  int total = 0;
#pragma unroll 1
  for (int request = 0; request < line.p.batch; ++request)
    total += line.p.kv_heads * warp_units_per_head(line, request);
  return total;
}

// Takes up to `units` of the line, from `rest` units into the tile's item on.
__device__ __forceinline__ void enter_item(const ItemLine& line, WalkTile& t, int rest, int units) {
  t.end = line.end(t.context, t.live, t.row_tile);
  t.unmasked = line.unmasked(t.context, t.row_tile);
  const int used = min(kSegmentCost + (t.end + kTile - 1) / kTile - rest, units);
  t.units = units - used;
  t.begin = t.index = max(rest - kSegmentCost, 0);
  t.left = max(rest + used - kSegmentCost, t.begin) - t.begin;
}

// If this run holds no tile: to the CTA's next one that does. Row tiles and requests without nodes are no part of the
// line.
__device__ __forceinline__ void find_tile(const ItemLine& line, WalkTile& t) {
#pragma unroll 1
  while (t.left == 0 && t.units > 0) {
    if (++t.row_tile == line.rows_of.count || line.units(t.context, t.live, t.row_tile) == 0) {
      t.row_tile = 0;
      if (++t.head == line.p.kv_heads) {
        t.head = 0;
        do {
          ++t.request;
          t.context = line.context(t.request), t.live = line.live(t.request);
        } while (line.units(t.context, t.live, 0) == 0);
      }
    }
    enter_item(line, t, 0, t.units);
  }
}

// The first tile of a CTA that has `units` of the line from `start` on.
__device__ __forceinline__ WalkTile first_tile(const ItemLine& line, int start, int units) {
  WalkTile t{};
  int per_head = warp_units_per_head(line, 0);
#pragma unroll 1
  while (start >= line.p.kv_heads * per_head) {
    start -= line.p.kv_heads * per_head;
    per_head = warp_units_per_head(line, ++t.request);
  }
  t.context = line.context(t.request), t.live = line.live(t.request);
  t.head = static_cast<int>(static_cast<unsigned>(start) / static_cast<unsigned>(per_head));
  start -= t.head * per_head;
#pragma unroll 1
  for (int length = line.units(t.context, t.live, 0); start >= length;) {
    start -= length;
    length = line.units(t.context, t.live, ++t.row_tile);
  }
  enter_item(line, t, start, units);
  find_tile(line, t);
  return t;
}

}  // namespace specvlm
