// The CTAs that work on one row: how they wait for each other and pass on a few numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cuda/ptx>

#include "specvlm/select_tokens.h"

namespace specvlm {

constexpr int kSelectBins = 2048;
constexpr int kSelectLevels = 4;  // see search.cuh
constexpr int kSelectPosts = 2;   // rounds of passing on numbers
constexpr int kSelectMostCluster = 16;

// A row's words of the workspace: the sums of every level's bins, the rest's mass and an unused word, the posts.
constexpr int kSelectSums = kSelectLevels * kSelectBins + 2;
__host__ __device__ constexpr int select_row_words(int ctas) { return kSelectSums + kSelectPosts * ctas * 2; }

using SelectPosts = uint4[kSelectPosts][kSelectMostCluster];

template <SelectTokensKernel KERNEL>
struct SelectTeam {
  static constexpr bool kAlone = KERNEL == SelectTokensKernel::kAlone;
  static constexpr bool kCluster = KERNEL == SelectTokensKernel::kCluster;
  static constexpr bool kGrid = KERNEL == SelectTokensKernel::kGrid;

  int rank, ctas;
  std::uint64_t* sums;      // [kSelectLevels,kSelectBins], then the rest's mass; not kAlone
  uint4* posts;             // kGrid: [kSelectPosts,ctas] in global memory; otherwise the CTA's own, shared memory
  std::uint32_t* arrivals;  // kGrid
  std::uint32_t passed;     // kGrid: arrivals that the barriers until now have counted

  __device__ SelectTeam(const SelectTokensParams& p, SelectPosts& shared_posts)
      : rank(blockIdx.x), ctas(gridDim.x), passed(0) {
    std::uint64_t* words = p.workspace + static_cast<std::int64_t>(blockIdx.y) * select_row_words(ctas);
    sums = words;
    posts = kGrid ? reinterpret_cast<uint4*>(words + kSelectSums) : &shared_posts[0][0];
    arrivals = p.arrivals + blockIdx.y;
  }

  // Before the first post: a cluster's CTAs must all have started.
  __device__ __forceinline__ void arrive_first() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) cuda::ptx::barrier_cluster_arrive();
#endif
  }
  __device__ __forceinline__ void wait_first() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) cuda::ptx::barrier_cluster_wait();
#endif
  }

  // Of all threads of all the row's CTAs. What any wrote before is visible to all after (read global memory with
  // __ldcg).
  __device__ __forceinline__ void barrier() {
    if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
      cuda::ptx::barrier_cluster_arrive();  // releases, and the wait acquires, by default
      cuda::ptx::barrier_cluster_wait();
#endif
    } else {
      __syncthreads();
      if constexpr (kGrid) {
        passed += ctas;
        if (threadIdx.x == 0) {
          asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(arrivals) : "memory");
          std::uint32_t seen;
          do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(seen) : "l"(arrivals) : "memory");
          } while (seen < passed);
        }
        __syncthreads();
      }
    }
  }

  // Leaves the counter at 0, after the last barrier.
  __device__ __forceinline__ void leave() const {
    if constexpr (kGrid) {
      if (threadIdx.x == 0 && atomicAdd(arrivals, 1) == passed + ctas - 1) atomicExch(arrivals, 0);
    }
  }

  // kCluster: where another CTA has what this one has in its shared memory.
  template <typename T>
  __device__ __forceinline__ T* of_cta(T* mine, int cta) const {
#if __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(mine, cta));
#else
    return mine;
#endif
  }

  // For one whole warp, with the same value in all lanes; to be read after a barrier.
  __device__ __forceinline__ void post(int round, const uint4& value) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kCluster) {
      if (lane < ctas) *of_cta(posts + round * kSelectMostCluster + rank, lane) = value;
    } else if (lane == 0) {
      posts[round * (kGrid ? ctas : kSelectMostCluster) + rank] = value;
    }
  }
  __device__ __forceinline__ uint4 posted(int round, int from) const {
    if constexpr (kGrid) {
      return __ldcg(posts + round * ctas + from);
    } else {
      return posts[round * kSelectMostCluster + from];
    }
  }
};

}  // namespace specvlm
