#include "common/check.h"
#include "common/counters.h"
#include "compact_kv/kernel.cuh"

namespace specvlm {

void compact_kv(CompactKvParams params, cudaStream_t stream) {
  check_argument(params.layers >= 1 && params.layers <= kCompactKvMaxLayers, "layers: expected 1..",
                 kCompactKvMaxLayers, ", got ", params.layers);
  check_argument(params.batch >= 0 && params.batch <= 65535, "batch: expected 0..65535, got ", params.batch);
  check_argument(params.nodes >= 1, "nodes: expected at least 1, got ", params.nodes);
  if (params.batch == 0) return;
  const int columns = params.heads * params.head_vectors;
  const dim3 grid((columns + kCompactKvThreads - 1) / kCompactKvThreads, 2 * params.layers, params.batch);
  check_argument(grid.x > 0, "heads: expected at least one 16-byte vector per token");
  params.arrivals = acquire_counters(1, stream);
  compact_kv_kernel<<<grid, kCompactKvThreads, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "compact_kv launch");
}

}  // namespace specvlm
