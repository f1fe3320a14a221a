#include <algorithm>
#include <limits>
#include <utility>

#include "common/check.h"
#include "tree_attention/sm80_shapes.h"
#include "tree_attention/sm90_launch.cuh"

namespace specvlm {

extern template void tree_attention_sm80<__nv_bfloat16, 64>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                            cudaStream_t);
extern template void tree_attention_sm80<__nv_bfloat16, 128>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                             cudaStream_t);
extern template void tree_attention_sm80<__half, 64>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                     cudaStream_t);
extern template void tree_attention_sm80<__half, 128>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                      cudaStream_t);
extern template void tree_attention_sm90<__nv_bfloat16, 64>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                            cudaStream_t);
extern template void tree_attention_sm90<__nv_bfloat16, 128>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                             cudaStream_t);
extern template void tree_attention_sm90<__half, 64>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                     cudaStream_t);
extern template void tree_attention_sm90<__half, 128>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                      cudaStream_t);

namespace {

// The one place where a kernel is chosen.
TreeAttentionKernel kernel_for(int group, int architecture) {
  return architecture >= 90 && group <= kMostColumns ? TreeAttentionKernel::kSm90 : TreeAttentionKernel::kSm80;
}

constexpr int kMostShared = 227 * 1024;  // of a CTA
constexpr double kSecondLaunch = 5000;   // cycles that the combine kernel takes more than a cluster to meet
constexpr int kRowsColumns = 2 * kRowsPerWarpgroup;

// The packed rows of a head in `count` tiles of whole nodes, so that one TMA box is a row tile.
TreeAttentionPlan with_row_tiles(TreeAttentionKernel kernel, int nodes, int group, int count) {
  TreeAttentionPlan plan{};
  plan.kernel = kernel;
  const int per_tile = (nodes + count - 1) / count;
  plan.row_tile = per_tile * group;
  plan.row_tiles = (nodes + per_tile - 1) / per_tile;
  plan.columns = kRowsColumns;
  if (kernel == TreeAttentionKernel::kSm90)
    for (const int columns : kColumns) {
      plan.columns = 2 * columns;
      if (plan.columns >= plan.row_tile) break;
    }
  const int fewest_rounds = (plan.row_tiles + kMostSide - 1) / kMostSide;
  plan.side = (plan.row_tiles + fewest_rounds - 1) / fewest_rounds;
  plan.cluster = 1;
  return plan;
}

template <int D, int INDEX = 0>
int swapped_bytes(int columns, int batch) {
  if constexpr (INDEX + 1 < static_cast<int>(std::size(kColumns)))
    if (columns > 2 * kColumns[INDEX]) return swapped_bytes<D, INDEX + 1>(columns, batch);
  return AttentionLayout<D, kColumns[INDEX]>::bytes(batch);
}

// Shared memory of a CTA.
int shared_bytes(const TreeAttentionPlan& plan, int head_dim, int batch) {
  if (plan.kernel == TreeAttentionKernel::kSm90Rows)
    return head_dim == 64 ? RowsLayout<64>::bytes(batch) : RowsLayout<128>::bytes(batch);
  return head_dim == 64 ? swapped_bytes<64>(plan.columns, batch) : swapped_bytes<128>(plan.columns, batch);
}

int rounds(const TreeAttentionPlan& plan) { return (plan.row_tiles + plan.side - 1) / plan.side; }

int tile_shift_of(const TreeAttentionPlan& plan) {
  return plan.kernel == TreeAttentionKernel::kSm90Rows ? kRowsTileShift : swapped_tile_shift(plan.columns / 2);
}

// Cycles that a plan takes for the tiles of one row tile; fitted to traces and times on an H100.
double cycles(const TreeAttentionPlan& plan, std::int64_t tiles, int multiprocessors) {
  const std::int64_t teams = std::max(multiprocessors / plan.side, 1);
  const std::int64_t of_a_team = (tiles * rounds(plan) + teams - 1) / teams;
  if (plan.kernel == TreeAttentionKernel::kSm90Rows) return 1600.0 * of_a_team + 5000.0;
  if (tile_shift_of(plan) > kTileShift)
    return (650.0 + 22.0 * plan.columns) * ((of_a_team + 1) / 2) + 4600.0 + 30.0 * plan.columns;
  return (900.0 + 8.3 * plan.columns) * of_a_team + 600.0 + 30.0 * plan.columns;
}

// The plan of a cluster for every item, or row_tiles 0 where there are too many items, or too many tiles in one.
TreeAttentionPlan cluster_plan(int batch, int nodes, int group, int kv_heads, std::int64_t capacity, int count,
                               int multiprocessors) {
  TreeAttentionPlan plan = with_row_tiles(TreeAttentionKernel::kSm90Cluster, nodes, group, count);
  const std::int64_t items = static_cast<std::int64_t>(batch) * kv_heads * plan.row_tiles;
  // What an H100 and an H200 hold at once, of their 132 multiprocessors in 8 groups; others have not been tried.
  plan.cluster = multiprocessors < 132 ? 0 : items <= 7 ? 16 : items <= 15 ? 8 : 0;
  if (plan.cluster == 0 || plan.row_tile > 64 || plan.row_tile / group > kMostClusterNodes ||
      cluster_tiles(capacity, plan.cluster) > kMostClusterTiles)
    return {};
  plan.columns = plan.row_tile <= 32 ? 32 : 64;
  plan.ctas = plan.cluster * static_cast<int>(items);
  return plan;
}

double cluster_cycles(const TreeAttentionPlan& plan, std::int64_t capacity) {
  return (550.0 + 5.0 * plan.columns) * cluster_tiles(capacity, plan.cluster) + 600.0 + 20.0 * plan.columns;
}

}  // namespace

