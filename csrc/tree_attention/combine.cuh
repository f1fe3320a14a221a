// Puts the parts of rows together that several CTAs worked on.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/numeric.cuh"
#include "tree_attention/schedule.cuh"

namespace specvlm {

constexpr int kCombineWarps = 4, kCombineBatch = 8;

// One CTA per output row: puts the parts of a split row together. A warp takes a quarter of the parts, in the order of
// the cache, and has several of their loads in flight; the quarters are added in order too.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kCombineWarps)
    tree_attention_combine_kernel(const __grid_constant__ TreeAttentionParams p, int row_tile, int row_tiles,
                                  int grid_ctas) {
  const TileLine line{p, row_tile, row_tiles};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row = blockIdx.x;
  const int q_head = static_cast<int>(row % p.q_heads), node = static_cast<int>(row / p.q_heads % p.nodes);
  const int request = static_cast<int>(row / p.q_heads / p.nodes);
  const int group = p.q_heads / p.kv_heads, head = q_head / group, packed = node * group + q_head % group;
  const int my_row_tile = packed / row_tile, in_tile = packed % row_tile;

  int before = 0, total = 0;
  for (int b = lane; b < p.batch; b += 32) {
    const int tiles = p.kv_heads * line.tiles_per_head(b);
    total += tiles;
    if (b < request) before += tiles;
  }
  before = __reduce_add_sync(~0u, before);
  total = __reduce_add_sync(~0u, total);
  const int ctas = working_ctas(grid_ctas, total);
  int start = before + head * line.tiles_per_head(request);
  for (int r = 0; r < my_row_tile; ++r) start += line.tiles(request, r);
  const int tiles = line.tiles(request, my_row_tile);
  int first = 0, parts = 0;
  if (tiles > 0) {
    first = cta_of_tile(start, ctas, total);
    parts = cta_of_tile(start + tiles - 1, ctas, total) - first + 1;
    if (parts == 1) return;  // written by its only CTA
  }
  const int first_slot = tiles > 0 && start != first_tile_of(first, ctas, total) ? 1 : 0;
  auto slot_of = [&](int part) { return 2 * (first + part) + (part == 0 ? first_slot : 0); };
  constexpr int kPerLane = D / 32;
  constexpr float kLowest = -3.0e38f;  // stands in for -inf, whose differences would be NaN
  const float* part_lse = p.workspace + static_cast<std::int64_t>(2 * grid_ctas) * row_tile * D + in_tile;
  const float* part_out = p.workspace + static_cast<std::int64_t>(in_tile) * D + lane * kPerLane;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif

  float top = kLowest;
  for (int part = lane; part < parts; part += 32) top = fmaxf(top, part_lse[slot_of(part) * row_tile]);
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));

  float result[kPerLane] = {}, weights = 0.0f;
  const int quarter = (parts + kCombineWarps - 1) / kCombineWarps, stop = min(parts, (warp + 1) * quarter);
  for (int at = warp * quarter; at < stop; at += kCombineBatch) {
    float weight[kCombineBatch], values[kCombineBatch][kPerLane];
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      weight[i] = 0.0f;
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) values[i][d] = 0.0f;
      if (at + i < stop) {
        const std::int64_t slot = slot_of(at + i);
        weight[i] = part_lse[slot * row_tile];
#pragma unroll
        for (int d = 0; d < kPerLane; ++d) values[i][d] = part_out[slot * row_tile * D + d];
      }
    }
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      const float share = at + i < stop ? exp2_fast(weight[i] - top) : 0.0f;
      weights += share;
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) result[d] = fmaf(values[i][d], share, result[d]);
    }
  }
  __shared__ float gathered[kCombineWarps][D + 1];
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) gathered[warp][lane * kPerLane + d] = result[d];
  if (lane == 0) gathered[warp][D] = weights;
  __syncthreads();
  const float all = (gathered[0][D] + gathered[1][D]) + (gathered[2][D] + gathered[3][D]);
  const bool seen = top > kLowest;
  T* out = static_cast<T*>(p.out) + request * p.out_strides.batch +
           static_cast<std::int64_t>(node) * p.out_strides.token +
           static_cast<std::int64_t>(q_head) * p.out_strides.head;
  const int d = threadIdx.x;
  if (d < D) {
    const float sum = (gathered[0][d] + gathered[1][d]) + (gathered[2][d] + gathered[3][d]);
    out[d] = static_cast<T>(seen ? sum / all : 0.0f);
  }
  if (p.lse != nullptr && d == 0)
    p.lse[row] = seen ? (top + log2f(all)) * 0.6931471805599453f : __int_as_float(0xff800000);
}

// early: the kernel before it was built for sm_90 and lets its dependents start while it drains (griddepcontrol).
template <typename T, int D>
void launch_tree_attention_combine(const TreeAttentionParams& p, const TreeAttentionPlan& plan, bool early,
                                   cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch) * p.nodes * p.q_heads);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = early ? 1 : 0;
  check_cuda(
      cudaLaunchKernelEx(&config, tree_attention_combine_kernel<T, D>, p, plan.row_tile, plan.row_tiles, plan.ctas),
      "tree_attention combine launch");
}

}  // namespace specvlm
