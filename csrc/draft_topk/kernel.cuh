// One CTA takes one tile of a row: its k first tokens and its part of the normaliser. The row's last CTA merges.
#pragma once

#include "common/numeric.cuh"
#include "common/topk.cuh"
#include "specvlm/draft_topk.h"

namespace specvlm {

// The sum over some tokens of 2^((logit - reference) * factor), differences first: they are exact for half types.
struct alignas(8) ExpSum {
  float reference, sum;
};

constexpr float kLowestReference = -3.0e38f;  // instead of -inf, whose differences would be NaN

// Of a thread's logits; also their highest. The reference is some token's logit, not always the highest: a later one
// may be larger by up to 2^kSlack in its share before the sum is scaled.
template <typename T, int PER_THREAD>
__device__ __forceinline__ ExpSum exp_sum(LogitsTile<T, PER_THREAD>& tile, float factor, float& highest) {
  using Tile = LogitsTile<T, PER_THREAD>;
  constexpr float kSlack = 64.0f;
  highest = tile.highest(0);
  ExpSum total{fmaxf(highest, kLowestReference), 0.0f};
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    if (v > 0) {
      const float top = tile.highest(v);
      highest = fmaxf(highest, top);
      if ((top - total.reference) * factor > kSlack) {
        total.sum *= exp2_fast((total.reference - top) * factor);
        total.reference = top;
      }
    }
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int e = 0; e < Tile::kPerVector; e += 2) {
      even += exp2_fast((tile.logit(v, e) - total.reference) * factor);
      odd += exp2_fast((tile.logit(v, e + 1) - total.reference) * factor);
    }
    total.sum += even + odd;
  }
  return total;
}

// The sum of a warp's sums, in a fixed order, for every lane.
__device__ __forceinline__ ExpSum warp_total(ExpSum mine, float factor) {
  ExpSum total{mine.reference, 0.0f};
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    total.reference = fmaxf(total.reference, __shfl_xor_sync(~0u, total.reference, step));
  }
  total.sum = mine.sum * exp2_fast((mine.reference - total.reference) * factor);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total.sum += __shfl_xor_sync(~0u, total.sum, step);
  return total;
}

template <typename T, int PER_THREAD, int MOST>
__global__ void __launch_bounds__(kLogitsThreads, 4) draft_topk_kernel(const __grid_constant__ DraftTopkParams p) {
  using Tile = LogitsTile<T, PER_THREAD>;
  __shared__ TopKShared<MOST> shared;
  __shared__ ExpSum sums[kLogitsWarps];
  __shared__ float reference, log_sum;
  const int row = blockIdx.y, part = blockIdx.x, parts = gridDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::uint64_t* entries = p.workspace + static_cast<std::int64_t>(row) * parts * p.k;
  ExpSum* part_sums = reinterpret_cast<ExpSum*>(p.workspace + static_cast<std::int64_t>(p.rows) * parts * p.k) +
                      static_cast<std::int64_t>(row) * parts;

  Tile tile(static_cast<const T*>(p.logits) + row * p.row_stride, part, p.vocab);
  float top;
  const ExpSum of_warp = warp_total(exp_sum(tile, p.factor, top), p.factor);
  if (lane == 0) sums[warp] = of_warp;
  top_of_tile(tile, top, p.k, entries + part * p.k, shared);  // its barriers come between writing and reading sums
  if (warp == 0) {
    const ExpSum of_tile = warp_total(lane < kLogitsWarps ? sums[lane] : ExpSum{kLowestReference, 0.0f}, p.factor);
    if (lane == 0) part_sums[part] = of_tile;
  }
  if (!last_to_arrive(p.arrivals + row, parts)) return;

  if (warp == 0) {
    ExpSum mine[kTopKMaxParts / 32], total = ExpSum{kLowestReference, 0.0f};
#pragma unroll
    for (int i = 0; i < kTopKMaxParts / 32; ++i) {
      mine[i] = ExpSum{kLowestReference, 0.0f};
      if (lane + 32 * i < parts) {
        const float2 both = __ldcg(reinterpret_cast<const float2*>(part_sums + lane + 32 * i));
        mine[i] = {both.x, both.y};
      }
    }
#pragma unroll
    for (int i = 0; i < kTopKMaxParts / 32; ++i) total.reference = fmaxf(total.reference, mine[i].reference);
#pragma unroll
    for (int i = 0; i < kTopKMaxParts / 32; ++i) {
      total.sum += mine[i].sum * exp2_fast((mine[i].reference - total.reference) * p.factor);
    }
    total = warp_total(total, p.factor);
    if (lane == 0) {
      reference = total.reference;
      log_sum = isinf(total.reference) ? 0.0f : logf(total.sum);  // beside inf all else has probability 0
    }
  }
  gather_top_entries(entries, parts, p.k, shared);
  const int count = shared.count;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kLogitsThreads) {
    const std::uint64_t entry = shared.list[i];
    const int rank = rank_among(shared.list, count, entry);
    if (rank < p.k) {
      constexpr double kLn2 = 0.693147180559945309;
      const double above = (static_cast<double>(entry_logit(entry)) - reference) * (p.factor * kLn2);
      p.log_probs[static_cast<std::int64_t>(row) * p.k + rank] = static_cast<float>(above - log_sum);
      p.token_ids[static_cast<std::int64_t>(row) * p.k + rank] = entry_token(entry);
    }
  }
}

}  // namespace specvlm
