// One CTA makes the tree of one request: scores level by level, then the best of all candidates.
#pragma once

#include <cstdint>

#include "common/logits.cuh"
#include "specvlm/expand_tree.h"

namespace specvlm {

constexpr int kExpandThreads = 512;
constexpr int kExpandDirect = 128;  // so few entries are ranked at once; of more, those that cannot be kept go first
constexpr int kExpandNumberBits = 13;
static_assert(kExpandMaxCandidates == 1 << kExpandNumberBits && kExpandMaxNodes <= 1 << 9);

// Candidates as integers: the lower depth first, then the higher key, then the lower number; no two are equal.
__device__ __forceinline__ std::uint64_t expand_entry(int level, std::uint32_t key, int number) {
  return static_cast<std::uint64_t>(kExpandMaxNodes - level) << (32 + kExpandNumberBits) |
         static_cast<std::uint64_t>(key) << kExpandNumberBits | (kExpandMaxCandidates - 1 - number);
}
__device__ __forceinline__ int expand_number(std::uint64_t entry) {
  return kExpandMaxCandidates - 1 - static_cast<int>(entry & (kExpandMaxCandidates - 1));
}

struct ExpandShared {
  std::uint32_t keys[kExpandMaxCandidates];  // log-probability, then order_key of the score, then the node
  std::uint64_t list[kExpandMaxNodes];       // entries to be ranked
  std::uint16_t row_candidates[kExpandMaxNodes];
  std::uint16_t candidates[kExpandMaxNodes];  // of nodes
  std::int16_t parents[kExpandMaxNodes];
  std::int16_t row_nodes[kExpandMaxNodes];
  std::int16_t node_rows[kExpandMaxNodes];
  int count;
};

// How many of the candidates first .. first+count-1 satisfy a condition, for every thread.
template <typename Condition>
__device__ __forceinline__ int expand_count(int first, int count, Condition condition) {
  int sum = 0;
#pragma unroll 1
  for (int start = 0; start < count; start += kExpandThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    sum += __syncthreads_count(i < count && condition(first + i));
  }
  return sum;
}

// The largest bound below 2^BITS that at least `wanted` candidates reach, found bit by bit, or a smaller one that
// exactly `wanted` reach. reaches(c, bound) says whether candidate c does; of bound 0 all are expected to.
template <int BITS, typename Reaches>
__device__ __forceinline__ std::uint32_t expand_bound(int first, int count, int wanted, int& reached, Reaches reaches) {
  std::uint32_t bound = 0;
  reached = count;
#pragma unroll 1
  for (int bit = BITS - 1; bit >= 0 && reached != wanted; --bit) {
    const std::uint32_t higher = bound | 1u << bit;
    const int some = expand_count(first, count, [&](int c) { return reaches(c, higher); });
    if (some >= wanted) {
      bound = higher;
      reached = some;
    }
  }
  return bound;
}

// Leaves in s.list the entries of the `wanted` best of some candidates, whatever their depth, or of all if there are at
// most `direct`; returns how many. s.keys must have been written before a barrier, and there is one at the end.
__device__ __forceinline__ int expand_gather(int first, int count, int wanted, int direct, int width, ExpandShared& s) {
  std::uint32_t key_bound = 0, number_bound = 0;
  if (threadIdx.x == 0) s.count = 0;
  if (count > direct) {
    int reached;
    key_bound =
        expand_bound<32>(first, count, wanted, reached, [&](int c, std::uint32_t bound) { return s.keys[c] >= bound; });
    if (reached > wanted) {  // several have the last key that is kept: those with the lowest numbers stay
      number_bound = expand_bound<kExpandNumberBits>(first, count, wanted, reached, [&](int c, std::uint32_t bound) {
        return s.keys[c] > key_bound || (s.keys[c] == key_bound && kExpandMaxCandidates - 1 - c >= bound);
      });
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int c = first + threadIdx.x; c < first + count; c += kExpandThreads) {
    const std::uint32_t key = s.keys[c];
    if (key > key_bound || (key == key_bound && kExpandMaxCandidates - 1 - c >= number_bound)) {
      s.list[atomicAdd(&s.count, 1)] = expand_entry((c / width + width - 1) / width, key, c);
    }
  }
  __syncthreads();
  return s.count;
}

// Calls place(rank, candidate) once for every entry of s.list[0..count) that fewer than `wanted` are above.
template <typename Place>
__device__ __forceinline__ void expand_rank(int count, int wanted, const ExpandShared& s, Place place) {
  constexpr int kLanes = 4;  // share the comparisons of one entry
#pragma unroll 1
  for (int start = 0; start < count; start += kExpandThreads / kLanes) {
    const int i = start + static_cast<int>(threadIdx.x) / kLanes;
    const std::uint64_t mine = i < count ? s.list[i] : 0;
    int above = 0;
#pragma unroll 4
    for (int j = threadIdx.x % kLanes; j < count; j += kLanes) above += s.list[j] > mine;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) above += __shfl_xor_sync(~0u, above, step);
    if (i < count && above < wanted && threadIdx.x % kLanes == 0) place(above, expand_number(mine));
  }
}

__global__ void __launch_bounds__(kExpandThreads) expand_tree_kernel(const __grid_constant__ ExpandTreeParams p) {
  __shared__ ExpandShared s;
  const std::int64_t request = blockIdx.x;
  const int rows = p.rows, width = p.width, nodes = p.nodes;
  const float* log_probs = p.log_probs + request * p.log_probs_stride;
  const std::int64_t* token_ids = p.token_ids + request * p.token_ids_stride;

#pragma unroll 1
  for (int c = threadIdx.x; c < rows * width; c += kExpandThreads) {
    const float gain = __ldg(log_probs + c / width * p.log_probs_row + c % width);
    const float lowest = __uint_as_float(0xFF800000);
    s.keys[c] = __float_as_uint(fminf(fmaxf(gain, lowest), 0.0f));  // fmaxf takes the other one of NaN
  }
  __syncthreads();

  // level by level: the scores of a level's candidates, then which of them are the next rows
#pragma unroll 1
  for (int start = 0; start < rows; start = start == 0 ? 1 : start + width) {
    const int stop = start == 0 ? 1 : start + width, first = start * width, count = (stop - start) * width;
#pragma unroll 1
    for (int c = first + threadIdx.x; c < first + count; c += kExpandThreads) {
      const float above = c < width ? 0.0f : key_value(s.keys[s.row_candidates[c / width]]);
      s.keys[c] = order_key(above + __uint_as_float(s.keys[c]));
    }
    __syncthreads();
    if (stop == rows && !p.all_rows) break;
    const int some = expand_gather(first, count, width, kExpandDirect, width, s);
    expand_rank(some, width, s, [&](int rank, int c) { s.row_candidates[stop + rank] = c; });
    __syncthreads();
  }

  // which candidate, row and parent every node is
  if (p.all_rows) {
#pragma unroll 1
    for (int i = 1 + threadIdx.x; i < nodes; i += kExpandThreads) {
      s.candidates[i] = s.row_candidates[i];
      s.row_nodes[i] = i;
      s.node_rows[i] = i < rows ? i : -1;
    }
  } else {
    const int some = nodes > 1 ? expand_gather(0, rows * width, nodes - 1, 0, width, s) : 0;
    // the keys have served: those of the rows' candidates take the nodes
#pragma unroll 1
    for (int i = 1 + threadIdx.x; i < max(rows, nodes); i += kExpandThreads) {
      if (i < rows) s.keys[s.row_candidates[i]] = 0;
      if (i < nodes) s.node_rows[i] = -1;
    }
    __syncthreads();
    expand_rank(some, nodes - 1, s, [&](int rank, int c) {
      s.candidates[1 + rank] = c;
      s.keys[c] = 1 + rank;
    });
    __syncthreads();
#pragma unroll 1
    for (int i = 1 + threadIdx.x; i < rows; i += kExpandThreads) {
      const int node = s.keys[s.row_candidates[i]];
      s.row_nodes[i] = node;
      if (node > 0) s.node_rows[node] = i;
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int i = threadIdx.x; i < nodes; i += kExpandThreads) {
    const std::int64_t out = request * nodes + i;
    if (i == 0) {
      s.parents[0] = 0;
      p.tokens[out] = p.root[request];
      p.parents[out] = -1;
      p.depths[out] = p.node_rows[out] = 0;
      continue;
    }
    const int c = s.candidates[i], row = c / width;
    const int parent = row == 0 ? 0 : s.row_nodes[row];  // kept, as it is better than its child, and on a lower level
    s.parents[i] = parent;
    p.tokens[out] = __ldg(token_ids + row * p.token_ids_row + c % width);
    p.parents[out] = parent;
    p.depths[out] = (row + width - 1) / width + 1;
    p.node_rows[out] = s.node_rows[i];
  }
  __syncthreads();

  const int words = (nodes + 63) / 64;
#pragma unroll 1
  for (int i = threadIdx.x; i < nodes * words; i += kExpandThreads) {
    const int word = i % words;
    std::uint64_t bits = word == 0;
#pragma unroll 1
    for (int node = i / words; node > 0; node = s.parents[node]) {
      if (node / 64 == word) bits |= std::uint64_t{1} << (node % 64);
    }
    p.mask[request * nodes * words + i] = static_cast<std::int64_t>(bits);
  }
}

}  // namespace specvlm
