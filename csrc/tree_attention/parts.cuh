// Items that several CTAs share: what each leaves in the workspace, and how they put it together at the end of the same
// kernel. All CTAs are resident at once (a cooperative launch), so they can wait for each other.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
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

constexpr int kMaxParts = 256, kLoadsInFlight = 8;

// An item that this CTA and others have parts of.
struct Share {
  int parts;       // CTAs that have one; 0: no such item
  int first;       // of them
  int first_unit;  // of the item's first tile
  int request, head, row_tile, live;
};

// The items at the two ends of a CTA's stretch of the line, by the first two lanes of a warp.
__device__ __forceinline__ void find_shares(const ItemLine& line, const int* prefix, const Cut& cut,
                                            volatile Share* shares) {
  volatile Share* share = shares + threadIdx.x % 32;
  if (threadIdx.x % 32 < 2) {
    share->parts = 0;
    share->first_unit = -1;
    const int start = cut.start(blockIdx.x), limit = cut.start(blockIdx.x + 1);
    if (start < limit) {
      const ItemRun s = line.run(prefix, threadIdx.x % 32 == 0 ? start : limit - 1, cut.total);
      share->request = s.request;
      share->head = s.head;
      share->row_tile = s.row_tile;
      share->live = s.live;
      share->first_unit = s.first_unit;
      const int first = cut.cta_at(s.first_unit), parts = cut.cta_at(s.first_unit + s.item_tiles - 1) - first + 1;
      share->first = first;
      if (parts > 1 && static_cast<unsigned>(blockIdx.x - first) < static_cast<unsigned>(parts)) share->parts = parts;
    }
  }
  __syncwarp();
  if (threadIdx.x % 32 == 1 && shares[0].first_unit == share->first_unit) share->parts = 0;  // one item, not two
  __syncwarp();
}

// An item's counters.
__device__ __forceinline__ std::uint32_t* counters_of(const TreeAttentionParams& p, const RowTiles& rows_of,
                                                      int request, int head, int row_tile) {
  return p.counters + 2 * ((request * p.kv_heads + head) * rows_of.count + row_tile);
}

// Rows that see nothing at all, such as those of a request without context or nodes.
template <typename T, int D>
__device__ __forceinline__ void write_empty_items(const ItemLine& line) {
  const TreeAttentionParams& p = line.p;
  const RowTiles& rows_of = line.rows_of;
  int item = blockIdx.x;
#pragma unroll 1
  for (; item < p.batch * p.kv_heads * rows_of.count; item += gridDim.x) {
    const int request = item / (rows_of.count * p.kv_heads);
    if (line.tiles(line.context(request), line.live(request), item % rows_of.count) != 0) continue;
    const int first_head = item / rows_of.count % p.kv_heads * rows_of.group;
    const int stop = min((item % rows_of.count + 1) * rows_of.nodes, p.nodes) * rows_of.group;
#pragma unroll 1
    for (int row = item % rows_of.count * rows_of.rows; row < stop; ++row) {
      const int node = row / rows_of.group, q_head = first_head + row % rows_of.group;
      T* out = static_cast<T*>(p.out) + request * p.out_strides.batch + node * p.out_strides.token +
               q_head * p.out_strides.head;
      if (threadIdx.x % 32 < D / 8) reinterpret_cast<uint4*>(out)[threadIdx.x % 32] = make_uint4(0, 0, 0, 0);
      if (threadIdx.x % 32 == 0 && p.lse != nullptr)
        p.lse[(static_cast<std::int64_t>(request) * p.nodes + node) * p.q_heads + q_head] = __int_as_float(0xff800000);
    }
  }
}

// Says that a warpgroup's part of an item is in the workspace.
__device__ __forceinline__ void announce_part(std::uint32_t* arrived, int barrier) {
  __threadfence();
  named_barrier(barrier, 128);
  if (threadIdx.x % 128 == 0) atomicAdd(arrived, 1);
}

constexpr int kCombineBytes = kMaxParts * 8 * 4 + 8 * 64 * 2;  // shared memory of a warpgroup: weights, rows

