// One CTA takes one tile of one node's logits. The request's last CTA finishes the nodes' argmax and walks the tree.
#pragma once

#include "common/logits.cuh"
#include "specvlm/verify_greedy.h"

namespace specvlm {

constexpr int kVerifyPerThread = 32;

// The first entry (see entry_of) of a warp's logits, for every lane; 0 if all lie outside the vocabulary.
template <typename T, int PER_THREAD>
__device__ __forceinline__ std::uint64_t warp_argmax(LogitsTile<T, PER_THREAD>& tile) {
  using Tile = LogitsTile<T, PER_THREAD>;
  float top = tile.highest(0);
#pragma unroll
  for (int v = 1; v < Tile::kVectors; ++v) top = fmaxf(top, tile.highest(v));
  const std::uint32_t key = __reduce_max_sync(~0u, order_key(top));
  const float highest = key_value(key);
  unsigned first = ~0u;  // token ids ascend with v and e
#pragma unroll
  for (int v = Tile::kVectors - 1; v >= 0; --v) {
#pragma unroll
    for (int e = Tile::kPerVector - 1; e >= 0; --e) {
      if (tile.logit(v, e) == highest && tile.inside(v, e)) first = tile.token(v, e);
    }
  }
  first = __reduce_min_sync(~0u, first);
  return first == ~0u ? 0 : static_cast<std::uint64_t>(key) << 32 | ~first;
}

// Walks from the root: children[u] is the first accepted child of node u, or `nodes`. Fills path, length, next_token.
__device__ __forceinline__ void walk_children(const int* children, const int* best, int nodes, std::int32_t* path,
                                              std::int32_t* length, std::int64_t* next_token) {
  __shared__ int accepted;
  if (threadIdx.x == 0) {
    int count = 0, node = 0;
#pragma unroll 1
    for (int child = children[0]; child < nodes; child = children[node]) {  // ends: a child lies above its parent
      path[count++] = child;
      node = child;
    }
    *length = count;
    *next_token = best[node];
    accepted = count;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = accepted + threadIdx.x; i < nodes; i += kLogitsThreads) path[i] = -1;
}

template <typename T>
__global__ void __launch_bounds__(kLogitsThreads, 4)
    verify_greedy_kernel(const __grid_constant__ VerifyGreedyParams p) {
  using Tile = LogitsTile<T, kVerifyPerThread>;
  const int part = blockIdx.x, parts = gridDim.x, node = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t request = blockIdx.z;
  std::uint64_t* tops = p.workspace + request * p.nodes * parts;  // [nodes,parts], every tile's first entry
  const std::int64_t* tokens = p.tokens + request * p.tokens_stride;
  const std::int32_t* parents = p.parents + request * p.parents_stride;
  if (threadIdx.x == 0) {  // the last CTA needs them at once
    prefetch_to_l2(tokens + node);
    prefetch_to_l2(parents + node);
  }

  __shared__ std::uint64_t by_warp[kLogitsWarps];
  Tile tile(static_cast<const T*>(p.logits) + request * p.batch_stride + node * p.node_stride, part, p.vocab);
  const std::uint64_t of_warp = warp_argmax(tile);
  if (lane == 0) by_warp[warp] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    std::uint64_t top = 0;
#pragma unroll
    for (int w = 0; w < kLogitsWarps; ++w) top = max(top, by_warp[w]);
    tops[node * parts + part] = top;
  }
  if (!last_to_arrive(p.arrivals + request, p.nodes * parts)) return;

  extern __shared__ int per_node[];
  int *best = per_node, *children = per_node + p.nodes;
  const int live = p.tree_lens == nullptr ? p.nodes : min(p.tree_lens[request], p.nodes);
  auto adopt = [&](int i, int parent, std::int64_t token) {
    if (parent >= 0 && parent < i && token == best[parent]) atomicMin(children + parent, i);
  };
  int my_parent = -1;  // loaded here, on the way together with the tiles' entries
  std::int64_t my_token = 0;
  if (static_cast<int>(threadIdx.x) < live) {
    my_parent = parents[threadIdx.x];
    my_token = tokens[threadIdx.x];
  }

  constexpr int kLanes = 8, kDeep = 4;  // lanes per node, loads of each in flight
#pragma unroll 1
  for (int first = 0; first < p.nodes; first += kLogitsThreads / kLanes) {
    const int u = first + threadIdx.x / kLanes;
    std::uint64_t top = 0;
#pragma unroll 1
    for (int start = threadIdx.x % kLanes; u < p.nodes && start < parts; start += kLanes * kDeep) {
      std::uint64_t some[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        some[i] = start + i * kLanes < parts ? __ldcg(tops + u * parts + start + i * kLanes) : 0;
      }
#pragma unroll
      for (int i = 0; i < kDeep; ++i) top = max(top, some[i]);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
    if (u < p.nodes && threadIdx.x % kLanes == 0) {
      best[u] = entry_token(top);
      children[u] = p.nodes;
    }
  }
  __syncthreads();
  adopt(threadIdx.x, my_parent, my_token);
#pragma unroll 1
  for (int i = threadIdx.x + kLogitsThreads; i < live; i += kLogitsThreads) {
    adopt(i, parents[i], tokens[i]);
  }
  __syncthreads();
  walk_children(children, best, p.nodes, p.path + request * p.path_stride, p.length + request, p.next_token + request);
}

}  // namespace specvlm
