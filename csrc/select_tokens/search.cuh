// Stage I: where a row in descending order reaches the share of the mass, or `keep`.
//
// A radix descent. Each level counts the keys of a window in 2048 bins of equal width, highest first, and sums the bits
// in which the keys of a bin differ: as they have the others in common, that gives the exact mass of every bin. The bin
// in which the goal is reached is the next window. The first level has 128 bins an octave, from the highest score down
// for 16 octaves, so that later ones have few keys: most rows end at the second level, in a bin with one key. What lies
// below those 16 octaves has two bins of its own, and takes up to three more levels if it is needed.
#pragma once

#include "select_tokens/team.cuh"
#include "select_tokens/tile.cuh"
#include "select_tokens/weight.cuh"

namespace specvlm {

constexpr int kFirstShift = 16;  // a bin of the first level holds 2^16 keys
constexpr int kRestShift = 20;   // one of the level below that, if needed
constexpr int kBinBits = 11;
constexpr std::uint32_t kRegularBins = kSelectBins - 2;  // of the first level; then the rest from 0 up, the negative
constexpr int kBinsPerThread = kSelectBins / kSelectThreads;
static_assert(kSelectBins == 1 << kBinBits && kBinsPerThread == 4);

// Sums of low bits pass 32 bits in wide tiles only: their carries are counted above the keys.
constexpr std::uint32_t kCarry = 1u << 20;

constexpr int kFewKeys = 1024;  // their low bits, 20 at most, sum in 32

// A key is above the cut if its bits from `shift` on are more than `prefix`, equal if they are the same.
struct SelectCut {
  std::uint32_t prefix = ~0u;  // no key is above or equal
  int shift = 0;
  int above = 0;  // keys above
  int ties = 0;   // equal keys that are chosen, in the order of the tokens
};

struct SelectShared {
  SelectPosts posts;
  alignas(16) std::uint32_t counts[kSelectBins];  // keys, and kCarry for each carry of low_bits
  alignas(16) std::uint32_t low_bits[kSelectBins];
  unsigned long long rest_mass;  // of the scores from 0 up that the first level leaves out
  std::uint64_t mass_by_warp[kSelectWarps];
  int count_by_warp[kSelectWarps];
  std::uint32_t highest_by_warp[kSelectWarps];
  int above_by_warp[kSelectWarps], equal_by_warp[kSelectWarps], live_by_warp[kSelectWarps];
  struct {
    std::uint32_t bin;
    int count, above;
    std::uint64_t above_mass;
  } found;
};

// The keys low..high, in bins of 2^shift.
struct SelectWindow {
  std::uint32_t low, high;
  int shift;
};

struct BinSums {
  int counts[kBinsPerThread];
  std::uint64_t low_bits[kBinsPerThread];
};

__device__ __forceinline__ std::uint64_t warp_sum(std::uint64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// The sum over this lane and those below it.
template <typename T>
__device__ __forceinline__ T warp_prefix(T x, int lanes) {
  for (int step = 1; step < lanes; step *= 2) {
    const T other = __shfl_up_sync(~0u, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}

template <bool WIDE>
__device__ __forceinline__ void add_to_bin(SelectShared& s, std::uint32_t bin, int count, std::uint32_t low_bits) {
  atomicAdd(&s.counts[bin], count);
  if constexpr (WIDE) {
    if (atomicAdd(&s.low_bits[bin], low_bits) > ~low_bits) atomicAdd(&s.counts[bin], kCarry);
  } else {
    atomicAdd(&s.low_bits[bin], low_bits);
  }
}

// The same to the bins of all CTAs of a cluster.
template <typename Team>
__device__ __forceinline__ void add_to_all(const Team& team, SelectShared& s, std::uint32_t bin, int count,
                                           std::uint32_t low_bits) {
#pragma unroll 1
  for (int cta = 0; cta < team.ctas; ++cta) {
    atomicAdd(team.of_cta(&s.counts[bin], cta), count);
    atomicAdd(team.of_cta(&s.low_bits[bin], cta), low_bits);
  }
}

// Adds the CTA's keys within the window to its bins; spread: to those of every CTA of the cluster.
template <bool FIRST, typename Team, typename Tile>
__device__ __forceinline__ void count_window(const Team& team, const Tile& tile, bool spread,
                                             const SelectWindow& window, const Weighing& weighing, SelectShared& s) {
  constexpr bool kWide = !FIRST || !Tile::kResident;  // 2^16 keys of 16 bits fit
  const std::uint32_t top = window.high >> window.shift, mask = (1u << window.shift) - 1;
  // in the first level a dead slot's bin is `top`
  const std::uint32_t regular = min(kRegularBins, top);
  auto add = [&](std::uint32_t bin, int count, std::uint32_t low_bits) {
    if constexpr (Team::kCluster && !FIRST) {
      if (spread) return add_to_all(team, s, bin, count, low_bits);
    }
    add_to_bin<kWide>(s, bin, count, low_bits);
  };
  int rest = 0, negative = 0;
  std::uint64_t rest_mass = 0;
#pragma unroll 1
  for (int v = threadIdx.x; v < tile.vectors; v += kSelectThreads) {
    const uint4 four = tile.keys(v);
    const std::uint32_t keys[4] = {four.x, four.y, four.z, four.w};
    std::uint32_t bins[4], low_bits[4];
    bool inside[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bins[e] = top - (keys[e] >> window.shift);
      inside[e] = FIRST ? bins[e] < regular : keys[e] - window.low <= window.high - window.low;
    }
    if (!FIRST && !__any_sync(~0u, inside[0] || inside[1] || inside[2] || inside[3])) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      low_bits[e] = keys[e] & mask;
      if (!FIRST) low_bits[e] >>= weighing.lost(keys[e]);  // the first level reaches down to where nothing is lost
    }
    // many equal scores would queue up at one bin
    const std::uint32_t first_bin = __shfl_sync(~0u, bins[0], 0);
    bool one_bin = true;
#pragma unroll
    for (int e = 0; e < 4; ++e) one_bin = one_bin && inside[e] && bins[e] == first_bin;
    if (__all_sync(~0u, one_bin)) {
      const std::uint32_t sum = __reduce_add_sync(~0u, low_bits[0] + low_bits[1] + low_bits[2] + low_bits[3]);
      if (threadIdx.x % 32 == 0) add(first_bin, 128, sum);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (inside[e]) {
        add(bins[e], 1, low_bits[e]);
      } else if (FIRST && keys[e] >= kKeyOfZero) {
        ++rest;
        if (keys[e] > kKeyOfZero) rest_mass += weighing.of(keys[e]);
      } else if (FIRST && keys[e] != 0) {
        ++negative;
      }
    }
  }
  if constexpr (FIRST) {
    if (__any_sync(~0u, (rest | negative) != 0)) {
      rest = __reduce_add_sync(~0u, rest);
      negative = __reduce_add_sync(~0u, negative);
      rest_mass = warp_sum(rest_mass);
      if (threadIdx.x % 32 == 0) {
        atomicAdd(&s.counts[kRegularBins], rest);
        atomicAdd(&s.counts[kRegularBins + 1], negative);
        atomicAdd(&s.rest_mass, rest_mass);
      }
    }
  }
}

// This thread's bins, summed over the CTAs of the row; the CTA's own are cleared for the next level.
template <typename Team>
__device__ __forceinline__ BinSums take_bins(Team& team, int level, int shift, bool spread, SelectShared& s) {
  constexpr int kCountBits = 22;  // of 2^22 keys; a bin of 2^20 never holds all, as the highest lies above it
  if (Team::kCluster && spread) {
    team.barrier();
  } else {
    __syncthreads();
  }
  BinSums bins;
  uint4* counts = reinterpret_cast<uint4*>(s.counts) + threadIdx.x;
  uint4* low_bits = reinterpret_cast<uint4*>(s.low_bits) + threadIdx.x;
  const uint4 count = *counts, low = *low_bits;
  *counts = *low_bits = {0, 0, 0, 0};
  const std::uint32_t four_counts[4] = {count.x, count.y, count.z, count.w}, four_low[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    bins.counts[i] = four_counts[i] % kCarry;
    bins.low_bits[i] = static_cast<std::uint64_t>(four_counts[i] / kCarry) << 32 | four_low[i];
  }
  if constexpr (!Team::kAlone) {
    if (Team::kCluster && spread) return bins;
    auto* sums = reinterpret_cast<unsigned long long*>(team.sums) + level * kSelectBins + threadIdx.x * kBinsPerThread;
    const int field = shift + kCountBits;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (bins.counts[i] != 0)
        atomicAdd(sums + i, static_cast<std::uint64_t>(bins.counts[i]) << field | bins.low_bits[i]);
    }
    if (level == 0 && threadIdx.x == 0 && s.rest_mass != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(team.sums) + kSelectLevels * kSelectBins, s.rest_mass);
    }
    team.barrier();
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 2) {
      const ulonglong2 both = __ldcg(reinterpret_cast<const ulonglong2*>(sums + i));
      const std::uint64_t mask = (std::uint64_t{1} << field) - 1;
      bins.counts[i] = static_cast<int>(both.x >> field);
      bins.counts[i + 1] = static_cast<int>(both.y >> field);
      bins.low_bits[i] = both.x & mask;
      bins.low_bits[i + 1] = both.y & mask;
    }
  }
  return bins;
}

