// The k first tokens of a row, in the order of entry_of: per tile, then over the tiles of a row.
//
// A tile's k-th highest of 32 or 128 group maxima is a lower bound of its k-th highest logit, and few logits lie above
// it: 12 of 8,192 on average for k = 10. Those are ranked by counting. Only where more candidates than kCandidates pass
// (many equal logits, or sorted ones, which one group holds together) is the k-th highest searched for bit by bit.
#pragma once

#include "common/logits.cuh"

namespace specvlm {

constexpr int kTopKMost = 64;
constexpr int kTopKMaxParts = 160;  // 129 tiles of 8,192 cover 2^20 tokens wherever the row starts

template <int MOST>
struct TopKShared {
  static_assert(MOST == 16 || MOST == kTopKMost);
  static constexpr int kGroups = MOST == 16 ? 32 : 128;
  static constexpr int kCandidates = MOST == 16 ? 128 : 256;  // of a tile; each is ranked by a thread of its own
  static constexpr int kList = MOST == 16 ? 128 : 640;        // of a row; see gather_top_entries
  static constexpr int kLevels = MOST == 16 ? 3 : 4;
  alignas(16) float groups[kGroups];
  std::uint64_t list[kList];
  std::uint64_t heads[kLevels * kTopKMaxParts];  // of level l: the 4^l-th entries of the parts
  unsigned long long cut;
  int counts_by_warp[kLogitsWarps];
  int tokens[kCandidates];
  float threshold;
  std::uint32_t zero;
  int count;
};

// The sum of a value over the CTA, for every thread.
__device__ __forceinline__ int sum_over_cta(int mine, int (&by_warp)[kLogitsWarps]) {
  mine = __reduce_add_sync(~0u, mine);
  __syncthreads();  // the sums before have been read
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kLogitsWarps; ++w) sum += by_warp[w];
  return sum;
}

// Entries of list above `mine`, which is one of them.
__device__ __forceinline__ int rank_among(const std::uint64_t* list, int count, std::uint64_t mine) {
  int above = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) above += list[i] > mine;
  return above;
}

// Adds the tokens of a thread whose bits are set, bit v * kPerVector + e for token(v, e), to s.tokens while they fit.
template <typename T, int PER_THREAD, int MOST>
__device__ __forceinline__ void push_tokens(const LogitsTile<T, PER_THREAD>& tile, std::uint32_t bits,
                                            TopKShared<MOST>& s) {
  using Tile = LogitsTile<T, PER_THREAD>;
  static_assert(PER_THREAD <= 32);
#pragma unroll 1
  while (bits != 0) {
    const int bit = __ffs(bits) - 1, v = bit / Tile::kPerVector, e = bit % Tile::kPerVector;
    bits &= bits - 1;
    if (!tile.inside(v, e)) continue;
    const int slot = atomicAdd(&s.count, 1);
    if (slot >= TopKShared<MOST>::kCandidates) break;
    s.tokens[slot] = tile.token(v, e);
  }
}

// The slow way: exactly the min(k, tokens of the tile) first tokens into s.tokens, given a lower bound of the k-th
// highest logit.
template <typename T, int PER_THREAD, int MOST>
__device__ __forceinline__ void list_by_search(LogitsTile<T, PER_THREAD>& tile, int k, float bound,
                                               TopKShared<MOST>& s) {
  using Tile = LogitsTile<T, PER_THREAD>;
  constexpr int kUnit = LogitWord<T>::kUnit;
  auto unit_of = [](float x) { return order_key(x) >> kUnit; };
  auto value_of = [](std::uint32_t unit) {  // exact for every unit that a T has
    const std::uint32_t key = unit << kUnit;
    return key_value(key >> 31 != 0 ? key : key | ((1u << kUnit) - 1));
  };
  auto count_from = [&](float low) {
    tile.keep_packed(s.zero);
    int count = 0;
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < Tile::kPerVector; ++e) count += tile.logit(v, e) >= low;
    }
    return sum_over_cta(count, s.counts_by_warp);
  };

  float highest = s.groups[0];
#pragma unroll 1
  for (int i = 1; i < TopKShared<MOST>::kGroups; ++i) highest = fmaxf(highest, s.groups[i]);
  // at least k logits are `low` or more (or it is -inf), `above` < k are `high` or more; often `low` is the one already
  std::uint32_t low = unit_of(bound), high = unit_of(highest) + 1, middle = low + 1;
  int above = 0;
  while (high - low > 1) {
    const int count = count_from(value_of(middle));
    if (count >= k) {
      low = middle;
    } else {
      high = middle;
      above = count;
    }
    middle = low + (high - low) / 2;
  }
  const float least = value_of(low);

  tile.keep_packed(s.zero);
  std::uint32_t chosen = 0, equal = 0;
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < Tile::kPerVector; ++e) {
      const std::uint32_t bit = 1u << (v * Tile::kPerVector + e);
      if (tile.logit(v, e) > least) chosen |= bit;
      if (tile.logit(v, e) == least && tile.inside(v, e)) equal |= bit;
    }
  }
  // of the equal ones the lowest ids: vector by vector, as the ids of one vector of all threads are consecutive
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int left = k - above;
#pragma unroll 1
  for (int v = 0; v < Tile::kVectors; ++v) {
    std::uint32_t mine = equal & ((1u << Tile::kPerVector) - 1) << (v * Tile::kPerVector);
    int before = __popc(mine);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    __syncthreads();
    if (lane == 31) s.counts_by_warp[warp] = before;
    __syncthreads();
    before -= __popc(mine);
    int all = 0;
#pragma unroll 1
    for (int w = 0; w < kLogitsWarps; ++w) {
      if (w < warp) before += s.counts_by_warp[w];
      all += s.counts_by_warp[w];
    }
    for (; mine != 0 && before < left; ++before, mine &= mine - 1) chosen |= mine & -mine;
    left -= all;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  push_tokens(tile, chosen, s);
  __syncthreads();
}

