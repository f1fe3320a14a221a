// expand_tree: which nodes a draft reads next, and the best of all that it proposed, by cumulative log-probability.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace specvlm {

constexpr int kExpandMaxNodes = 512;        // rows and nodes; a request's tree is in shared memory
constexpr int kExpandMaxCandidates = 8192;  // rows * width, with their scores in shared memory

// Row 0 is the root; rows 1+(d-1)*width .. d*width are the `width` best candidates of depth d, the best first.
// Candidate row * width + rank is a child of its row. Better is the higher sum of log-probabilities, then the lower
// candidate.
struct ExpandTreeParams {
  const float* log_probs;         // [B,R,width], contiguous in the width; above 0 counts as 0, NaN as -inf
  const std::int64_t* token_ids;  // [B,R,width], contiguous in the width
  const std::int64_t* root;       // [B], token of node 0
  std::int64_t* tokens;           // [B,N], contiguous, as all outputs
  std::int32_t* parents;          // [B,N]; -1 for node 0, and below the node's own index for all others
  std::int32_t* depths;           // [B,N]
  std::int64_t* mask;             // [B,N,ceil(N/64)] bit words: the node itself and its ancestors
  std::int32_t* node_rows;        // [B,N], the row that a node is, or -1
  std::int64_t log_probs_stride;  // between requests, in elements
  std::int64_t log_probs_row;     // between rows
  std::int64_t token_ids_stride;  // between requests
  std::int64_t token_ids_row;     // between rows
  int batch;                      // B
  int rows;                       // R = 1 + a multiple of width, 1..kExpandMaxNodes
  int width;                      // 1 or more
  int nodes;                      // N: R + width if all_rows, else 1..1+R*width; at most kExpandMaxNodes
  bool all_rows;                  // keep the R rows and the `width` best candidates of the deepest level
};

// Asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void expand_tree(const ExpandTreeParams& params, cudaStream_t stream);

}  // namespace specvlm
