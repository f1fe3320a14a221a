// verify_greedy: the longest path of each tree that the target's argmax agrees with.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "specvlm/logits.h"

namespace specvlm {

constexpr int kVerifyMaxNodes = 4096;  // their argmax and children are in shared memory
constexpr int kVerifyMaxBatch = 4096;  // one counter each
constexpr int kVerifyMaxVocab = 1 << 20;

struct VerifyGreedyParams {
  const void* logits;             // [B,N,vocab], contiguous in the vocabulary, aligned to its own elements
  const std::int64_t* tokens;     // [B,N], contiguous in N
  const std::int32_t* parents;    // [B,N], contiguous in N; node i is reached only through a parent in 0..i-1
  const std::int32_t* tree_lens;  // [B], nodes from tree_lens[b] on are never reached; nullptr for N
  std::int32_t* path;             // [B,N], contiguous in N: accepted nodes without the root, then -1
  std::int32_t* length;           // [B]
  std::int64_t* next_token;       // [B]
  std::uint64_t* workspace;       // verify_greedy_workspace() entries
  std::uint32_t* arrivals;        // [B] counters, 0 before and after the launch
  std::int64_t batch_stride;      // of logits, in elements
  std::int64_t node_stride;       // of logits
  std::int64_t tokens_stride;     // between rows of tokens
  std::int64_t parents_stride;    // between rows of parents; 0 for one tree for all
  std::int64_t path_stride;       // between rows of path
  int batch;                      // B, 0..kVerifyMaxBatch
  int nodes;                      // N, 1..kVerifyMaxNodes
  int vocab;                      // 1..kVerifyMaxVocab
  LogitsType dtype;
};

// Entries of 8 bytes that a call needs. aligned: logits and their strides are multiples of 16 bytes.
std::size_t verify_greedy_workspace(int batch, int nodes, int vocab, bool aligned);

// Fills params.arrivals. Asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void verify_greedy(VerifyGreedyParams params, bool aligned, cudaStream_t stream);

}  // namespace specvlm
