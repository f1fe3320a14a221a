// What the vocabulary kernels share: a tile of a row of logits in registers, an exact order of tokens, and the last
// CTA to arrive.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/l2.cuh"
#include "specvlm/logits.h"

namespace specvlm {

constexpr int kLogitsThreads = 256;
constexpr int kLogitsWarps = kLogitsThreads / 32;

// Elements of a 32-bit word of logits. kUnit: low bits of an order_key that carry nothing.
template <typename T>
struct LogitWord;

template <>
struct LogitWord<__nv_bfloat16> {
  static constexpr std::uint32_t kLowest = 0xFF80FF80;  // -inf, -inf
  static constexpr int kUnit = 16;
  __device__ static std::uint32_t max(std::uint32_t a, std::uint32_t b) {  // the other one where one is NaN
    asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
  __device__ static float value(std::uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xFFFF0000u);
  }
};

template <>
struct LogitWord<__half> {
  static constexpr std::uint32_t kLowest = 0xFC00FC00;
  static constexpr int kUnit = 13;
  __device__ static std::uint32_t max(std::uint32_t a, std::uint32_t b) {
    asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
  __device__ static float value(std::uint32_t word, int i) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i == 0 ? word : word >> 16)));
  }
};

template <>
struct LogitWord<float> {
  static constexpr std::uint32_t kLowest = 0xFF800000;
  static constexpr int kUnit = 0;
  __device__ static std::uint32_t max(std::uint32_t a, std::uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  __device__ static float value(std::uint32_t word, int) { return __uint_as_float(word); }
};

// Integers that order floats; -0.0 counts as 0.0. Not for NaN.
__device__ __forceinline__ std::uint32_t order_key(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float key_value(std::uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// A token as one integer: the larger logit first, then the lower id. 0 stands for no token.
__device__ __forceinline__ std::uint64_t entry_of(float logit, int token) {
  return static_cast<std::uint64_t>(order_key(logit)) << 32 | ~static_cast<std::uint32_t>(token);
}
__device__ __forceinline__ int entry_token(std::uint64_t entry) {
  return static_cast<int>(~static_cast<std::uint32_t>(entry));
}
__device__ __forceinline__ float entry_logit(std::uint64_t entry) {
  return key_value(static_cast<std::uint32_t>(entry >> 32));
}

template <typename T>
__device__ __forceinline__ std::uint32_t raw_logit(const T* address) {
  if constexpr (sizeof(T) == 2) {
    return __ldg(reinterpret_cast<const unsigned short*>(address));
  } else {
    return __ldg(reinterpret_cast<const unsigned*>(address));
  }
}

// One logit, NaN as -inf.
template <typename T>
__device__ __forceinline__ float load_logit(const T* address) {
  return fmaxf(LogitWord<T>::value(raw_logit(address), 0), __uint_as_float(0xFF800000));
}

// PER_THREAD logits of one row in every thread's registers, NaN as -inf. Vector v of thread t holds consecutive tokens
// from token(v, 0) on. Vectors start at multiples of 16 bytes wherever the row starts, so tokens of the first one may
// be negative; those and the ones past the vocabulary hold -inf, and are never read.
template <typename T, int PER_THREAD>
struct LogitsTile {
  using Word = LogitWord<T>;
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr int kPerVector = 16 / sizeof(T);
  static constexpr int kVectors = PER_THREAD / kPerVector;
  static constexpr int kStep = kLogitsThreads * kPerVector;  // tokens from one vector of a thread to its next
  static constexpr int kSize = kLogitsThreads * PER_THREAD;

  const T* row;
  std::uint32_t words[kVectors][4];
  int first;  // token(0, 0)
  int vocab;

  __device__ LogitsTile(const T* row, int part, int vocab) : row(row), vocab(vocab) {
    const int skew = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T));
    first = part * kSize + static_cast<int>(threadIdx.x) * kPerVector - skew;
    const uint4* vectors = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4 vector = {Word::kLowest, Word::kLowest, Word::kLowest, Word::kLowest};
      if (inside(v, 0) && inside(v, kPerVector - 1)) vector = __ldg(vectors + v * kLogitsThreads);
      words[v][0] = vector.x, words[v][1] = vector.y, words[v][2] = vector.z, words[v][3] = vector.w;
    }
    // a thread has at most two vectors that the row's ends cut: its first one, and the one at the end
    const int end = vocab > first ? (vocab - first) / kStep : kVectors;
#pragma unroll 1
    for (int v = first < 0 ? 0 : end; v < kVectors; v = v < end ? end : kVectors) {
      if (inside(v, 0) != inside(v, kPerVector - 1) || first < 0) load_cut_vector(v);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[v][w] = Word::max(words[v][w], Word::kLowest);  // NaN becomes -inf
    }
  }

  __device__ __forceinline__ void load_cut_vector(int v) {
    constexpr int kBits = 32 / kPerWord;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      std::uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        const int e = w * kPerWord + i;
        const std::uint32_t bits = inside(v, e) ? raw_logit(row + token(v, e)) : Word::kLowest >> (32 - kBits);
        word |= bits << (i * kBits);
      }
#pragma unroll
      for (int u = 0; u < kVectors; ++u) words[u][w] = u == v ? word : words[u][w];
    }
  }

  // Keeps the compiler from holding all logits unpacked from one use to the next, which takes twice the registers.
  // ptxas sees through an empty asm, so this combines the words with a 0 that it cannot know.
  __device__ __forceinline__ void keep_packed(const volatile std::uint32_t& zero) {
    const std::uint32_t bits = zero;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[v][w] ^= bits;
    }
  }

  __device__ __forceinline__ int token(int v, int e) const { return first + v * kStep + e; }
  __device__ __forceinline__ bool inside(int v, int e) const {
    return static_cast<unsigned>(token(v, e)) < static_cast<unsigned>(vocab);
  }
  __device__ __forceinline__ float logit(int v, int e) const {
    return Word::value(words[v][e / kPerWord], e % kPerWord);
  }
  __device__ __forceinline__ std::uint32_t raw(int v, int e) const {
    return kPerWord == 1 ? words[v][e] : words[v][e / 2] >> (e % 2 * 16) & 0xFFFFu;
  }
  __device__ __forceinline__ float highest(int v) const {
    const std::uint32_t top = Word::max(Word::max(words[v][0], words[v][1]), Word::max(words[v][2], words[v][3]));
    return kPerWord == 1 ? Word::value(top, 0) : fmaxf(Word::value(top, 0), Word::value(top, 1));
  }
};

// Tiles of per_thread logits a thread that cover a row. A row that starts between 16-byte boundaries, as rows may that
// are not aligned, needs up to 7 tokens more.
inline int logits_parts(int vocab, int per_thread, bool aligned) {
  const int tile = kLogitsThreads * per_thread;
  return (vocab + (aligned ? 0 : 7) + tile - 1) / tile;
}

// True in the CTA that arrives last of `arrivals`; all that the others wrote before is then visible (read it with
// __ldcg: an earlier read of the same line may still be in L1). The counter wraps to 0, ready for the next launch.
__device__ __forceinline__ bool last_to_arrive(std::uint32_t* counter, std::uint32_t arrivals) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    std::uint32_t before;  // as atomicInc, but ordered without the sequentially consistent fence of __threadfence
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;\n"
                 : "=r"(before)
                 : "l"(counter), "r"(arrivals - 1)
                 : "memory");
    last = before == arrivals - 1;
  }
  __syncthreads();
  return last;
}

}  // namespace specvlm
