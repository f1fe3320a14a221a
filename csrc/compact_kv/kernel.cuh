// One CTA moves 16-byte columns of one layer's K or V for one request.
#pragma once

#include <cstdint>

#include "specvlm/compact_kv.h"

namespace specvlm {

constexpr int kCompactKvThreads = 128;
constexpr int kCompactKvRows = 8;  // rows in flight per thread: paths of static trees are rarely longer

struct CompactKvRow {
  std::int64_t source, target;  // byte offsets in the cache
  bool moves;
};

__device__ __forceinline__ std::int64_t compact_kv_offset(const CompactKvParams& p, const CompactKvStrides& strides,
                                                          int request, int position) {
  if (p.page_table == nullptr) {
    return request * strides.outer + position * strides.token;
  }
  const int page = p.page_table[request * p.page_table_stride + (position >> p.page_shift)];
  const int inside = position & ((1 << p.page_shift) - 1);
  return min(max(page, 0), p.pages - 1) * strides.outer + inside * strides.token;
}

__global__ void __launch_bounds__(kCompactKvThreads) compact_kv_kernel(const __grid_constant__ CompactKvParams p) {
  const int request = blockIdx.z;
  const bool values = static_cast<int>(blockIdx.y) >= p.layers;
  const CompactKvStrides& strides = values ? p.v_strides : p.k_strides;
  char* cache = reinterpret_cast<char*>(p.caches[blockIdx.y]);

  const int column = blockIdx.x * kCompactKvThreads + threadIdx.x;
  const std::int64_t column_offset = (column / p.head_vectors) * strides.head + (column % p.head_vectors) * 16;
  const bool live = column < p.heads * p.head_vectors;

  const int context = min(max(p.kv_lens[request], 0), p.capacity);
  const int accepted = min(max(p.length[request], 0), p.nodes - 1);
  const std::int32_t* path = p.path + request * p.path_stride;

  // path[i] > i, so no write lands on a row that a later chunk still reads; inside a chunk all loads come first
  for (int first = 0; first < accepted; first += kCompactKvRows) {
    CompactKvRow rows[kCompactKvRows];
    uint4 data[kCompactKvRows];
#pragma unroll
    for (int r = 0; r < kCompactKvRows; ++r) {
      const int i = first + r;
      const int node = i < accepted ? path[i] : 0;
      rows[r].moves = live && node > i + 1 && node < p.nodes && node < p.capacity - context;
      if (rows[r].moves) {
        rows[r].source = compact_kv_offset(p, strides, request, context + node) + column_offset;
        rows[r].target = compact_kv_offset(p, strides, request, context + 1 + i) + column_offset;
      }
    }
#pragma unroll
    for (int r = 0; r < kCompactKvRows; ++r) {
      if (rows[r].moves) data[r] = *reinterpret_cast<const uint4*>(cache + rows[r].source);
    }
#pragma unroll
    for (int r = 0; r < kCompactKvRows; ++r) {
      if (rows[r].moves) *reinterpret_cast<uint4*>(cache + rows[r].target) = data[r];
    }
  }

  // kv_lens is read by every CTA, so only the last one to arrive may write it
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned arrivals = gridDim.x * gridDim.y * gridDim.z;
    last = atomicInc(p.arrivals, arrivals - 1) == arrivals - 1;  // wraps to 0: ready for the next launch
  }
  __syncthreads();
  if (last) {
    for (int b = threadIdx.x; b < p.batch; b += kCompactKvThreads) {
      const std::int64_t before = min(max(p.kv_lens[b], 0), p.capacity);
      const int moved = min(max(p.length[b], 0), p.nodes - 1);
      p.kv_lens[b] = static_cast<int>(min(before + moved + 1, static_cast<std::int64_t>(p.capacity)));
    }
  }
}

}  // namespace specvlm
