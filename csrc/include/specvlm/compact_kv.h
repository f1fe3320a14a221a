// compact_kv: move the accepted path's keys and values to the front of the tree's slots, in every layer at once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace specvlm {

constexpr int kCompactKvMaxLayers = 128;  // one launch; 2 * 128 pointers keep the parameters below 4 KB

// Strides of one cache in bytes. Contiguous batch: [B,S,Hkv,D], outer = B. Paged: [P,page_size,Hkv,D], outer = P.
struct CompactKvStrides {
  std::int64_t outer;
  std::int64_t token;
  std::int64_t head;
};

struct CompactKvParams {
  std::uint64_t caches[2 * kCompactKvMaxLayers];  // device pointers: keys of layers 0..L-1, then values; mutated
  CompactKvStrides k_strides, v_strides;          // multiples of 16; the same for all layers
  std::int32_t* kv_lens;                          // [B], mutated: += length + 1, clamped to the capacity
  const std::int32_t* path;                       // [B,N], accepted nodes in ascending order, then anything
  const std::int32_t* length;                     // [B], accepted nodes; clamped to 0..N-1
  const std::int32_t* page_table;                 // [B,max_pages], or nullptr for a contiguous batch
  std::int64_t path_stride;                       // elements between rows of path
  std::int64_t page_table_stride;                 // elements between rows of page_table
  std::uint32_t* arrivals;                        // one counter, 0 before and after the launch
  int layers;                                     // L, 1..kCompactKvMaxLayers
  int batch;                                      // B
  int nodes;                                      // N
  int capacity;                                   // tokens per request: S, or max_pages * page_size
  int pages;                                      // P, or 0
  int page_shift;                                 // log2(page_size), or 0
  int heads;                                      // Hkv
  int head_vectors;                               // D * sizeof(element) / 16
};

// For every layer, K and V: row kv_lens+path[i] moves to kv_lens+1+i, i < length. A row whose path[i] is not in
// i+1 .. N-1, or that lies outside the cache, stays where it is. Fills params.arrivals. Asynchronous on stream;
// throws std::invalid_argument or std::runtime_error.
void compact_kv(CompactKvParams params, cudaStream_t stream);

}  // namespace specvlm