// Writes the k first entries of a tile to out, and 0 where it has fewer tokens; thread_top is each thread's highest
// logit. Every thread of the CTA calls it, 1 <= k <= MOST.
template <typename T, int PER_THREAD, int MOST>
__device__ __forceinline__ void top_of_tile(LogitsTile<T, PER_THREAD>& tile, float thread_top, int k,
                                            std::uint64_t* out, TopKShared<MOST>& s) {
  using Tile = LogitsTile<T, PER_THREAD>;
  using Shared = TopKShared<MOST>;
  constexpr int kPerGroup = kLogitsThreads / Shared::kGroups;  // neighbouring threads
  float group_top = thread_top;
#pragma unroll
  for (int step = 1; step < kPerGroup; step *= 2) group_top = fmaxf(group_top, __shfl_xor_sync(~0u, group_top, step));
  if (threadIdx.x % kPerGroup == 0) s.groups[threadIdx.x / kPerGroup] = group_top;
  if (threadIdx.x == 0) s.count = s.zero = 0;
  __syncthreads();

  // each thread of a group compares it with a share of the groups
  int above = 0, reach = 0;
#pragma unroll
  for (int i = 0; i < Shared::kGroups / 4 / kPerGroup; ++i) {
    const float4 four = reinterpret_cast<const float4*>(s.groups)[i * kPerGroup + threadIdx.x % kPerGroup];
    for (const float other : {four.x, four.y, four.z, four.w}) {
      above += other > group_top;
      reach += other >= group_top;
    }
  }
  int both = above + (reach << 16);
#pragma unroll
  for (int step = 1; step < kPerGroup; step *= 2) both += __shfl_xor_sync(~0u, both, step);
  if ((both & 0xFFFF) < k && both >> 16 >= k) s.threshold = group_top;  // the k-th highest: one value, or equal ones
  __syncthreads();

  const float threshold = s.threshold;
  if (thread_top >= threshold) {
    tile.keep_packed(s.zero);
    std::uint32_t bits = 0;
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < Tile::kPerVector; ++e) {
        if (tile.logit(v, e) >= threshold) bits |= 1u << (v * Tile::kPerVector + e);
      }
    }
    push_tokens(tile, bits, s);
  }
  __syncthreads();
  if (s.count > Shared::kCandidates) list_by_search(tile, k, threshold, s);
  const int count = s.count, i = threadIdx.x;
  std::uint64_t mine = 0;
  if (i < count) s.list[i] = mine = entry_of(load_logit(tile.row + s.tokens[i]), s.tokens[i]);
  __syncthreads();
  if (i < count) {
    const int rank = rank_among(s.list, count, mine);
    if (rank < k) out[rank] = mine;
  } else if (i < k) {
    out[i] = 0;
  }
}

// Leaves in s.list the entries of a row that may be among its k first, s.count of them, unordered, the k first among
// them. entries [parts,k]: what top_of_tile wrote for every tile.
//
// For r of 1, 4, 16 and 64, the ceil(k/r)-th highest of the parts' r-th entries has k entries at or above it. Above the
// highest of these bounds, at most ceil(k/r) parts have r entries: so at most 3k + 12 ceil(k/4) + ... remain, 97 for
// k = 16 and 577 for k = 64, whatever the order of the row; kList holds them.
template <int MOST>
__device__ __forceinline__ void gather_top_entries(const std::uint64_t* entries, int parts, int k,
                                                   TopKShared<MOST>& s) {
  constexpr int kSlots = TopKShared<MOST>::kLevels * kTopKMaxParts;
#pragma unroll 1
  for (int i = threadIdx.x; i < kSlots; i += kLogitsThreads) {
    const int part = i % kTopKMaxParts, place = (1 << (2 * (i / kTopKMaxParts))) - 1;
    s.heads[i] = part < parts && place < k ? __ldcg(entries + part * k + place) : 0;
  }
  if (threadIdx.x == 0) {
    s.cut = 1;
    s.count = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kSlots; i += kLogitsThreads) {
    const int level = i / kTopKMaxParts, wanted = (k + (1 << (2 * level)) - 1) >> (2 * level);
    const unsigned long long mine = s.heads[i];
    if (mine != 0 && rank_among(s.heads + level * kTopKMaxParts, parts, mine) == wanted - 1) atomicMax(&s.cut, mine);
  }
  __syncthreads();
  const std::uint64_t cut = s.cut;
#pragma unroll 1
  for (int i = threadIdx.x; i < parts * k; i += kLogitsThreads) {
    const std::uint64_t entry = __ldcg(entries + i);
    if (entry >= cut) s.list[atomicAdd(&s.count, 1)] = entry;
  }
  __syncthreads();
}

}  // namespace specvlm
