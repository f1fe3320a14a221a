// What the Hopper kernel leaves of an item that several CTAs share, and the kernel that puts such parts together.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "common/numeric.cuh"
#include "common/overlap.cuh"
#include "tree_attention/sm90_producer.cuh"

namespace specvlm {

constexpr float kNothing = -3.0e38f;  // reference of a column that has seen nothing; -inf would make differences NaN

// A part as the threads of a warpgroup hold it: for every eight rows (an octet) and 64 dims four values a thread, each
// divided by its row's sum and in 16 bits, half the volume of what has to be written and read again; then the rows'
// references (log2) and sums. A CTA leaves at most two parts: the rest of an item that others began, and the begin of
// one that others end.
template <int D>
struct Part {
  float* workspace;
  int columns;  // of a CTA
  int cta;
  bool begins;

  static constexpr int kOctet = D / 64 * 128;  // uint2s
  static constexpr int kFloatsPerRow = D / 2 + 2;
  __host__ __device__ static std::int64_t floats(int ctas, int columns) {
    return std::int64_t{2} * ctas * columns * kFloatsPerRow;
  }

  __device__ float* base() const {
    return workspace + floats(1, columns) * cta + (begins ? columns * kFloatsPerRow : 0);
  }
  __device__ uint2* octet(int index) const { return reinterpret_cast<uint2*>(base()) + index * kOctet; }
  __device__ float* references() const { return base() + columns * (D / 2); }
  __device__ float* sums() const { return references() + columns; }
};

constexpr int kMaxParts = 256;

constexpr int kCombineDims = 32;  // of a CTA: two warps' share of an octet

// One CTA per item, octet and 32 dims, so that what an SM can read bounds nobody. Threads hold four values as the
// attention kernels' did. sm90.cuh: rows 2 * (lane % 4) and the next, dims 16 * warp + lane / 4 and 8 further;
// sm90_rows.cuh (ROWS): row lane / 4, dims 16 * warp + 2 * (lane % 4) and the next, and 8 further. Each of GROUPS pairs
// of warps takes its share of the parts, in the order of the cache, and the groups' sums are added in order too. Where
// the parts lie follows from the lengths, which all kernels before the attention kernel have long written: it is worked
// out while that one still runs.
template <typename T, int D, int GROUPS, bool ROWS>
__global__ void __launch_bounds__(GROUPS * 64, 16 / GROUPS)
    combine_parts_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ RowTiles rows_of,
                         int columns, int teams) {
  constexpr int kThreads = GROUPS * 64, kSlices = D / kCombineDims, kLoadsInFlight = 9;
  __shared__ float tops[8], totals[8];
  __shared__ float4 gathered[GROUPS == 1 ? 1 : GROUPS - 1][64];
  __shared__ __align__(16) T result[8][kCombineDims];
  __shared__ int3 place;  // the team that begins the item, parts, live rows
  extern __shared__ int prefix[];
  auto* references = reinterpret_cast<float (*)[8]>(prefix + line_ints(p.batch));  // of at most as many parts as teams
  auto* sums = references + teams;
  const int octet = blockIdx.x / kSlices, slice = blockIdx.x % kSlices, request = blockIdx.z, lane = threadIdx.x % 32;
  int head = blockIdx.y, row_tile = 0;
  if (rows_of.count > 1) head = blockIdx.y / rows_of.count, row_tile = blockIdx.y % rows_of.count;
  const int first_row = row_tile * rows_of.rows + octet * 8;
  const int rows = min(min(8, rows_of.rows - octet * 8), p.nodes * rows_of.group - first_row);
  let_next_launch_start();
  if (threadIdx.x < 32) {
    const TeamLine line(p, rows_of);
    const Cut cut = line.cut(teams, line.scan(prefix));
    const int live = line.live(request);
    const int tiles = line.tiles_side_by_side(line.context(request), live, row_tile / rows_of.side * rows_of.side);
    int3 at = make_int3(0, 0, live * rows_of.group);
    if (tiles > 0) {
      const int2 ends = line.ends(prefix, request, head, row_tile, tiles);
      at.x = cut.cta_at(ends.x);
      at.y = cut.cta_at(ends.y) - at.x + 1;
    }
    if (lane == 0) place = at;
  }
  __syncthreads();
  const int parts = place.y, live_rows = place.z;
  const int first = place.x * rows_of.side + row_tile % rows_of.side;  // CTA
  wait_for_launch_before();             // every CTA: whoever waits for this kernel waits for both
  if (parts == 1 || rows <= 0) return;  // written by its only CTA

  const int thread = threadIdx.x % 64, group = threadIdx.x / 64;
  // uint2s (and, times two, floats) from the first CTA's place to part i: it lies in the CTA's second slot if i is 0
  const int stride = columns * Part<D>::kFloatsPerRow;
  const auto* base = reinterpret_cast<const uint2*>(Part<D>{p.workspace, columns, first, false}.base());
  auto offset_of = [&](int i) { return i == 0 ? stride / 2 : i * stride * rows_of.side; };
  const int share = (parts + GROUPS - 1) / GROUPS, stop = min(parts, (group + 1) * share);
  int at = group * share;
  uint2 loaded[kLoadsInFlight];
  auto load = [&] {
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i)
      loaded[i] =
          at + i < stop ? base[offset_of(at + i) + octet * Part<D>::kOctet + slice * 64 + thread] : make_uint2(0, 0);
  };
  load();
  // eight rows of a part lie side by side; all loads are under way before the first is waited for
  constexpr int kWeightsInFlight = GROUPS <= 2 ? 3 : 1;
  const int row_here = threadIdx.x % 8;
