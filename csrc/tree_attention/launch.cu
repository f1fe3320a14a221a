#include <algorithm>

#include "common/check.h"
#include "tree_attention/sm90_launch.cuh"

namespace specvlm {

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
TreeAttentionKernel kernel_for(int page_size, int architecture) {
  return architecture >= 90 && page_size == 0 ? TreeAttentionKernel::kSm90 : TreeAttentionKernel::kSm80;
}

}  // namespace

TreeAttentionPlan tree_attention_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim, int capacity,
                                      int page_size, int architecture, int multiprocessors) {
  TreeAttentionPlan plan{};
  plan.kernel = kernel_for(page_size, architecture);
  check_argument(plan.kernel == TreeAttentionKernel::kSm90, "page_size: paged caches have no CUDA kernel yet");
  const int rows = nodes * (q_heads / kv_heads), most = 2 * kColumns[std::size(kColumns) - 1];
  plan.row_tiles = (rows + most - 1) / most;
  const int wanted = (rows + plan.row_tiles - 1) / plan.row_tiles;
  for (const int columns : kColumns) {
    plan.row_tile = 2 * columns;
    if (plan.row_tile >= wanted) break;
  }
  const std::int64_t tiles =
      static_cast<std::int64_t>(batch) * kv_heads * plan.row_tiles * ((capacity + kTile - 1) / kTile);
  check_argument(tiles < (std::int64_t{1} << 31), "q: more than 2**31 tiles of work");
  plan.ctas = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(multiprocessors, tiles)));
  plan.workspace_floats = static_cast<std::size_t>(2) * plan.ctas * plan.row_tile * (head_dim + 1);
  return plan;
}

void tree_attention(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  check_argument(p.head_dim == 64 || p.head_dim == 128, "head_dim: expected 64 or 128, got ", p.head_dim);
  const bool bf16 = p.dtype == HalfType::kBFloat16;
  const auto run = p.head_dim == 64
                       ? (bf16 ? tree_attention_sm90<__nv_bfloat16, 64> : tree_attention_sm90<__half, 64>)
                       : (bf16 ? tree_attention_sm90<__nv_bfloat16, 128> : tree_attention_sm90<__half, 128>);
  run(p, plan, stream);
}

}  // namespace specvlm