// A warpgroup's share of putting an item together: every so many octets and halves of the dims, all parts of them in
// the order of the cache. counters: [item][2], all 0 before and after: warpgroups that have arrived, and that are done.
template <typename T, int D>
__device__ __forceinline__ void combine_share(const TreeAttentionParams& p, const RowTiles& rows_of, int columns,
                                              volatile Share* share, int group_of_warps, char* scratch, int barrier) {
  constexpr int kHalves = D / 64;
  const int parts = share->parts, first = share->first;
  std::uint32_t* counters = counters_of(p, rows_of, share->request, share->head, share->row_tile);
  const std::uint32_t everybody = 2 * parts;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  auto* weights = reinterpret_cast<float (*)[8]>(scratch);
  auto* staged = reinterpret_cast<T*>(scratch + kMaxParts * 8 * 4);
  if (thread == 0) {
    std::uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counters) : "memory");
    } while (arrived < everybody);
  }
  named_barrier(barrier, 128);

  const int octets = (rows_of.rows + 7) / 8, all_rows = p.nodes * rows_of.group;
  const int live_rows = share->live * rows_of.group;
  auto part_of = [&](int i) { return Part<D>{p.workspace, columns, first + i, i == 0}; };
#pragma unroll 1
  for (int unit = 2 * (static_cast<int>(blockIdx.x) - first) + group_of_warps; unit < octets * kHalves;
       unit += 2 * parts) {
    const int octet = unit / kHalves, half = unit % kHalves;
    float4 loaded[kLoadsInFlight];
    auto load = [&](int at) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i)
        loaded[i] = at + i < parts ? __ldcg(part_of(at + i).octet(octet) + half * 128 + thread)
                                   : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    };
    load(0);
    // half a warp a column: its largest reference, its sum, and how much each part counts
    const int n = 2 * warp + lane / 16;
    float top = kNothing, sum = 0.0f;
#pragma unroll 1
    for (int i = lane % 16; i < parts; i += 16) {
      const float reference = __ldcg(part_of(i).references() + octet * 8 + n);
      weights[i][n] = reference;
      top = fmaxf(top, reference);
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll 1
    for (int i = lane % 16; i < parts; i += 16) {
      const float weight = exp2_fast(weights[i][n] - top);
      sum = fmaf(__ldcg(part_of(i).sums() + octet * 8 + n), weight, sum);
      weights[i][n] = weight;
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int row = share->row_tile * rows_of.rows + octet * 8 + n;
    const bool seen = row < live_rows && sum > 0.0f;
    const int node = row / rows_of.group, q_head = share->head * rows_of.group + row % rows_of.group;
    const bool real = octet * 8 + n < rows_of.rows && row < all_rows;
    if (p.lse != nullptr && half == 0 && lane % 16 == 0 && real)
      p.lse[(static_cast<std::int64_t>(share->request) * p.nodes + node) * p.q_heads + q_head] =
          seen ? (top + log2f(sum)) * 0.6931471805599453f : __int_as_float(0xff800000);
    const float inverse = seen ? 1.0f / sum : 0.0f;
#pragma unroll 1
    for (int i = lane % 16; i < parts; i += 16) weights[i][n] = seen ? weights[i][n] * inverse : 0.0f;
    named_barrier(barrier, 128);

    const int column = lane % 4 * 2, dim = warp * 16 + lane / 4;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    int at = 0;
    while (true) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        if (at + i < parts) {
          const float2 weight = *reinterpret_cast<const float2*>(&weights[at + i][column]);
          value.x = fmaf(loaded[i].x, weight.x, value.x);
          value.y = fmaf(loaded[i].y, weight.y, value.y);
          value.z = fmaf(loaded[i].z, weight.x, value.z);
          value.w = fmaf(loaded[i].w, weight.y, value.w);
        }
      }
      at += kLoadsInFlight;
      if (at >= parts) break;
      load(at);
    }
    staged[column * 64 + dim] = static_cast<T>(value.x);
    staged[column * 64 + 64 + dim] = static_cast<T>(value.y);
    staged[column * 64 + dim + 8] = static_cast<T>(value.z);
    staged[column * 64 + 64 + dim + 8] = static_cast<T>(value.w);
    named_barrier(barrier, 128);
    if (lane % 16 < 8 && real) {  // eight threads a row, 16 bytes each
      T* out = static_cast<T*>(p.out) + share->request * p.out_strides.batch +
               static_cast<std::int64_t>(node) * p.out_strides.token +
               static_cast<std::int64_t>(q_head) * p.out_strides.head;
      reinterpret_cast<uint4*>(out)[half * 8 + lane % 16] = reinterpret_cast<const uint4*>(staged)[n * 8 + lane % 16];
    }
    named_barrier(barrier, 128);  // `weights` and `staged` are free for the next unit
  }
  if (thread == 0 && atomicInc(counters + 1, everybody - 1) == everybody - 1) atomicExch(counters, 0u);
}

}  // namespace specvlm
