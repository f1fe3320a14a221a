// One CTA takes one tile of one node's logits and leaves its mass. The request's last CTA walks the tree and draws.
#pragma once

#include "verify_sample/walk.cuh"

namespace specvlm {

// Of the logits of a tile that equal the row's cut, the last one that is kept: the lower ids come first, and the search
// left how many every tile has. Every thread of the CTA calls it and gets the answer.
template <typename T>
__device__ __forceinline__ int last_kept_tie(const LogitsTile<T, kSamplePerThread>& tile, const SampleState& state,
                                             const std::int64_t* histograms, const Share& share) {
  using Tile = LogitsTile<T, kSamplePerThread>;
  __shared__ int ties_of_slot[Tile::kVectors * kLogitsWarps];
  __shared__ std::int64_t taken, all;
  __shared__ int last;
  const int part = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float cut = state.cut;
  if (warp == 0) {
    std::int64_t before = 0;
#pragma unroll 1
    for (int i = lane; i < part; i += 32) before += histograms[i * kSearchBins + state.prefix % kSearchBins];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(~0u, before, step);
    if (lane == 0) {
      std::int64_t mine = histograms[part * kSearchBins + state.prefix % kSearchBins];
      if (state.by_mass) {
        const std::int64_t one = max(share.mass(cut, state.top), std::int64_t{1});
        before /= one;
        mine /= one;
      }
      taken = max(min(state.wanted - before, mine), std::int64_t{0});
      all = mine;
      last = -1;
    }
  }
  __syncthreads();
  if (taken == all) return kSampleMaxVocab;
  if (taken == 0) return -1;

  std::uint32_t equal = 0;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < Tile::kPerVector; ++e) {
      if (tile.logit(v, e) == cut) equal |= 1u << (v * Tile::kPerVector + e);
    }
    const int ties = __reduce_add_sync(~0u, __popc(equal >> (v * Tile::kPerVector)));
    if (lane == 0) ties_of_slot[v * kLogitsWarps + warp] = ties;
  }
  __syncthreads();
  int before_vector = 0;
#pragma unroll 1
  for (int v = 0; v < Tile::kVectors; ++v) {  // token ids ascend with the vector, then the thread, then the element
    const std::uint32_t mine = equal >> (v * Tile::kPerVector) & ((1u << Tile::kPerVector) - 1);
    int rank = before_vector + warp_prefix(__popc(mine)) - __popc(mine);
#pragma unroll 1
    for (int w = 0; w < kLogitsWarps; ++w) {
      if (w < warp) rank += ties_of_slot[v * kLogitsWarps + w];
      before_vector += ties_of_slot[v * kLogitsWarps + w];
    }
#pragma unroll 1
    for (std::uint32_t left = mine; left != 0; left &= left - 1) {
      if (++rank == taken) last = tile.token(v, __ffs(left) - 1);
    }
  }
  __syncthreads();
  return last;
}

template <typename T, bool FILTERED>
__global__ void __launch_bounds__(kLogitsThreads, 4)
    verify_sample_kernel(const __grid_constant__ VerifySampleParams p) {
  using Tile = LogitsTile<T, kSamplePerThread>;
  const int part = blockIdx.x, parts = gridDim.x, node = blockIdx.y;
  const std::int64_t request = blockIdx.z, row = request * p.nodes + node;
  const SampleWorkspace workspace(p.workspace, static_cast<std::int64_t>(p.batch) * p.nodes, parts);
  const Share share(p.factor);
  const SampleTree<T, FILTERED> tree(p, workspace, request, parts);
  if (threadIdx.x == 0) {  // the last CTA needs them at once
    prefetch_to_l2(tree.tokens + node);
    prefetch_to_l2(tree.parents + node);
    prefetch_to_l2(tree.coins + node);
  }

  __shared__ std::int64_t mass_of_warp[kLogitsWarps];
  const Tile tile(tree.row(node), part, p.vocab);
  if constexpr (FILTERED) wait_for_launch_before();
  Kept kept{};
  float top;
  if constexpr (FILTERED) {
    const SampleState& state = workspace.states[row];
    kept = {state.cut, last_kept_tie(tile, state, workspace.histograms + row * parts * kSearchBins, share)};
    top = state.top;
  } else {
    top = top_of_cta(tile);
  }
  MassSum sum;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < Tile::kPerVector; ++e) {
      const float logit = tile.logit(v, e);
      if (!FILTERED || kept(logit, tile.token(v, e))) sum.add(share(logit, top));
    }
  }
  const std::int64_t of_warp = sum.warp_total();
  if (threadIdx.x % 32 == 0) mass_of_warp[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    SampleEntry entry{0, top, kept.last};
#pragma unroll
    for (int w = 0; w < kLogitsWarps; ++w) entry.mass += mass_of_warp[w];
    workspace.entries[row * parts + part] = entry;
  }
  if (last_to_arrive(p.arrivals + request, p.nodes * parts)) tree.verify(share);
}

}  // namespace specvlm
