#include "common/check.h"
#include "expand_tree/kernel.cuh"

namespace specvlm {

void expand_tree(const ExpandTreeParams& p, cudaStream_t stream) {
  check_argument(p.width >= 1 && p.rows >= 1 && p.rows <= kExpandMaxNodes && (p.rows - 1) % p.width == 0,
                 "rows: expected 1 + a multiple of width=", p.width, ", at most ", kExpandMaxNodes, ", got ", p.rows);
  check_argument(p.width <= kExpandMaxCandidates / p.rows, "width: expected at most ", kExpandMaxCandidates,
                 " candidates, got ", p.rows, " rows of ", p.width);
  const int most = p.all_rows ? p.rows + p.width : 1 + p.rows * p.width, least = p.all_rows ? most : 1;
  check_argument(p.nodes >= least && p.nodes <= most && p.nodes <= kExpandMaxNodes, "nodes: expected ", least, "..",
                 most, ", at most ", kExpandMaxNodes, ", got ", p.nodes);
  check_argument(p.batch >= 0, "batch: expected at least 0, got ", p.batch);
  if (p.batch == 0) return;
  expand_tree_kernel<<<p.batch, kExpandThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "expand_tree launch");
}

}  // namespace specvlm
