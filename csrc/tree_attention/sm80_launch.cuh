// Launches one dtype and head dim; each is instantiated in a file of its own, so that they compile side by side.
#pragma once

#include <iterator>
#include <limits>

#include "common/check.h"
#include "common/launch.h"
#include "tree_attention/sm80.cuh"

namespace specvlm {

template <typename T, int D, int INDEX = 0>
void launch_tree_attention_sm80(const TreeAttentionParams& p, const TreeAttentionPlan& plan, int heads_per_kv,
                                cudaStream_t stream) {
  if constexpr (INDEX == std::size(kSm80Shapes)) {
    throw std::invalid_argument("plan: made by tree_attention_plan?");
  } else if (constexpr Sm80Shape shape = kSm80Shapes[INDEX]; shape.rows() != plan.columns) {
    launch_tree_attention_sm80<T, D, INDEX + 1>(p, plan, heads_per_kv, stream);
  } else {
    const int group = p.q_heads / p.kv_heads;
    const RowTiles rows_of{plan.row_tiles, plan.row_tile / group, group, plan.row_tile};
    const Sm80Parts<D> parts{p.workspace, plan.ctas, plan.columns};
    constexpr auto kernel = tree_attention_sm80_kernel<T, D, shape.warps_m, shape.warps_n>;
    constexpr int shared = shape.shared_bytes(D);
    prepare_kernel<kernel>(shared);
    kernel<<<plan.ctas, 32 * shape.warps(), shared, stream>>>(p, rows_of, parts, p.scale * 1.4426950408889634f,
                                                              heads_per_kv);
    check_cuda(cudaGetLastError(), "tree_attention launch");
    const unsigned rows = static_cast<unsigned>(p.batch) * p.nodes * p.q_heads;
    tree_attention_sm80_combine_kernel<T, D><<<rows, 32 * kSm80CombineWarps, 0, stream>>>(p, rows_of, parts);
    check_cuda(cudaGetLastError(), "tree_attention combine launch");
  }
}

template <typename T, int D>
void tree_attention_sm80(const TreeAttentionParams& params, const TreeAttentionPlan& plan, cudaStream_t stream) {
  TreeAttentionParams p = params;  // with heads of K and V that hold a group small enough
  p.kv_heads = p.q_heads / plan.group;
  if (p.page_table != nullptr && p.pages == 0) p.capacity = 0;  // a table cannot point into an empty pool
  check_argument(static_cast<std::int64_t>(p.batch) * p.nodes * p.q_heads <= std::numeric_limits<int>::max(),
                 "q: more than 2**31 rows");
  launch_tree_attention_sm80<T, D>(p, plan, p.kv_heads / params.kv_heads, stream);
}

}  // namespace specvlm