TreeAttentionPlan tree_attention_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim,
                                      std::int64_t capacity, int page_size, int architecture, int multiprocessors,
                                      int shared_memory) {
  check_argument(capacity <= std::numeric_limits<int>::max() - nodes - 2 * kTile, "k, v: capacity of ", capacity,
                 " tokens does not fit 32 bits");
  check_argument(page_size >= 0 && (page_size & (page_size - 1)) == 0, "page_size: expected a power of two, got ",
                 page_size);
  const int group = q_heads / kv_heads;
  if (kernel_for(group, architecture) == TreeAttentionKernel::kSm80)
    return sm80_plan(batch, nodes, q_heads, kv_heads, head_dim, static_cast<int>(capacity), multiprocessors,
                     shared_memory);
  const std::int64_t tiles = static_cast<std::int64_t>(batch) * kv_heads * ((capacity + kTile - 1) / kTile);
  TreeAttentionPlan plan{};
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [kernel, most] :
       {std::pair{TreeAttentionKernel::kSm90, kMostColumns}, std::pair{TreeAttentionKernel::kSm90Rows, kRowsColumns}}) {
    if (group > most) continue;
    const int fewest = (nodes + most / group - 1) / (most / group);
    for (int count = fewest; count <= std::min(std::max(fewest, kMostSide), nodes); ++count) {
      const TreeAttentionPlan other = with_row_tiles(kernel, nodes, group, count);
      if (shared_bytes(other, head_dim, batch) > kMostShared) continue;
      const double cost = cycles(other, tiles, multiprocessors) + kSecondLaunch;
      if (cost < least) least = cost, plan = other;
    }
  }
  const bool copied = pages_are_copied(page_size);
  if (!copied)
    for (int count = 1; count <= std::min(nodes, kMostSide); ++count) {
      const TreeAttentionPlan other = cluster_plan(batch, nodes, group, kv_heads, capacity, count, multiprocessors);
      if (other.row_tiles == 0) continue;
      const double cost = cluster_cycles(other, capacity);
      if (cost < least) least = cost, plan = other;
    }
  if (plan.kernel == TreeAttentionKernel::kSm90Cluster) return plan;
  if (plan.row_tiles == 0)  // the lengths of so many requests do not fit beside the tiles
    return sm80_plan(batch, nodes, q_heads, kv_heads, head_dim, static_cast<int>(capacity), multiprocessors,
                     shared_memory);
  const std::int64_t items = static_cast<std::int64_t>(batch) * kv_heads * rounds(plan);
  const int tile_shift = tile_shift_of(plan);
  if (pairs_are_built(tile_shift, head_dim) && plan.side % 2 == 0 && !copied) plan.cluster = 2;
  const std::int64_t units = items * ((capacity >> tile_shift) + 1 + run_cost(tile_shift) + kMaskCost);
  check_argument(units < (std::int64_t{1} << 31), "q: more than 2**31 tiles of work");
  const std::int64_t teams = std::min<std::int64_t>(std::min(multiprocessors, kMaxParts) / plan.side, units);
  plan.ctas = plan.side * static_cast<int>(std::max<std::int64_t>(1, teams));
  plan.workspace_floats =
      head_dim == 64 ? Part<64>::floats(plan.ctas, plan.columns) : Part<128>::floats(plan.ctas, plan.columns);
  return plan;
}

void tree_attention(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  check_argument(p.head_dim == 64 || p.head_dim == 128, "head_dim: expected 64 or 128, got ", p.head_dim);
  const bool bf16 = p.dtype == HalfType::kBFloat16;
  const auto sm80 = p.head_dim == 64
                        ? (bf16 ? tree_attention_sm80<__nv_bfloat16, 64> : tree_attention_sm80<__half, 64>)
                        : (bf16 ? tree_attention_sm80<__nv_bfloat16, 128> : tree_attention_sm80<__half, 128>);
  const auto sm90 = p.head_dim == 64
                        ? (bf16 ? tree_attention_sm90<__nv_bfloat16, 64> : tree_attention_sm90<__half, 64>)
                        : (bf16 ? tree_attention_sm90<__nv_bfloat16, 128> : tree_attention_sm90<__half, 128>);
  (plan.kernel == TreeAttentionKernel::kSm80 ? sm80 : sm90)(p, plan, stream);
}

}  // namespace specvlm
