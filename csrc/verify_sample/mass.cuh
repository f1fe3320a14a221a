// Probabilities as integers, so that sums do not depend on their order and taking a token out leaves exactly the rest.
#pragma once

#include "common/logits.cuh"
#include "common/numeric.cuh"
#include "common/overlap.cuh"
#include "specvlm/verify_sample.h"

namespace specvlm {

constexpr int kSamplePerThread = 32;
constexpr int kSampleMaxParts = 160;  // 129 tiles of 8,192 cover 2^20 tokens wherever the row starts
constexpr int kSearchBins = 256;      // of a digit: 8 bits of a key

// What a tile leaves: the mass of its tokens, in units of 2^-38 of a token whose logit is `top`.
struct alignas(16) SampleEntry {
  std::int64_t mass;
  float top;
  int last;  // of the logits equal to the row's cut, those up to this token are kept
};

// What the search for the last kept token of a row has found.
struct SampleState {
  std::int64_t goal;    // count or mass that is still wanted of the tokens whose key begins with `prefix`
  std::int64_t wanted;  // when finished: how many of the logits equal to `cut` are kept
  std::uint32_t prefix;
  float cut;
  float top;  // the row's highest logit
  // left by a finished search for top_k
  std::uint32_t count_key;
  float count_cut;
  int count_wanted;
  int count_equal;
  int by_mass;  // whether the finished search was one for a mass
};

// 2^((logit - top) * factor), factor in two floats, for logits from top down; 0 from 2^-200 down, and for every logit
// where top is infinite.
struct Share {
  float factor, factor_low, lowest;

  __device__ explicit Share(double exact)
      : factor(static_cast<float>(exact)), factor_low(static_cast<float>(exact - factor)), lowest(-200.0f / factor) {}

  __device__ __forceinline__ float operator()(float logit, float top) const {
    const float below = fmaxf(logit - top, lowest);  // NaN, from infinities, counts as lowest
    const float power = __fmul_rn(below, factor);
    const float rest = fmaf(below, factor_low, fmaf(below, factor, -power));  // what the product's rounding lost
    const float share = exp2_fast(power);
    return fmaf(share, rest * 0.693147181f, share);
  }
  __device__ __forceinline__ std::int64_t mass(float logit, float top) const {
    return __float2ll_rn((*this)(logit, top) * 0x1p38f);
  }
};

// The exact sum of up to 32 masses without 64-bit conversions: each share, at most 1, is cut into a multiple of 2^-18
// and a rest that is rounded to a multiple of 2^-38; sums of either kind are exact. The result is that of adding up
// Share::mass, whatever the order: both round half to even.
struct MassSum {
  static constexpr float kBase = 32.0f;        // 32..64 has steps of 2^-18
  static constexpr float kRound = 0x1.8p-15f;  // 2^-15..2^-14 has steps of 2^-38
  float high = kBase, low = 0.0f;

  __device__ __forceinline__ void add(float share) {
    const float sum = __fadd_rn(high, share);
    const float rest = __fsub_rn(share, __fsub_rn(sum, high));
    high = sum;
    low = __fadd_rn(low, __fsub_rn(__fadd_rn(rest, kRound), kRound));
  }
  // Of a warp's sums, for every lane.
  __device__ __forceinline__ std::int64_t warp_total() const {
    const int highs = __reduce_add_sync(~0u, static_cast<int>(__fsub_rn(high, kBase) * 0x1p18f));
    const int lows = __reduce_add_sync(~0u, static_cast<int>(low * 0x1p38f));
    return (static_cast<std::int64_t>(highs) << 20) + lows;
  }
};

// Integers of all bits of T that order logits; -0.0 counts as 0.0.
template <typename T>
struct LogitKey {
  static constexpr int kBits = 8 * sizeof(T);
  static constexpr int kDigits = kBits / 8;

  __device__ static __forceinline__ std::uint32_t of(std::uint32_t raw) {
    if constexpr (sizeof(T) == 4) {
      return order_key(__uint_as_float(raw));
    } else {
      return raw >= 0x8000u ? 0x10000u - raw : raw + 0x8000u;
    }
  }
  __device__ static __forceinline__ float value(std::uint32_t key) {
    if constexpr (sizeof(T) == 4) {
      return key_value(key);
    } else {
      return LogitWord<T>::value(key >= 0x8000u ? key - 0x8000u : 0x10000u - key, 0);
    }
  }
};

template <typename V>
__device__ __forceinline__ V warp_prefix(V mine) {  // of the lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const V other = __shfl_up_sync(~0u, mine, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) mine += other;
  }
  return mine;
}

// The highest logit of a CTA's tile, for every thread.
template <typename T, int PER_THREAD>
__device__ __forceinline__ float top_of_cta(const LogitsTile<T, PER_THREAD>& tile) {
  using Tile = LogitsTile<T, PER_THREAD>;
  __shared__ std::uint32_t by_warp[kLogitsWarps];
  float top = tile.highest(0);
#pragma unroll
  for (int v = 1; v < Tile::kVectors; ++v) top = fmaxf(top, tile.highest(v));
  const std::uint32_t of_warp = __reduce_max_sync(~0u, order_key(top));
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = of_warp;
  __syncthreads();
  std::uint32_t key = by_warp[0];
#pragma unroll
  for (int w = 1; w < kLogitsWarps; ++w) key = max(key, by_warp[w]);
  return key_value(key);
}

// The parts of a call's workspace, rows = B*N.
struct SampleWorkspace {
  SampleEntry* entries;      // [rows,parts]
  SampleState* states;       // [rows]
  std::int64_t* histograms;  // [rows,parts,kSearchBins], of the digit searched last

  __host__ __device__ SampleWorkspace(void* workspace, std::int64_t rows, int parts)
      : entries(static_cast<SampleEntry*>(workspace)),
        states(reinterpret_cast<SampleState*>(entries + rows * parts)),
        histograms(reinterpret_cast<std::int64_t*>(states + rows)) {}
};

}  // namespace specvlm
