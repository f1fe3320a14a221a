#include <algorithm>
#ifdef SPECVLM_TUNE
#include <cstdlib>
#include <cstring>
#endif
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

constexpr int kRunCost = 5;  // traced on an H100: 4 to 6
constexpr int kRowsColumns = 2 * kRowsPerWarpgroup;

// The packed rows of a head in equal tiles of whole nodes, so that one TMA box is a row tile, of at most so many rows.
TreeAttentionPlan row_tiles(TreeAttentionKernel kernel, int nodes, int group, int most_rows) {
  TreeAttentionPlan plan{};
  plan.kernel = kernel;
  const int most = std::min(nodes, most_rows / group);
  plan.row_tiles = (nodes + most - 1) / most;
  plan.row_tile = (nodes + plan.row_tiles - 1) / plan.row_tiles * group;
  return plan;
}

// What a plan costs a multiprocessor for 64 positions, in cycles.
int cycles(const TreeAttentionPlan& plan) {
  return plan.row_tiles * (plan.kernel == TreeAttentionKernel::kSm90Rows ? 1350 : plan.columns * 25 / 2);
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
  TreeAttentionPlan plan = row_tiles(TreeAttentionKernel::kSm90, nodes, group, kMostColumns);
  for (const int columns : kColumns) {
    plan.columns = 2 * columns;
    if (plan.columns >= plan.row_tile) break;
  }
  if (group <= kRowsColumns) {
    TreeAttentionPlan rows = row_tiles(TreeAttentionKernel::kSm90Rows, nodes, group, kRowsColumns);
    rows.columns = kRowsColumns;
    if (cycles(rows) < cycles(plan)) plan = rows;
#ifdef SPECVLM_TUNE
    if (const char* kernel = std::getenv("SPECVLM_TREE_ATTENTION")) {
      if (std::strcmp(kernel, "rows") == 0) plan = rows;
      if (std::strcmp(kernel, "swapped") == 0 && plan.kernel == rows.kernel) {
        plan = row_tiles(TreeAttentionKernel::kSm90, nodes, group, kMostColumns);
        for (const int columns : kColumns) {
          plan.columns = 2 * columns;
          if (plan.columns >= plan.row_tile) break;
        }
      }
    }
#endif
  }
  plan.run_cost = kRunCost;
#ifdef SPECVLM_TUNE
  if (const char* cost = std::getenv("SPECVLM_RUN_COST")) plan.run_cost = std::atoi(cost);
#endif
  const int rounds = (plan.row_tiles + kMostSide - 1) / kMostSide;
  plan.side = std::min((plan.row_tiles + rounds - 1) / rounds, multiprocessors);
  const std::int64_t items = static_cast<std::int64_t>(batch) * kv_heads * rounds;
  const std::int64_t units = items * ((capacity + kTile - 1) / kTile + plan.run_cost);
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
