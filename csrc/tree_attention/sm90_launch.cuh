// Launches one dtype and head dim; each is instantiated in a file of its own, so that they compile side by side.
#pragma once

#include <iterator>
#include <limits>

#include "common/check.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "tree_attention/sm90.cuh"
#include "tree_attention/sm90_cluster.cuh"
#include "tree_attention/sm90_rows.cuh"

namespace specvlm {

constexpr int kColumns[] = {8, 16, 32, 48, 64, 72, 80, 96, 104};  // packed rows of one warpgroup
constexpr int kMostColumns = 2 * kColumns[std::size(kColumns) - 1];

inline CUtensorMap cache_map(const char* name, const void* base, const TreeAttentionStrides& strides,
                             const TreeAttentionParams& p, int tile) {
  const bool paged = p.page_table != nullptr;
  return half_tensor_map(name, base, p.dtype == HalfType::kBFloat16, p.head_dim,
                         {{p.kv_heads, strides.head, 1},
                          {paged ? p.page_size : p.capacity, strides.token, paged ? std::min(p.page_size, tile) : tile},
                          {paged ? p.pages : p.batch, strides.batch, 1}});
}

inline RowTiles row_tiles_of(const TreeAttentionParams& p, const TreeAttentionPlan& plan) {
  const int group = p.q_heads / p.kv_heads;
  return {plan.row_tiles, plan.row_tile / group, group, plan.row_tile};
}

inline CUtensorMap rows_map(const TreeAttentionParams& p, const RowTiles& rows_of) {
  return half_tensor_map("q", p.q, p.dtype == HalfType::kBFloat16, p.head_dim,
                         {{p.q_heads, p.q_strides.head, rows_of.group},
                          {p.nodes, p.q_strides.token, rows_of.nodes},
                          {p.batch, p.q_strides.batch, 1}});
}

// log2 of the positions of a page; of a tile where the cache is contiguous.
inline int page_shift_of(const TreeAttentionParams& p, int tile_shift) {
  if (p.page_table == nullptr) return tile_shift;
  int shift = 0;
  while (1 << shift < p.page_size) ++shift;
  return shift;
}

// L: the kernels' layout of shared memory. ROWS: how they leave their parts, see parts.cuh. COPYING: the kernel for
// pages that are too small for TMA.
template <typename T, int D, class L, bool ROWS, auto KERNEL, auto COPYING>
void launch_tree_attention_sm90(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  RowTiles rows_of = row_tiles_of(p, plan);
  rows_of.run_cost = run_cost(L::kTileShift), rows_of.tile_shift = L::kTileShift, rows_of.side = plan.side;
  rows_of.paired = plan.cluster == 2;
  const CUtensorMap q_map = rows_map(p, rows_of);
  const bool copied = pages_are_copied(p.page_size);
  // copies look at neither
  const CUtensorMap k_map = copied ? q_map : cache_map("k", p.k, p.k_strides, p, L::kTile),
                    v_map = copied ? q_map : cache_map("v", p.v, p.v_strides, p, L::kTile);
  const int page_shift = page_shift_of(p, L::kTileShift);
  const int shared = L::bytes(p.batch);
  copied ? prepare_kernel<COPYING>(shared) : prepare_kernel<KERNEL>(shared);
  launch_overlapped_clusters(copied ? COPYING : KERNEL, dim3(plan.side, plan.ctas / plan.side), dim3(kAttentionThreads),
                             plan.cluster, shared, stream, p, q_map, k_map, v_map, rows_of, page_shift);
  launch_combine_parts<T, D, ROWS>(p, plan, rows_of, stream);
}

template <typename T, int D, int INDEX = 0>
void dispatch_columns(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  if constexpr (INDEX == std::size(kColumns)) {
    throw std::invalid_argument("plan: made by tree_attention_plan?");
  } else if (2 * kColumns[INDEX] == plan.columns) {
    constexpr int kCols = kColumns[INDEX];
    launch_tree_attention_sm90<T, D, AttentionLayout<D, kCols>, false, tree_attention_kernel<T, D, kCols, false>,
                               tree_attention_kernel<T, D, kCols, true>>(p, plan, stream);
  } else {
    dispatch_columns<T, D, INDEX + 1>(p, plan, stream);
  }
}

template <typename T, int D, int ROWS>
void launch_tree_attention_cluster(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  const RowTiles rows_of = row_tiles_of(p, plan);
  const int shared = ClusterLayout<D, ROWS>::bytes(cluster_tiles(p.capacity, plan.cluster));
  constexpr auto kKernel = tree_attention_cluster_kernel<T, D, ROWS>;
  prepare_kernel<kKernel, true>(shared);
  launch_overlapped_clusters(kKernel, dim3(plan.cluster * plan.row_tiles, p.kv_heads, p.batch), dim3(kClusterThreads),
                             plan.cluster, shared, stream, p, rows_map(p, rows_of),
                             cache_map("k", p.k, p.k_strides, p, kTile), cache_map("v", p.v, p.v_strides, p, kTile),
                             rows_of, page_shift_of(p, kTileShift), plan.cluster == 16 ? 4 : 3,
                             ((1 << 16) + rows_of.group - 1) / rows_of.group);
}

template <typename T, int D>
void tree_attention_sm90(const TreeAttentionParams& params, const TreeAttentionPlan& plan, cudaStream_t stream) {
  TreeAttentionParams p = params;
  if (p.scale == 0.0f) p.scale = std::numeric_limits<float>::min();  // 0 * -inf would be NaN
  if (plan.kernel == TreeAttentionKernel::kSm90Cluster)
    (plan.columns == 32 ? launch_tree_attention_cluster<T, D, 32> : launch_tree_attention_cluster<T, D, 64>)(p, plan,
                                                                                                             stream);
  else if (plan.kernel == TreeAttentionKernel::kSm90Rows)
    launch_tree_attention_sm90<T, D, RowsLayout<D>, true, tree_attention_rows_kernel<T, D, false>,
                               tree_attention_rows_kernel<T, D, true>>(p, plan, stream);
  else
    dispatch_columns<T, D>(p, plan, stream);
}

}  // namespace specvlm
