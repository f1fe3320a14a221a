// A CTA's part of a row of scores, as keys.
#pragma once

#include "common/ampere.cuh"
#include "common/logits.cuh"
#include "specvlm/select_tokens.h"

namespace specvlm {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;

// Slots 4v .. 4v+3 are vector v. Vectors lie at multiples of 16 bytes wherever the row starts, so the first slots may
// lie before the row and the last ones past it; those and masked scores have the key 0, which no score has (-inf and
// NaN have 0x007FFFFF).
template <bool RESIDENT>
struct SelectTile {
  static constexpr bool kResident = RESIDENT;
  const float* row;
  const std::uint8_t* mask;
  uint4* stored;  // shared memory, [vectors] keys
  int first;      // token of slot 0
  int tokens;
  int vectors;  // a multiple of 32

  __device__ SelectTile(const SelectTokensParams& p, std::int64_t index, int part, int slots, uint4* stored)
      : row(p.scores + index * p.scores_stride),
        mask(p.mask == nullptr ? nullptr : p.mask + index * p.mask_stride),
        stored(stored),
        tokens(p.tokens),
        vectors(slots / 4) {
    first = part * slots - static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(float));
  }

  __device__ __forceinline__ bool whole(int v) const {
    const int token = first + 4 * v;
    return token >= 0 && token + 3 < tokens;
  }

  __device__ __forceinline__ static std::uint32_t key(float score) {
    return order_key(fmaxf(score, __uint_as_float(0xFF800000)));  // NaN becomes -inf
  }

  // Of a whole vector, or of one that the row's ends cut.
  __device__ __forceinline__ uint4 keys_of(int v, const float4& x) const {
    const int token = first + 4 * v;
    std::uint32_t keys[4] = {key(x.x), key(x.y), key(x.z), key(x.w)};
    if (mask != nullptr) {
      if (reinterpret_cast<std::uintptr_t>(mask + token) % 4 == 0) {
        const std::uint32_t word = __ldcg(reinterpret_cast<const unsigned*>(mask + token));
#pragma unroll
        for (int e = 0; e < 4; ++e) keys[e] = (word >> (8 * e) & 0xFF) != 0 ? keys[e] : 0;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) keys[e] = __ldcg(mask + token + e) != 0 ? keys[e] : 0;
      }
    }
    return {keys[0], keys[1], keys[2], keys[3]};
  }
  __device__ __forceinline__ uint4 keys_of_cut(int v) const {
    std::uint32_t keys[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = first + 4 * v + e;
      const bool there = token >= 0 && token < tokens && (mask == nullptr || __ldcg(mask + token) != 0);
      keys[e] = there ? key(__ldcg(row + token)) : 0;
    }
    return {keys[0], keys[1], keys[2], keys[3]};
  }

  // Starts loading, where the tile is resident.
  __device__ __forceinline__ void request() const {
    if (mask != nullptr) {
      const int token = first + static_cast<int>(threadIdx.x) * 128;
      if (static_cast<int>(threadIdx.x) * 32 < vectors && token >= 0 && token < tokens) prefetch_to_l2(mask + token);
    }
    if constexpr (RESIDENT) {
#pragma unroll 4
      for (int v = threadIdx.x; v < vectors; v += kSelectThreads) {
        if (whole(v)) copy_async(shared_address(stored + v), row + first + 4 * v, 16);
      }
      copy_async_commit();
    }
  }

  // This thread's highest key. The keys are then in shared memory, for other threads after a barrier.
  __device__ __forceinline__ std::uint32_t receive() const {
    std::uint32_t highest = 0;
    if constexpr (RESIDENT) copy_async_wait<0>();
#pragma unroll 2
    for (int v = threadIdx.x; v < vectors; v += kSelectThreads) {
      uint4 four;
      if constexpr (RESIDENT) {
        four = whole(v) ? keys_of(v, reinterpret_cast<const float4*>(stored)[v]) : keys_of_cut(v);
        stored[v] = four;
      } else {
        four = keys(v);
      }
      highest = max(highest, max(max(four.x, four.y), max(four.z, four.w)));
    }
    return highest;
  }

  __device__ __forceinline__ uint4 keys(int v) const {
    if constexpr (RESIDENT) {
      return stored[v];
    } else {
      return whole(v) ? keys_of(v, __ldcg(reinterpret_cast<const float4*>(row + first) + v)) : keys_of_cut(v);
    }
  }
};

}  // namespace specvlm