#pragma unroll 1
  for (int begin = threadIdx.x / 8; begin < parts; begin += kWeightsInFlight * (kThreads / 8)) {
    float reference[kWeightsInFlight], sum[kWeightsInFlight];
#pragma unroll
    for (int j = 0; j < kWeightsInFlight; ++j) {
      const int i = begin + j * (kThreads / 8);
      if (i < parts) {
        const float* of_part =
            reinterpret_cast<const float*>(base + offset_of(i)) + columns * (D / 2) + octet * 8 + row_here;
        reference[j] = of_part[0];
        sum[j] = of_part[columns];
      }
    }
#pragma unroll
    for (int j = 0; j < kWeightsInFlight; ++j) {
      const int i = begin + j * (kThreads / 8);
      if (i < parts) references[i][row_here] = reference[j], sums[i][row_here] = sum[j];
    }
  }
  __syncthreads();
  constexpr int kSharers = kThreads < 256 ? kThreads / 8 : 32;  // threads of a row
  if (threadIdx.x < kSharers * 8) {
    const int n = threadIdx.x / kSharers, sharer = threadIdx.x % kSharers;
    float top = kNothing, sum = 0.0f;
#pragma unroll 1
    for (int i = sharer; i < parts; i += kSharers) top = fmaxf(top, references[i][n]);
#pragma unroll
    for (int step = kSharers / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll 1
    for (int i = sharer; i < parts; i += kSharers) {
      const float weight = sums[i][n] * exp2_fast(references[i][n] - top);
      references[i][n] = weight;
      sum += weight;
    }
#pragma unroll
    for (int step = kSharers / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (sharer == 0) tops[n] = top, totals[n] = sum;
  }
  __syncthreads();

  const auto& weights = references;
  const int row_a = ROWS ? lane / 4 : lane % 4 * 2, row_b = ROWS ? row_a : row_a + 1;  // of x, z and of y, w
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  while (true) {
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const float a = at + i < stop ? weights[at + i][row_a] : 0.0f;
      const float b = at + i < stop ? weights[at + i][row_b] : 0.0f;
      const float2 low = unpack<T>(loaded[i].x), high = unpack<T>(loaded[i].y);
      value.x = fmaf(low.x, a, value.x);
      value.y = fmaf(low.y, b, value.y);
      value.z = fmaf(high.x, a, value.z);
      value.w = fmaf(high.y, b, value.w);
    }
    at += kLoadsInFlight;
    if (at >= stop) break;
    load();
  }
  if (group > 0) gathered[group - 1][thread] = value;
  __syncthreads();
  if (group > 0) return;
#pragma unroll
  for (int g = 0; g + 1 < GROUPS; ++g) {
    const float4 other = gathered[g][thread];
    value.x += other.x, value.y += other.y, value.z += other.z, value.w += other.w;
  }
  const bool seen_a = first_row + row_a < live_rows && totals[row_a] != 0.0f;
  const bool seen_b = first_row + row_b < live_rows && totals[row_b] != 0.0f;
  const float a = 1.0f / totals[row_a], b = 1.0f / totals[row_b];
  const int dim_a = thread / 32 * 16 + (ROWS ? lane % 4 * 2 : lane / 4), dim_b = ROWS ? dim_a + 1 : dim_a;
  result[row_a][dim_a] = static_cast<T>(seen_a ? value.x * a : 0.0f);
  result[row_b][dim_b] = static_cast<T>(seen_b ? value.y * b : 0.0f);
  result[row_a][dim_a + 8] = static_cast<T>(seen_a ? value.z * a : 0.0f);
  result[row_b][dim_b + 8] = static_cast<T>(seen_b ? value.w * b : 0.0f);
  named_barrier(1, 64);
  constexpr int kChunks = kCombineDims / 8;
  const int n = thread / kChunks, chunk = thread % kChunks;
  if (n >= rows) return;
  const int row = first_row + n, node = row / rows_of.group, q_head = head * rows_of.group + row % rows_of.group;
  T* out = static_cast<T*>(p.out) + request * p.out_strides.batch +
           static_cast<std::int64_t>(node) * p.out_strides.token +
           static_cast<std::int64_t>(q_head) * p.out_strides.head;
  reinterpret_cast<uint4*>(out)[slice * kChunks + chunk] = reinterpret_cast<const uint4*>(result[n])[chunk];
  if (p.lse != nullptr && chunk == 0 && slice == 0)
    p.lse[(static_cast<std::int64_t>(request) * p.nodes + node) * p.q_heads + q_head] =
        row < live_rows && totals[n] != 0.0f ? (tops[n] + log2f(totals[n])) * 0.6931471805599453f
                                             : __int_as_float(0xff800000);
}

