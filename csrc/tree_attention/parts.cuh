// What the Hopper kernel leaves of an item that several CTAs share, and the kernel that puts such parts together.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "common/numeric.cuh"
#include "tree_attention/line.cuh"

namespace specvlm {

constexpr float kNothing = -3.0e38f;  // reference of a column that has seen nothing; -inf would make differences NaN

// A part as the threads of a warpgroup hold it: for every eight columns (an octet) and half of the dims one float4 a
// thread; then the columns' references (log2) and sums. A CTA leaves at most two parts: the rest of an item that others
// began, and the begin of one that others end.
template <int D>
struct Part {
  float* workspace;
  int columns;  // of a CTA
  int cta;
  bool begins;

  static constexpr int kOctet = D / 64 * 128;  // float4s
  __host__ __device__ static std::int64_t floats(int ctas, int columns) {
    return std::int64_t{2} * ctas * columns * (D + 2);
  }

  __device__ float* base() const { return workspace + floats(1, columns) * cta + (begins ? columns * (D + 2) : 0); }
  __device__ float4* octet(int index) const { return reinterpret_cast<float4*>(base()) + index * kOctet; }
  __device__ float* references() const { return base() + columns * D; }
  __device__ float* sums() const { return references() + columns; }
};

// Tells the combine kernel what becomes of every item: int4(first CTA, parts, live rows of the request and head, 0);
// parts is 0 if no row sees anything. They lie in the workspace behind the parts; a warp of every CTA writes some.
template <int D>
__device__ __forceinline__ void write_items(const TreeAttentionParams& p, const ItemLine& line, const int* prefix,
                                            int total, int columns) {
  const RowTiles& rows_of = line.rows_of;
  const Cut cut(gridDim.x, total);
  auto* items = reinterpret_cast<int4*>(p.workspace + Part<D>::floats(gridDim.x, columns));
  const int per_request = p.kv_heads * rows_of.count, count = p.batch * per_request;
#pragma unroll 1
  for (int i = blockIdx.x + threadIdx.x % 32 * gridDim.x; i < count; i += 32 * gridDim.x) {
    const int request = i / per_request, head = i % per_request / rows_of.count, row_tile = i % rows_of.count;
    const int context = line.context(request), live = line.live(request);
    const int tiles = line.tiles(context, live, row_tile);
    int4 item = make_int4(0, 0, live * rows_of.group, 0);
    if (tiles > 0) {
      int start = prefix[request] + head * line.units_per_head(context, live) + kSegmentCost;
#pragma unroll 1
      for (int r = 0; r < row_tile; ++r) start += line.units(context, live, r);
      item.x = cut.cta_at(start);
      item.y = cut.cta_at(start + tiles - 1) - item.x + 1;
    }
    items[i] = item;
  }
}

constexpr int kCombineGroups = 2, kMaxParts = 256, kLoadsInFlight = 4;

// One CTA per item and octet. Threads hold four values of the octet as the attention kernel's did: columns
// 2 * (lane % 4) and the next, dims 64 * half + 16 * warp + lane / 4 and 8 further; each group of threads takes half of
// the parts, in the order of the cache, and the halves are added in order too.
template <typename T, int D>
__global__ void __launch_bounds__(kCombineGroups* Part<D>::kOctet)
    combine_parts_kernel(const __grid_constant__ TreeAttentionParams p, const RowTiles rows_of, int columns, int ctas) {
  __shared__ __align__(16) float weights[kMaxParts][8], tops[8], totals[8];
  __shared__ float4 gathered[Part<D>::kOctet];
  __shared__ __align__(16) T result[8][D];
  const int octet = blockIdx.x, request = blockIdx.z, lane = threadIdx.x % 32;
  int head = blockIdx.y, row_tile = 0;
  if (rows_of.count > 1) head = blockIdx.y / rows_of.count, row_tile = blockIdx.y % rows_of.count;
  const int first_row = row_tile * rows_of.rows + octet * 8;
  const int rows = min(min(8, rows_of.rows - octet * 8), p.nodes * rows_of.group - first_row);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
  if (rows <= 0) return;
  const int thread = threadIdx.x % Part<D>::kOctet, my_group = threadIdx.x / Part<D>::kOctet;
  const auto* items = reinterpret_cast<const int4*>(p.workspace + Part<D>::floats(ctas, columns));
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
  const int4 item = items[blockIdx.z * gridDim.y + blockIdx.y];
  const int first = item.x, parts = item.y, live_rows = item.z;
  if (parts == 1) return;  // written by its only CTA

  // float4s (and, times four, floats) from the first CTA's place to part i: it lies in the CTA's second slot if i is 0
  const int stride = 2 * columns * (D + 2) / 4;
  const auto* base = reinterpret_cast<const float4*>(Part<D>{p.workspace, columns, first, false}.base());
  auto offset_of = [&](int i) { return i == 0 ? stride / 2 : i * stride; };
  const float* references = reinterpret_cast<const float*>(base) + columns * D + octet * 8;
  const int share = (parts + kCombineGroups - 1) / kCombineGroups, stop = min(parts, (my_group + 1) * share);
  int at = my_group * share;
  float4 loaded[kLoadsInFlight];
  auto load = [&] {
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i)
      loaded[i] = at + i < stop ? base[offset_of(at + i) + octet * Part<D>::kOctet + thread]
                                : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  load();
  if (threadIdx.x < 256) {  // a warp a column
    const int n = threadIdx.x / 32;
    float top = kNothing, sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) {
      const float reference = references[4 * offset_of(i) + n];
      weights[i][n] = reference;
      top = fmaxf(top, reference);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) {
      const float weight = exp2_fast(weights[i][n] - top);
      weights[i][n] = weight;
      sum = fmaf(references[4 * offset_of(i) + columns + n], weight, sum);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) tops[n] = top, totals[n] = sum;
  }
  __syncthreads();

