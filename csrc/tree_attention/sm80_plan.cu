#include <algorithm>
#include <limits>

#include "common/check.h"
#include "tree_attention/line.cuh"
#include "tree_attention/sm80_shapes.h"

namespace specvlm {

TreeAttentionPlan sm80_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim, int capacity,
                            int multiprocessors, int shared_memory) {
  constexpr int kReserved = 1024;  // shared memory that the system keeps of every CTA
  auto resident = [&](const Sm80Shape& shape) {
    return std::min(shape.resident(head_dim), shared_memory / (shape.shared_bytes(head_dim) + kReserved));
  };
  int most = 0;  // rows of a CTA
  for (const Sm80Shape& shape : kSm80Shapes)
    if (resident(shape) > 0) most = shape.rows();
  check_argument(most > 0, "shared_memory: expected at least 75 KB per multiprocessor, got ", shared_memory, " bytes");

  TreeAttentionPlan plan{};
  plan.kernel = TreeAttentionKernel::kSm80;
  const int group = q_heads / kv_heads;
  int cuts = 1;  // of a group that does not fit a CTA's rows
  while (group % cuts != 0 || group / cuts > most) ++cuts;
  plan.group = group / cuts;
  const int most_nodes = std::min(nodes, most / plan.group);
  plan.row_tiles = (nodes + most_nodes - 1) / most_nodes;
  plan.row_tile = (nodes + plan.row_tiles - 1) / plan.row_tiles * plan.group;
  const Sm80Shape shape = *std::find_if(std::begin(kSm80Shapes), std::end(kSm80Shapes),
                                        [&](const Sm80Shape& s) { return s.rows() >= plan.row_tile; });
  plan.columns = shape.rows();

  const std::int64_t items = static_cast<std::int64_t>(batch) * kv_heads * cuts * plan.row_tiles;
  const std::int64_t units = items * ((capacity + kTile - 1) / kTile + kSegmentCost);
  check_argument(units <= std::numeric_limits<int>::max(), "q: more than 2**31 tiles of work");
  plan.ctas = static_cast<int>(std::clamp<std::int64_t>(units, 1, std::int64_t{multiprocessors} * resident(shape)));
  plan.workspace_floats = static_cast<std::size_t>(2) * plan.ctas * plan.columns * (head_dim + 1);
  return plan;
}

}  // namespace specvlm
