// Puts together what several CTAs of the sm_80 kernel computed of one item.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/numeric.cuh"
#include "tree_attention/line.cuh"

namespace specvlm {

// The workspace: results (float32 [2 * ctas, columns, D]) and then their log2 sums [2 * ctas, columns]. A CTA leaves at
// most two parts of items: the rest of one that others began (slot 0), and the begin of one that others end (slot 1).
template <int D>
struct Sm80Parts {
  float* workspace;
  int ctas, columns;

  __device__ __forceinline__ std::int64_t index(int cta, bool begins, int row) const {
    return static_cast<std::int64_t>(2 * cta + begins) * columns + row;
  }
  __device__ __forceinline__ float* result(std::int64_t index) const { return workspace + index * D; }
  __device__ __forceinline__ float* log2_sum(std::int64_t index) const {
    return workspace + static_cast<std::int64_t>(2 * ctas) * columns * D + index;
  }
};

constexpr int kSm80CombineWarps = 4;

// One CTA per output row: its warps take the parts in turn, and their sums are added in the order of the warps.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kSm80CombineWarps)
    tree_attention_sm80_combine_kernel(const __grid_constant__ TreeAttentionParams p,
                                       const __grid_constant__ RowTiles rows_of,
                                       const __grid_constant__ Sm80Parts<D> parts) {
  const ItemLine line(p, rows_of);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned row_of_all = blockIdx.x, q_heads = p.q_heads, nodes = p.nodes;
  const int q_head = static_cast<int>(row_of_all % q_heads), node = static_cast<int>(row_of_all / q_heads % nodes);
  const int request = static_cast<int>(row_of_all / q_heads / nodes);
  const int head = q_head / rows_of.group, row_tile = node / rows_of.nodes;
  const int row = (node - row_tile * rows_of.nodes) * rows_of.group + q_head - head * rows_of.group;

  int total = 0, start = kSegmentCost;  // units of all items, and before this item's first tile
#pragma unroll 1
  for (int i = lane; i < p.batch * rows_of.count; i += 32) {
    const int other = i / rows_of.count, r = i - other * rows_of.count;
    const int units = line.units(line.context(other), line.live(other), r);
    total += p.kv_heads * units;
    start += other < request ? p.kv_heads * units : other == request ? (head + (r < row_tile)) * units : 0;
  }
  total = __reduce_add_sync(~0u, total);
  start = __reduce_add_sync(~0u, start - kSegmentCost) + kSegmentCost;
  const int tiles = line.tiles(line.context(request), line.live(request), row_tile);
  int first = 0, count = 0;
  if (tiles > 0) {
    const Cut cut(parts.ctas, total);
    first = cut.cta_at(start);
    count = cut.cta_at(start + tiles - 1) - first + 1;
    if (count == 1) return;  // written by its only CTA
  }

  constexpr float kLowest = -3.0e38f;  // stands in for -inf, whose differences would be NaN
  float top = kLowest;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) top = fmaxf(top, *parts.log2_sum(parts.index(first + i, i == 0, row)));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));

  constexpr int kPerLane = D / 32;
  using Values = std::conditional_t<kPerLane == 4, float4, float2>;
  float result[kPerLane] = {}, sum = 0.0f;
#pragma unroll 4
  for (int i = warp; i < count; i += kSm80CombineWarps) {
    const std::int64_t index = parts.index(first + i, i == 0, row);
    const float weight = exp2_fast(*parts.log2_sum(index) - top);
    const Values values = reinterpret_cast<const Values*>(parts.result(index))[lane];
    sum += weight;
#pragma unroll
    for (int d = 0; d < kPerLane; ++d) result[d] = fmaf(reinterpret_cast<const float*>(&values)[d], weight, result[d]);
  }
  __shared__ float gathered[kSm80CombineWarps][D + 1];
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) gathered[warp][lane * kPerLane + d] = result[d];
  if (lane == 0) gathered[warp][D] = sum;
  __syncthreads();
  auto whole = [&](int d) { return (gathered[0][d] + gathered[1][d]) + (gathered[2][d] + gathered[3][d]); };
  const int d = threadIdx.x;
  const float denominator = whole(D);
  const bool seen = denominator != 0.0f;  // NaN is seen
  if (d < D) {
    T* out = static_cast<T*>(p.out) + request * p.out_strides.batch + node * p.out_strides.token +
             q_head * p.out_strides.head;
    out[d] = static_cast<T>(seen ? whole(d) / denominator : 0.0f);
  }
  if (p.lse != nullptr && d == 0)
    p.lse[row_of_all] = seen ? (top + log2f(denominator)) * 0.6931471805599453f : -__builtin_huge_valf();
}

}  // namespace specvlm
