// verify_sample: lossless acceptance along a tree for sampling, with the coins as an input.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "specvlm/logits.h"

namespace specvlm {

constexpr int kSampleMaxNodes = 768;     // what the walk needs of them is in shared memory
constexpr int kSampleMaxBatch = 4096;    // one counter each
constexpr int kSampleMaxRows = 1 << 16;  // batch * nodes: one counter each
constexpr int kSampleMaxVocab = 1 << 20;

struct VerifySampleParams {
  const void* logits;           // [B,N,vocab], contiguous in the vocabulary, aligned to its own elements
  const std::int64_t* tokens;   // [B,N], contiguous in N
  const std::int32_t* parents;  // [B,N], contiguous in N; node i is reached only through a parent in 0..i-1
  const float* coins;           // [B,N+1] in [0,1), contiguous in N+1: one per node, the last for next_token
  std::int32_t* path;           // [B,N], contiguous in N: accepted nodes without the root, then -1
  std::int32_t* length;         // [B]
  std::int64_t* next_token;     // [B]
  void* workspace;              // verify_sample_workspace() bytes, aligned to 16
  std::uint32_t* arrivals;      // [B], or [B*N] with top_k or top_p: counters, 0 before and after every launch
  std::int64_t batch_stride;    // of logits, in elements
  std::int64_t node_stride;     // of logits
  std::int64_t tokens_stride;   // between rows of tokens
  std::int64_t parents_stride;  // between rows of parents; 0 for one tree for all
  std::int64_t coins_stride;    // between rows of coins
  std::int64_t path_stride;     // between rows of path
  int batch;                    // B, 0..kSampleMaxBatch
  int nodes;                    // N, 1..kSampleMaxNodes
  int vocab;                    // 1..kSampleMaxVocab
  int top_k;                    // the k highest logits of a row, ties to the lower id; vocab or more: all
  double top_p;                 // their smallest prefix whose mass reaches top_p of theirs, above 0; 1 or more: all
  double factor;                // log2(e) / temperature, 1e-36..1e30
  LogitsType dtype;
};

// Bytes that a call needs. aligned: logits and their strides are multiples of 16 bytes. filtered: with top_k or top_p.
std::size_t verify_sample_workspace(int batch, int nodes, int vocab, bool aligned, bool filtered);

// Fills params.arrivals. overlap: the launches of a call may overlap, which takes code built for sm_90 or newer.
// Asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void verify_sample(VerifySampleParams params, bool aligned, bool overlap, cudaStream_t stream);

}  // namespace specvlm