// The cut of stage I; highest: the row's highest key, 0 if it has no candidate. Every thread gets it.
template <typename Team, typename Tile>
__device__ __forceinline__ SelectCut find_cut(const SelectTokensParams& p, Team& team, const Tile& tile,
                                              std::uint32_t highest, SelectShared& s) {
  constexpr std::uint64_t kNever = ~std::uint64_t{0};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Weighing weighing(highest);
  SelectCut cut;
  if (highest == 0 || p.share == -2) return cut;
  SelectWindow window{1, highest, kFirstShift};
  int limit = p.keep;
  std::uint64_t threshold = kNever, above_mass = 0;
  // A cluster adds few keys to the bins of all its CTAs at once, without the way through global memory. Not twice in a
  // row: after that, a CTA's bins may not be clear yet when another one goes on to the next level.
  bool spread = false;
#pragma unroll 1
  for (int level = 0;; ++level) {
    if (level == 0) {
      count_window<true>(team, tile, false, window, weighing, s);
    } else {
      count_window<false>(team, tile, spread, window, weighing, s);
    }
    const BinSums bins = take_bins(team, level, window.shift, spread, s);

    int counts[kBinsPerThread], count = 0;
    std::uint64_t masses[kBinsPerThread], mass = 0;
    const std::uint32_t top = window.high >> window.shift, first_bin = threadIdx.x * kBinsPerThread;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      counts[i] = bins.counts[i];
      const std::uint32_t base = (top - first_bin - i) << window.shift;
      masses[i] = counts[i] == 0 ? 0 : weighing.of_equal(base, counts[i], bins.low_bits[i]);
    }
    if (level == 0 && threadIdx.x == kSelectThreads - 1) {
      masses[2] = Team::kAlone ? s.rest_mass : __ldcg(team.sums + kSelectLevels * kSelectBins);
      masses[3] = 0;
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      count += counts[i];
      mass += masses[i];
    }
    const int count_to = warp_prefix(count, 32);
    const std::uint64_t mass_to = warp_prefix(mass, 32);
    if (lane == 31) {
      s.count_by_warp[warp] = count_to;
      s.mass_by_warp[warp] = mass_to;
    }
    __syncthreads();
    const int count_of = lane < kSelectWarps ? s.count_by_warp[lane] : 0;
    const std::uint64_t mass_of = lane < kSelectWarps ? s.mass_by_warp[lane] : 0;
    const int warps_count_to = warp_prefix(count_of, kSelectWarps);
    const std::uint64_t warps_mass_to = warp_prefix(mass_of, kSelectWarps);
    if (level == 0) {
      const int total_count = __shfl_sync(~0u, warps_count_to, kSelectWarps - 1);
      const std::uint64_t total = __shfl_sync(~0u, warps_mass_to, kSelectWarps - 1);
      limit = min(limit, total_count);
      if (p.share >= 0) {
        if (total == 0) {
          limit = min(limit, 1);
        } else {  // the smallest mass with mass * 2^24 >= share * total
          const std::uint64_t share = p.share;
          threshold = share * (total >> 24) + ((share * (total & 0xFFFFFF) + 0xFFFFFF) >> 24);
          if (threshold == 0) return cut;
        }
      }
    }
    // what lies above this thread's bins
    int above = cut.above + __shfl_sync(~0u, warps_count_to - count_of, warp) + count_to - count;
    std::uint64_t above_here = above_mass + __shfl_sync(~0u, warps_mass_to - mass_of, warp) + mass_to - mass;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const bool before = above >= limit || above_here >= threshold;
      const bool after = above + counts[i] >= limit || above_here + masses[i] >= threshold;
      if (after && !before) {  // in one bin of one thread
        s.found.bin = first_bin + i;
        s.found.count = counts[i];
        s.found.above = above;
        s.found.above_mass = above_here;
      }
      above += counts[i];
      above_here += masses[i];
    }
    __syncthreads();
    const std::uint32_t bin = s.found.bin;
    spread = !spread && s.found.count <= kFewKeys;
    cut.above = s.found.above;
    above_mass = s.found.above_mass;
    if (level == 0 && bin >= kRegularBins) {
      window.high = ((top - kRegularBins + 1) << kFirstShift) - 1;
      window.low = kKeyOfZero;
      if (bin > kRegularBins) {
        window.high = min(window.high, kKeyOfZero - 1);
        window.low = 1;
      }
      window.shift = kRestShift;
      continue;
    }
    cut.prefix = top - bin;
    cut.shift = window.shift;
    window.low = cut.prefix << window.shift;
    const std::uint32_t end = window.low + ((1u << window.shift) - 1);
    if (window.shift == 0) {
      const std::uint64_t tie = weighing.of(cut.prefix);
      cut.ties = limit - cut.above;
      if (threshold != kNever && tie != 0) {
        cut.ties = static_cast<int>(min(static_cast<std::uint64_t>(cut.ties), (threshold - above_mass - 1) / tie + 1));
      }
      return cut;
    }
    if (s.found.count == 1 && end <= window.high) {  // all keys with the prefix are the window's
      cut.ties = 1;
      return cut;
    }
    window.high = min(window.high, end);
    window.shift = max(window.shift - kBinBits, 0);
  }
}

}  // namespace specvlm
