// How the Hopper kernel's CTAs share the work. All of it is straight-line code that a CTA runs once, so it is kept
// short: an instruction that is not in the caches costs as much as 15 that are (measured on an H200).
#pragma once

#include <cstdint>

#include "tree_attention/line.cuh"

namespace specvlm {

// What an item costs a CTA besides its tiles, in tiles: as much as 5 of 64 positions (traced on an H100: 4 to 6).
constexpr int run_cost(int tile_shift) { return 5 >> (tile_shift - kTileShift); }

constexpr int kMaskCost = 1;  // and what the masks of its last tile cost, in tiles

constexpr int kMostSide = 4;  // row tiles side by side

// Whether two CTAs side by side may form a cluster, see RowTiles: each then has a half of the dims to load.
__host__ __device__ constexpr bool pairs_are_built(int tile_shift, int head_dim) {
  return tile_shift > kTileShift && head_dim == 128;
}

// Integers in shared memory: the units before each request and of all, and two of the producer's; of a single request
// its two lengths, too, and where the first run ends.
__host__ __device__ constexpr int line_ints(int batch) { return batch + 1 + 2 + 2 + 1; }
constexpr int kLengthsAt = 4, kNextAt = 6;

// A run of tiles of one item: a request, a KV head and a row tile.
struct ItemRun {
  int request, head, row_tile;
  int begin, end;     // tiles of the item; none if the run holds nothing but overhead
  int item_tiles;     // all tiles of the item
  int context, live;  // of the request: tokens before the tree, nodes
  int units;          // how far the run goes on the line
};

// A team of `side` CTAs (a row of the grid) reads the same tiles at the same time, each for a row tile of its own, so
// that K and V come from device memory once. They all take as many as the one that sees most, and mask what they do not
// see; a pair takes them even where it has no row tile for its second CTA. The line that is cut among the teams: for
// every request, head and `side` row tiles rows_of.run_cost units of no tile, then as many as the longest of these row
// tiles has tiles, and kMaskCost of none before the last of them.
struct TeamLine : ItemLine {
  using ItemLine::ItemLine;

  // The lengths of a request after `scan`: of a single one they are remembered, as reading them takes 300 ns each time.
  __device__ int context_of(const int* prefix, int request) const {
    return p.batch == 1 ? prefix[kLengthsAt] : context(request);
  }
  __device__ int live_of(const int* prefix, int request) const {
    return p.batch == 1 ? prefix[kLengthsAt + 1] : live(request);
  }

  __device__ int tiles_side_by_side(int context, int live, int first_row_tile) const {
    const int first = first_row_tile * rows_of.nodes;
    if (first >= live) return 0;
    const int seen = p.tree_mask == nullptr ? min(first + rows_of.side * rows_of.nodes, live) : live;
    return (min(context + seen, p.capacity) + (1 << rows_of.tile_shift) - 1) >> rows_of.tile_shift;
  }
  __device__ int units_of(int count) const { return count == 0 ? 0 : rows_of.run_cost + count + kMaskCost; }
  __device__ int units_side_by_side(int context, int live, int first_row_tile) const {
    return units_of(tiles_side_by_side(context, live, first_row_tile));
  }
  // Of an item with `count` tiles: those before a unit, and the unit of a tile.
  __device__ int tiles_before(int unit, int count) const {
    const int last = rows_of.run_cost + count - 1 + kMaskCost;
    return unit > last ? count : min(max(unit - rows_of.run_cost, 0), count - 1);
  }
  __device__ int unit_of(int tile, int count) const {
    return rows_of.run_cost + tile + (tile == count - 1 ? kMaskCost : 0);
  }
  __device__ int units_per_head(int context, int live) const {
    int sum = units_side_by_side(context, live, 0);
#pragma unroll 1
    for (int r = rows_of.side; r < rows_of.count; r += rows_of.side) sum += units_side_by_side(context, live, r);
    return sum;
  }

  // A warp's scan over the batch: prefix[b] = units before request b; returns those of all.
  __device__ int scan(int* prefix) const {
    const int lane = threadIdx.x % 32;
    int before = 0;
    if (p.batch == 1) {  // every lane by itself
      const int context = this->context(0), live = this->live(0);
      before = p.kv_heads * units_per_head(context, live);
      if (lane < 2) {
        prefix[lane] = lane * before;
        prefix[kLengthsAt + lane] = lane == 0 ? context : live;
      }
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

  // The run of a team's member that starts at a unit of the line and ends before `limit`.
  __device__ ItemRun run(const int* prefix, int unit, int limit, int member) const {
    ItemRun s;
    s.request = 0;
    if (p.batch > 1)
#pragma unroll 1
      while (prefix[s.request + 1] <= unit) ++s.request;
    s.context = context_of(prefix, s.request), s.live = live_of(prefix, s.request);
    int count = tiles_side_by_side(s.context, s.live, 0);
    const int per_head = rows_of.count <= rows_of.side ? units_of(count) : units_per_head(s.context, s.live);
    int rest = unit - prefix[s.request];
    s.head = static_cast<int>(static_cast<unsigned>(rest) / static_cast<unsigned>(per_head));
    rest -= s.head * per_head;
    s.row_tile = 0;
    // the bound is for lengths that change meanwhile, for a warp that goes ahead
#pragma unroll 1
    while (rest >= units_of(count) && s.row_tile + rows_of.side < rows_of.count) {
      rest -= units_of(count);
      s.row_tile += rows_of.side;
      count = tiles_side_by_side(s.context, s.live, s.row_tile);
    }
    s.row_tile += member;
    s.item_tiles = s.row_tile < rows_of.count || rows_of.paired ? count : 0;
    s.units = min(units_of(count) - rest, limit - unit);
    s.begin = tiles_before(rest, count);
    s.end = min(tiles_before(rest + s.units, count), s.item_tiles);
    return s;
  }

  // The line cut among teams. No share is so small that a team between two tiles of an item might have none of them.
  __device__ Cut cut(int teams, int units) const { return Cut(min(teams, units / (1 + kMaskCost)), units); }

  // Where on the line the first and the last of an item's tiles are, of which its team has `tiles`, at least one.
  __device__ int2 ends(const int* prefix, int request, int head, int row_tile, int tiles) const {
    const int context = context_of(prefix, request), live = live_of(prefix, request);
    const int unit = prefix[request] + head * units_per_head(context, live);
    int before = 0, first = 0;
#pragma unroll 1
    for (; first + rows_of.side <= row_tile; first += rows_of.side) before += units_side_by_side(context, live, first);
    const int start = unit + before;
    return make_int2(start + unit_of(0, tiles), start + unit_of(tiles - 1, tiles));
  }
};

}  // namespace specvlm
