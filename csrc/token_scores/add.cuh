// Adds the partial scores of all KV heads to the output, in the order of the heads.
#pragma once

#include "common/check.h"
#include "common/launch.h"
#include "common/overlap.cuh"
#include "token_scores/span.cuh"

namespace specvlm {

constexpr int kAddThreads = 256;
constexpr int kAddHeads = 8;  // partial scores in flight per thread

template <bool OVERLAP>
__global__ void __launch_bounds__(kAddThreads) token_scores_add_kernel(const __grid_constant__ TokenScoresParams p) {
  if constexpr (OVERLAP) let_next_launch_start();
  const int request = blockIdx.y, column = blockIdx.x * kAddThreads + threadIdx.x;
  int counted = p.queries;  // |Q|
  if (p.query_mask != nullptr) {
    counted = 0;
    const bool* mask = p.query_mask + request * p.mask_batch_stride;
    for (int first = 0; first < p.queries; first += kAddThreads) {
      const int query = first + static_cast<int>(threadIdx.x);
      counted += __syncthreads_count(query < p.queries && mask[query]);
    }
  }
  const Span span{p};
  const bool seen = counted > 0 && column >= span.first(request) && column < span.end(request);
  float* out = p.out + request * p.out_batch_stride + column;
  const float before = seen ? *out : 0.0f;
  if constexpr (OVERLAP) wait_for_launch_before();  // for the partial scores
  if (!seen) return;

  float sum = 0.0f;
  for (int head = 0; head < p.kv_heads; head += kAddHeads) {
    float part[kAddHeads];
#pragma unroll
    for (int i = 0; i < kAddHeads; ++i)
      part[i] = head + i < p.kv_heads ? __ldcg(partial_scores(p, head + i, request) + column) : 0.0f;
#pragma unroll
    for (int i = 0; i < kAddHeads; ++i) sum += part[i];
  }
  *out = before + sum * (p.weight / (static_cast<float>(p.q_heads) * static_cast<float>(counted)));
}

// OVERLAP: starts while the kernel before it drains, and waits for it; only where that kernel is of sm_90a.
template <bool OVERLAP>
void launch_token_scores_add(const TokenScoresParams& p, cudaStream_t stream) {
  const dim3 grid((p.span_len + kAddThreads - 1) / kAddThreads, p.batch);
  if constexpr (OVERLAP) {
    prepare_kernel<token_scores_add_kernel<OVERLAP>>(0);
    launch_overlapped(token_scores_add_kernel<OVERLAP>, grid, dim3(kAddThreads), 0, stream, p);
  } else {
    token_scores_add_kernel<OVERLAP><<<grid, kAddThreads, 0, stream>>>(p);
    check_cuda(cudaGetLastError(), "token_scores add launch");
  }
}

}  // namespace specvlm
