// What the attention kernels share: the line of K/V tiles of all requests, heads and row tiles, the parts that CTAs
// take of it, and which positions a row sees.
#pragma once

#include <cstdint>

#include "tree_attention/visible.cuh"

namespace specvlm {

// The line of tiles and who owns which part of it.
struct TileLine {
  const TreeAttentionParams& p;
  int row_tile, row_tiles;

  __device__ int context(int request) const { return min(max(p.kv_lens[request], 0), p.capacity); }
  __device__ int live(int request) const {
    return p.tree_lens == nullptr ? p.nodes : min(max(p.tree_lens[request], 0), p.nodes);
  }
  // One past the last position that any row of a row tile sees.
  __device__ int end(int request, int tile_of_rows) const {
    const int group = p.q_heads / p.kv_heads, alive = live(request);
    const int first = tile_of_rows * row_tile / group;
    if (first >= alive) return 0;
    const int last = (tile_of_rows * row_tile + row_tile - 1) / group;
    const int seen = p.tree_mask == nullptr ? min(last + 1, alive) : alive;
    return min(context(request) + seen, p.capacity);
  }
  // Positions below this are seen by every live row of the row tile.
  __device__ int unmasked(int request, int tile_of_rows) const {
    const int first = tile_of_rows * row_tile / (p.q_heads / p.kv_heads);
    return context(request) + (p.tree_mask == nullptr ? first + 1 : 0);
  }
  __device__ int tiles(int request, int tile_of_rows) const { return (end(request, tile_of_rows) + kTile - 1) / kTile; }
  __device__ int tiles_per_head(int request) const {
    int sum = 0;
    for (int r = 0; r < row_tiles; ++r) sum += tiles(request, r);
    return sum;
  }
};

// CTAs that get at least one tile: the others would leave holes in the order that the combine kernel follows.
__device__ __forceinline__ int working_ctas(int ctas, int total) { return min(ctas, total); }

__device__ __forceinline__ int first_tile_of(int cta, int ctas, int total) {
  return static_cast<int>(static_cast<std::int64_t>(cta) * total / ctas);
}

__device__ __forceinline__ int cta_of_tile(int tile, int ctas, int total) {
  return static_cast<int>((static_cast<std::int64_t>(tile + 1) * ctas - 1) / total);
}

// A run of tiles of one request, head and row tile.
struct Segment {
  int request, head, row_tile;
  int begin, end;  // tiles of the item
  int item_tiles;  // all tiles of the item
};

// The segment that starts at a tile of the line and ends before `limit`. prefix[b]: tiles before request b.
__device__ __forceinline__ Segment segment_at(const TileLine& line, const int* prefix, int tile, int limit) {
  Segment s;
  s.request = 0;
  while (prefix[s.request + 1] <= tile) ++s.request;
  const int per_head = line.tiles_per_head(s.request);
  int rest = tile - prefix[s.request];
  s.head = rest / per_head;
  rest -= s.head * per_head;
  s.row_tile = 0;
  s.item_tiles = line.tiles(s.request, 0);
  while (rest >= s.item_tiles) {
    rest -= s.item_tiles;
    s.item_tiles = line.tiles(s.request, ++s.row_tile);
  }
  s.begin = rest;
  s.end = min(s.item_tiles, rest + limit - tile);
  return s;
}

}  // namespace specvlm