template <typename T, int D, int GROUPS, bool ROWS>
void launch_combine_groups(const TreeAttentionParams& p, const TreeAttentionPlan& plan, const RowTiles& rows_of,
                           dim3 grid, cudaStream_t stream) {
  const int teams = plan.ctas / plan.side, shared = (line_ints(p.batch) + teams * 16) * 4;
  prepare_kernel<combine_parts_kernel<T, D, GROUPS, ROWS>>(shared);
  launch_overlapped(combine_parts_kernel<T, D, GROUPS, ROWS>, grid, dim3(GROUPS * 64), shared, stream, p, rows_of,
                    plan.columns, teams);
}

template <typename T, int D, bool ROWS>
void launch_combine_parts(const TreeAttentionParams& p, const TreeAttentionPlan& plan, const RowTiles& rows_of,
                          cudaStream_t stream) {
  const dim3 grid((rows_of.rows + 7) / 8 * (D / kCombineDims), p.kv_heads * rows_of.count, p.batch);
  const std::int64_t ctas = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
  if (ctas <= 2 * plan.ctas)  // the fewer CTAs, the more loads in flight in each
    launch_combine_groups<T, D, 8, ROWS>(p, plan, rows_of, grid, stream);
  else if (ctas <= 4 * plan.ctas)
    launch_combine_groups<T, D, 4, ROWS>(p, plan, rows_of, grid, stream);
  else if (ctas <= 8 * plan.ctas)
    launch_combine_groups<T, D, 2, ROWS>(p, plan, rows_of, grid, stream);
  else
    launch_combine_groups<T, D, 1, ROWS>(p, plan, rows_of, grid, stream);
}

}  // namespace specvlm
