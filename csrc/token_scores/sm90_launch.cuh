// Launches one dtype and head dim; each is instantiated in a file of its own, so that they compile side by side.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/tensor_map.h"
#include "token_scores/add.cuh"
#include "token_scores/sm90.cuh"

namespace specvlm {

// What is built in: columns of a block, and warpgroups. Two warpgroups leave 232 registers a thread: room for two
// blocks of 128 columns and the keys; three leave 160, which is enough for 80 columns, and hide more latency. Every so
// many exponentials of 8 go to the FMA units, where the products take half as long as the exponentials.
struct ScoreShape {
  int columns, warpgroups;
};
constexpr ScoreShape kScoreShapes[] = {{128, 2}, {96, 2}, {80, 3}, {64, 2}, {48, 2}, {32, 2}, {16, 2}};
constexpr int score_polynomial(int head_dim) { return head_dim == 64 ? 2 : 0; }

template <typename T, int D, int N, int WARPGROUPS, int POLYNOMIAL>
void launch_token_scores_sm90(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  const bool bf16 = p.dtype == HalfType::kBFloat16;
  const int group = p.q_heads / p.kv_heads;
  const CUtensorMap q_map = half_tensor_map("q", p.q, bf16, D,
                                            {{p.q_heads, p.q_strides.head, group},
                                             {p.queries, p.q_strides.token, plan.chunk_queries},
                                             {p.batch, p.q_strides.batch, 1}});
  const bool paged = p.page_table != nullptr;
  const CUtensorMap k_map =
      half_tensor_map("k", p.k, bf16, D,
                      {{p.kv_heads, p.k_strides.head, 1},
                       {paged ? p.page_size : p.capacity, p.k_strides.token, paged ? std::min(p.page_size, 64) : 64},
                       {paged ? p.pages : p.batch, p.k_strides.batch, 1}});
  const int shared = scores_layout(D, plan.rows, plan.stages, p.batch).bytes;
  prepare_kernel<token_scores_kernel<T, D, N, WARPGROUPS, POLYNOMIAL>>(shared);
  launch_overlapped(token_scores_kernel<T, D, N, WARPGROUPS, POLYNOMIAL>, dim3(plan.ctas), dim3((WARPGROUPS + 1) * 128),
                    shared, stream, p, plan, q_map, k_map);
  launch_token_scores_add<true>(p, stream);
}

template <typename T, int D, int INDEX = 0>
void token_scores_sm90(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  if constexpr (INDEX == std::size(kScoreShapes)) {
    throw std::invalid_argument("plan: made by token_scores_plan?");
  } else if (kScoreShapes[INDEX].columns == plan.columns) {
    constexpr ScoreShape kShape = kScoreShapes[INDEX];
    launch_token_scores_sm90<T, D, kShape.columns, kShape.warpgroups, score_polynomial(D)>(p, plan, stream);
  } else {
    token_scores_sm90<T, D, INDEX + 1>(p, plan, stream);
  }
}

}  // namespace specvlm
