// Finds the last kept logit of every row, 8 bits of its key per launch. One CTA takes one tile: its histogram of the
// digit goes to the workspace, and the row's last CTA chooses the digit where the sum from above reaches the goal.
#pragma once

#include <cub/block/block_scan.cuh>

#include "verify_sample/mass.cuh"

namespace specvlm {

enum class SampleSearch {
  kTop,    // only the row's highest logit, which masses need
  kCount,  // the top_k-th logit; also the highest
  kMass,   // the logit where the mass of the higher ones reaches top_p of the row's, or of its top_k
};

constexpr int kSearchColumns = 32;  // copies of a histogram's words, so that the lanes of a warp do not meet

// Masses are summed in two words: 512 of them, below 2^19 or so each, stay below 2^32.
constexpr int kLowBits = 19;

template <typename T, SampleSearch KIND>
__global__ void __launch_bounds__(kLogitsThreads, 4)
    sample_search_kernel(const __grid_constant__ VerifySampleParams p, int digit, bool after_count) {
  static_assert(kLogitsThreads == kSearchBins);
  using Tile = LogitsTile<T, kSamplePerThread>;
  using Key = LogitKey<T>;
  using Scan = cub::BlockScan<std::int64_t, kLogitsThreads>;
  constexpr bool kMass = KIND == SampleSearch::kMass;
  constexpr int kMassColumns = kSearchColumns / 2;
  __shared__ union {
    alignas(16) std::uint32_t words[kSearchBins * kSearchColumns];
    typename Scan::TempStorage scan;
  } shared;

  const int part = blockIdx.x, parts = gridDim.x, node = blockIdx.y;
  const std::int64_t request = blockIdx.z, row = request * p.nodes + node;
  const SampleWorkspace workspace(p.workspace, static_cast<std::int64_t>(p.batch) * p.nodes, parts);
  SampleEntry* entries = workspace.entries + row * parts;
  std::int64_t* histograms = workspace.histograms + row * parts * kSearchBins;
  SampleState* state = workspace.states + row;
  const Share share(p.factor);
  const int shift = Key::kBits - 8 * (digit + 1);
  const bool first = digit == 0, final = digit == Key::kDigits - 1;

  if constexpr (KIND != SampleSearch::kTop) {
    uint4* vectors = reinterpret_cast<uint4*>(shared.words);
#pragma unroll
    for (int i = 0; i < kSearchColumns / 4; ++i) vectors[i * kLogitsThreads + threadIdx.x] = {0, 0, 0, 0};
  }
  const Tile tile(static_cast<const T*>(p.logits) + request * p.batch_stride + node * p.node_stride, part, p.vocab);
  let_next_launch_start();
  wait_for_launch_before();
  if (!kMass && first) {
    const float top = top_of_cta(tile);
    if (threadIdx.x == 0) entries[part].top = top;
  }
  if constexpr (KIND != SampleSearch::kTop) {
    const std::uint32_t prefix = first ? 0 : state->prefix;
    const float top = kMass ? state->top : 0.0f, least = after_count ? state->count_cut : __uint_as_float(0xFF800000);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < Tile::kPerVector; ++e) {  // -inf beside the vocabulary counts too: the lowest, mass 0
        const std::uint32_t key = Key::of(tile.raw(v, e)), bin = key >> shift & (kSearchBins - 1);
        if (!first && key >> shift >> 8 != prefix) continue;
        if constexpr (kMass) {
          const float logit = tile.logit(v, e);
          const std::int64_t mass = logit >= least ? share.mass(logit, top) : 0;
          if (mass == 0) continue;
          std::uint32_t* word = shared.words + bin * kSearchColumns + threadIdx.x % kMassColumns;
          atomicAdd(word, static_cast<std::uint32_t>(mass) & ((1u << kLowBits) - 1));
          atomicAdd(word + kMassColumns, static_cast<std::uint32_t>(mass >> kLowBits));
        } else {
          atomicAdd(shared.words + bin * kSearchColumns + threadIdx.x % kSearchColumns, 1u);
        }
      }
    }
    __syncthreads();
    std::int64_t mine = 0;
#pragma unroll 8
    for (int i = 0; i < kSearchColumns; ++i) {
      const int column = (i + threadIdx.x) % kSearchColumns;
      const std::int64_t word = shared.words[threadIdx.x * kSearchColumns + column];
      mine += kMass && column >= kMassColumns ? word << kLowBits : word;
    }
    histograms[part * kSearchBins + threadIdx.x] = mine;
  }
  if (!last_to_arrive(p.arrivals + row, parts)) return;

  if (!kMass && first && threadIdx.x < 32) {
    std::uint32_t key = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += 32) key = max(key, order_key(__ldcg(&entries[i].top)));
    key = __reduce_max_sync(~0u, key);
    if (threadIdx.x == 0) state->top = key_value(key);
  }
  if constexpr (KIND != SampleSearch::kTop) {
    const std::uint32_t bin = kSearchBins - 1 - threadIdx.x, prefix = first ? 0 : state->prefix;
    std::int64_t mine = 0;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) mine += __ldcg(histograms + i * kSearchBins + bin);
    if (kMass && after_count) {  // of the logits equal to the top_k-th only the first are in the race
      const std::uint32_t key = state->count_key;
      if ((first || key >> shift >> 8 == prefix) && (key >> shift & (kSearchBins - 1)) == bin) {
        mine -= (state->count_equal - state->count_wanted) * share.mass(state->count_cut, state->top);
      }
    }
    std::int64_t above, whole, goal;
    Scan(shared.scan).ExclusiveSum(mine, above, whole);
    if (!first) {
      goal = state->goal;
    } else if (kMass) {
      goal = max(min(static_cast<std::int64_t>(ceil(static_cast<double>(whole) * p.top_p)), whole), std::int64_t{1});
    } else {
      goal = p.top_k;
    }
    __syncthreads();                                                                // the state has been read
    const bool nothing = kMass && whole == 0 && threadIdx.x == kLogitsThreads - 1;  // NaN and infinities everywhere
    if (nothing || (above < goal && above + mine >= goal)) {
      const std::uint32_t key = prefix << 8 | bin;
      state->prefix = key;
      state->goal = goal - above;
      if (final) {
        const float cut = Key::value(key);
        state->cut = cut;
        state->by_mass = kMass;
        if (kMass) {
          const std::int64_t one = share.mass(cut, state->top);
          state->wanted = one > 0 ? (goal - above + one - 1) / one : 1;
        } else {
          state->wanted = goal - above;
          state->count_key = key;
          state->count_cut = cut;
          state->count_wanted = static_cast<int>(goal - above);
          state->count_equal = static_cast<int>(mine);
        }
      }
    }
  }
}

}  // namespace specvlm
