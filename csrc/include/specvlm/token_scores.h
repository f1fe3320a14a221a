// token_scores: how much attention the text queries pay to each token of a span of the cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "specvlm/tree_attention.h"  // HalfType

namespace specvlm {

struct TokenScoresStrides {  // in elements; the last dim is contiguous
  std::int64_t batch, token, head;
};

struct TokenScoresParams {
  const void* q;                            // [B,T,Hq,D]
  const void* k;                            // [B,S,Hkv,D], or pages [P,page_size,Hkv,D]
  const float* lse;                         // [B,T,Hq], natural log; rows of +-inf count for nothing
  const std::int32_t* kv_lens;              // [B], tokens before the first query; clamped to 0..capacity
  const std::int32_t* span_starts;          // [B], or nullptr for span_start
  const bool* query_mask;                   // [B,T], the queries in Q, or nullptr for all
  const std::int32_t* page_table;           // [B,max_pages], entries clamped to 0..P-1, or nullptr
  float* out;                               // [B,span_len], mutated: added to
  float* workspace;                         // plan.workspace_floats floats
  TokenScoresStrides q_strides, k_strides;  // of pages: batch is from page to page
  std::int64_t lse_batch_stride, lse_token_stride, mask_batch_stride, page_table_stride, out_batch_stride;  // elements
  int batch, queries, q_heads, kv_heads, head_dim;  // B, T, Hq, Hkv; head_dim 64 or 128
  int capacity;                                     // S, or max_pages * page_size; at most 2**30
  int page_size, pages, max_pages;                  // page_size a power of two; pages is P; 0 if contiguous
  int span_start, span_len;                         // span_start is clamped to -span_len..capacity
  double scale;                                     // softmax scale
  float weight;
  HalfType dtype;
};

enum class TokenScoresKernel { kSm80, kSm90 };

// Which kernel runs and how the work is cut. Packed rows are (query, head of the group); a row tile is what a CTA keeps
// of Q in shared memory while the cache's tiles pass by.
struct TokenScoresPlan {
  TokenScoresKernel kernel;
  int columns;                // packed rows of one matrix product: wgmma's N, or a block of Q
  int row_tiles;              // per KV head
  int tile_queries;           // queries of a row tile
  int chunks, chunk_queries;  // boxes in which TMA loads a row tile
  int rows;                   // packed rows of a row tile in shared memory, rounded up
  int stages;                 // tiles of the cache in flight
  int ctas;
  std::size_t workspace_floats;  // a partial score per KV head, request and token of the span
};

// architecture: 90 where sm_90a code was built and the device is of compute capability 9.0, otherwise 80.
// page_size: 0 for a contiguous cache.
TokenScoresPlan token_scores_plan(int batch, int queries, int q_heads, int kv_heads, int head_dim, int span_len,
                                  int page_size, int architecture, int multiprocessors);

// Two launches, asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void token_scores(const TokenScoresParams& params, const TokenScoresPlan& plan, cudaStream_t stream);

}  // namespace specvlm
