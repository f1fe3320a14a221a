// tree_attention: N tree nodes attend to a KV cache that already holds their own keys and values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace specvlm {

enum class HalfType { kBFloat16, kFloat16 };

struct TreeAttentionStrides {  // in elements; the last dim is contiguous
  std::int64_t batch, token, head;
};

struct TreeAttentionParams {
  const void* q;                   // [B,N,Hq,D]
  const void* k;                   // [B,S,Hkv,D], or pages [P,page_size,Hkv,D]
  const void* v;                   // as k
  const std::int32_t* kv_lens;     // [B], context tokens; clamped to 0..S
  const std::int64_t* tree_mask;   // [B,N,W] bit words, or nullptr for a causal chain
  const std::int32_t* tree_lens;   // [B], clamped to 0..N, or nullptr for N
  const std::int32_t* page_table;  // [B,max_pages], entries clamped to 0..P-1, or nullptr for a contiguous cache
  void* out;                       // [B,N,Hq,D]
  float* lse;                      // [B,N,Hq] contiguous, natural log, or nullptr
  float* workspace;                // plan.workspace_floats floats
  TreeAttentionStrides q_strides, k_strides, v_strides, out_strides;  // of pages: batch is from page to page
  std::int64_t mask_batch_stride;                                     // elements; 0 for one mask for all
  std::int64_t mask_node_stride;
  std::int64_t page_table_stride;                           // elements between rows of page_table
  int mask_words;                                           // W
  int batch, nodes, q_heads, kv_heads, head_dim, capacity;  // head_dim 64 or 128; capacity is S or max_pages*page_size
  int page_size, pages, max_pages;                          // page_size a power of two; pages is P; 0 if contiguous
  float scale;                                              // softmax scale
  HalfType dtype;
};

// Rows: for many. Cluster: for little work. See csrc/tree_attention/sm90_rows.cuh and sm90_cluster.cuh.
enum class TreeAttentionKernel { kSm80, kSm90, kSm90Rows, kSm90Cluster };

// Which kernel runs and how the work is cut: every CTA reads each K/V tile once for `row_tile` packed rows (node, head
// of the group).
struct TreeAttentionPlan {
  TreeAttentionKernel kernel;
  int row_tile;   // packed rows per CTA
  int row_tiles;  // per KV head
  int columns;    // row_tile rounded up to what the kernel was built for
  int group;      // kSm80: heads of a group that share a CTA, a divisor of q_heads / kv_heads
  int side;       // kSm90, kSm90Rows: row tiles that as many CTAs take side by side, over the same tiles
  int cluster;  // CTAs of a cluster. kSm90Cluster: 8 or 16 share a row tile's part of the cache. kSm90, kSm90Rows: 2 of
                // those side by side load K and V for each other
  int ctas;
  std::size_t workspace_floats;
};

// architecture: 90 where sm_90a code was built and the device is of compute capability 9.0, otherwise 80.
// page_size: 0 for a contiguous cache. shared_memory: bytes per multiprocessor.
TreeAttentionPlan tree_attention_plan(int batch, int nodes, int q_heads, int kv_heads, int head_dim,
                                      std::int64_t capacity, int page_size, int architecture, int multiprocessors,
                                      int shared_memory);

// Addresses and strides of q, k, v and out are multiples of 16 bytes. Lengths are read more than once: what writes them
// has to be ordered with the call, as by the stream. Asynchronous on stream; throws std::invalid_argument or
// std::runtime_error.
void tree_attention(const TreeAttentionParams& params, const TreeAttentionPlan& plan, cudaStream_t stream);

}  // namespace specvlm
