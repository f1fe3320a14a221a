// The CTAs that work on one row: how they wait for each other and pass on a few numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cuda/ptx>

#include "specvlm/select_tokens.h"

namespace specvlm {

namespace ptx = cuda::ptx;

constexpr int kSelectBins = 2048;
constexpr int kSelectLevels = 4;  // see search.cuh
constexpr int kSelectPosts = 2;   // rounds of passing on numbers
constexpr int kSelectMostCluster = 16;

// A row's words of the workspace: the sums of every level's bins, the rest's mass and an unused word, the posts.
constexpr int kSelectSums = kSelectLevels * kSelectBins + 2;
__host__ __device__ constexpr int select_row_words(int ctas) { return kSelectSums + kSelectPosts * ctas * 2; }

struct SelectPosts {
  uint4 values[kSelectPosts][kSelectMostCluster];
  std::uint64_t arrived[kSelectPosts];  // kCluster: mbarriers, each for one phase
};

template <SelectTokensKernel KERNEL>
struct SelectTeam {
  static constexpr bool kAlone = KERNEL == SelectTokensKernel::kAlone;
  static constexpr bool kCluster = KERNEL == SelectTokensKernel::kCluster;
  static constexpr bool kGrid = KERNEL == SelectTokensKernel::kGrid;

  int rank, ctas;
  std::uint64_t* sums;      // [kSelectLevels,kSelectBins], then the rest's mass; not kAlone
  SelectPosts& own;         // shared memory; not kGrid
  uint4* posts;             // [kSelectPosts,ctas] in global memory; kGrid
  std::uint32_t* arrivals;  // kGrid
  std::uint32_t passed;     // kGrid: arrivals that the barriers until now have counted

  __device__ SelectTeam(const SelectTokensParams& p, SelectPosts& own)
      : rank(blockIdx.x), ctas(gridDim.x), own(own), passed(0) {
    std::uint64_t* words = p.workspace + static_cast<std::int64_t>(blockIdx.y) * select_row_words(ctas);
    sums = words;
    posts = reinterpret_cast<uint4*>(words + kSelectSums);
    arrivals = p.arrivals + blockIdx.y;
  }

  // Before anything else of the team's, in every CTA: the first half of a cluster's first barrier, which says that all
  // have started; what was written before it is visible after wait_first.
  __device__ __forceinline__ void arrive_first() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) {
      if (threadIdx.x == 0) {
        for (std::uint64_t& arrived : own.arrived) ptx::mbarrier_init(&arrived, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
        for (std::uint64_t& arrived : own.arrived) {
          ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &arrived,
                                         ctas * static_cast<int>(sizeof(uint4)));
        }
      }
      ptx::barrier_cluster_arrive();
    }
#endif
  }
  __device__ __forceinline__ void wait_first() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) ptx::barrier_cluster_wait();
#endif
  }

  // Of all threads of all the row's CTAs. What any wrote before is visible to all after (read global memory with
  // __ldcg).
  __device__ __forceinline__ void barrier() {
    if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
      ptx::barrier_cluster_arrive();  // releases, and the wait acquires, by default
      ptx::barrier_cluster_wait();
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

  // Passes 16 bytes to all CTAs. For one whole warp, with the same value in all lanes. A cluster's carry their own
  // signal, which takes less than half of what a barrier with its fence of global memory does.
  __device__ __forceinline__ void post(int round, const uint4& value) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
      if (lane < ctas) {
        const std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
        ptx::st_async(reinterpret_cast<std::uint32_t*>(of_cta(&own.values[round][rank], lane)), words,
                      of_cta(&own.arrived[round], lane));
      }
#endif
    } else if (lane == 0) {
      (kGrid ? posts + round * ctas : own.values[round])[rank] = value;
    }
  }
  // Until all CTAs have posted.
  __device__ __forceinline__ void await_posts(int round) {
    if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
      while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &own.arrived[round], 0)) {
      }
#endif
    } else {
      barrier();
    }
  }
  // Calls use(value, cta) for the posts of every 32nd CTA from this lane's on; more calls may follow with zeros.
  template <typename Use>
  __device__ __forceinline__ void for_posts(int round, const Use& use) const {
    constexpr int kDeep = kGrid ? 5 : 1;  // loads in flight, for up to 160 CTAs
#pragma unroll 1
    for (int first = threadIdx.x % 32; first < ctas; first += 32 * kDeep) {
      uint4 values[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        const int cta = first + 32 * i;
        values[i] = {0, 0, 0, 0};
        if (cta < ctas) values[i] = kGrid ? __ldcg(posts + round * ctas + cta) : own.values[round][cta];
      }
#pragma unroll
      for (int i = 0; i < kDeep; ++i) use(values[i], first + 32 * i);
    }
  }
};

}  // namespace specvlm
