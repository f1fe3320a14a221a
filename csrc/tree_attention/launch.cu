#include <algorithm>
#include <limits>

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
TreeAttentionKernel kernel_for(int group, int page_size, int architecture) {
  const bool tma = page_size == 0 || page_size >= 8;  // 8: a swizzled box has at least 8 rows
  return architecture >= 90 && tma && group <= kMostColumns ? TreeAttentionKernel::kSm90 : TreeAttentionKernel::kSm80;
}

}  // namespace

TreeAttentionPlan tree_attention_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim,
                                      std::int64_t capacity, int page_size, int architecture, int multiprocessors,
                                      int shared_memory) {
  check_argument(capacity <= std::numeric_limits<int>::max() - nodes - 2 * kTile, "k, v: capacity of ", capacity,
                 " tokens does not fit 32 bits");
  const int group = q_heads / kv_heads;
  if (kernel_for(group, page_size, architecture) == TreeAttentionKernel::kSm80)
    return sm80_plan(batch, nodes, q_heads, kv_heads, head_dim, static_cast<int>(capacity), multiprocessors,
                     shared_memory);
  TreeAttentionPlan plan{};
  plan.kernel = TreeAttentionKernel::kSm90;
  const int most = std::min(nodes, kMostColumns / group);  // whole nodes, so that one TMA box is a row tile
  plan.row_tiles = (nodes + most - 1) / most;
  plan.row_tile = (nodes + plan.row_tiles - 1) / plan.row_tiles * group;
  for (const int columns : kColumns) {
    plan.columns = 2 * columns;
    if (plan.columns >= plan.row_tile) break;
  }
  const std::int64_t items = static_cast<std::int64_t>(batch) * kv_heads * plan.row_tiles;
  const std::int64_t units = items * ((capacity + kTile - 1) / kTile + kSegmentCost);
  check_argument(units < (std::int64_t{1} << 31), "q: more than 2**31 tiles of work");
  plan.ctas = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>({multiprocessors, kMaxParts, units})));
  plan.workspace_floats =
      (head_dim == 64 ? Part<64>::floats(plan.ctas, plan.columns) : Part<128>::floats(plan.ctas, plan.columns)) +
      4 * items;
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