  const int column = lane % 4 * 2;
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  while (true) {
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const float2 weight =
          at + i < stop ? *reinterpret_cast<const float2*>(&weights[at + i][column]) : make_float2(0.0f, 0.0f);
      value.x = fmaf(loaded[i].x, weight.x, value.x);
      value.y = fmaf(loaded[i].y, weight.y, value.y);
      value.z = fmaf(loaded[i].z, weight.x, value.z);
      value.w = fmaf(loaded[i].w, weight.y, value.w);
    }
    at += kLoadsInFlight;
    if (at >= stop) break;
    load();
  }
  if (my_group == 1) gathered[thread] = value;
  __syncthreads();
  if (my_group == 0) {
    const float4 other = gathered[thread];
    const float a = totals[column], b = totals[column + 1];
    const bool seen_a = first_row + column < live_rows && a > 0.0f;
    const bool seen_b = first_row + column + 1 < live_rows && b > 0.0f;
    const int dim = thread / 128 * 64 + thread % 128 / 32 * 16 + lane / 4;
    result[column][dim] = static_cast<T>(seen_a ? (value.x + other.x) / a : 0.0f);
    result[column + 1][dim] = static_cast<T>(seen_b ? (value.y + other.y) / b : 0.0f);
    result[column][dim + 8] = static_cast<T>(seen_a ? (value.z + other.z) / a : 0.0f);
    result[column + 1][dim + 8] = static_cast<T>(seen_b ? (value.w + other.w) / b : 0.0f);
  }
  __syncthreads();
  const int n = threadIdx.x / (D / 8), chunk = threadIdx.x % (D / 8);
  if (n >= rows) return;
  const int row = first_row + n, node = row / rows_of.group, q_head = head * rows_of.group + row % rows_of.group;
  T* out = static_cast<T*>(p.out) + request * p.out_strides.batch +
           static_cast<std::int64_t>(node) * p.out_strides.token +
           static_cast<std::int64_t>(q_head) * p.out_strides.head;
  reinterpret_cast<uint4*>(out)[chunk] = reinterpret_cast<const uint4*>(result[n])[chunk];
  if (p.lse != nullptr && chunk == 0)
    p.lse[(static_cast<std::int64_t>(request) * p.nodes + node) * p.q_heads + q_head] =
        row < live_rows && totals[n] > 0.0f ? (tops[n] + log2f(totals[n])) * 0.6931471805599453f
                                            : __int_as_float(0xff800000);
}

template <typename T, int D>
void launch_combine_parts(const TreeAttentionParams& p, const TreeAttentionPlan& plan, const RowTiles& rows_of,
                          cudaStream_t stream) {
  prepare_kernel<combine_parts_kernel<T, D>>(0);
  launch_overlapped(combine_parts_kernel<T, D>, dim3((rows_of.rows + 7) / 8, p.kv_heads * rows_of.count, p.batch),
                    dim3(kCombineGroups * Part<D>::kOctet), 0, stream, p, rows_of, plan.columns, plan.ctas);
}

}  // namespace specvlm
