// Other tile shapes for benchmarks, built with -DSPECVLM_TUNE=ON and chosen with the environment variable
// SPECVLM_TOKEN_SCORES=columns,warpgroups,polynomial, such as 64,3,1; bf16 with D = 128 alone.
#include "token_scores/sm90_launch.cuh"

namespace specvlm {
namespace {

template <int N, int WARPGROUPS, int POLYNOMIAL, int... MORE>
void try_shapes(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  if (plan.columns == N && plan.warpgroups == WARPGROUPS && plan.polynomial == POLYNOMIAL)
    launch_token_scores_sm90<__nv_bfloat16, 128, N, WARPGROUPS, POLYNOMIAL>(p, plan, stream);
  else if constexpr (sizeof...(MORE) > 0)
    try_shapes<MORE...>(p, plan, stream);
  else
    check_argument(false, "SPECVLM_TOKEN_SCORES: ", plan.columns, ",", plan.warpgroups, ",", plan.polynomial,
                   " is not in tune.cu");
}

}  // namespace

void tune_token_scores_sm90(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  check_argument(p.dtype == HalfType::kBFloat16 && p.head_dim == 128,
                 "SPECVLM_TOKEN_SCORES: tune.cu has bf16 with D = 128 alone");
  try_shapes<128, 2, 1, 96, 2, 1, 80, 2, 1, 64, 2, 1, 96, 3, 0, 80, 3, 0, 80, 3, 1, 64, 3, 0, 48, 3, 0, 32, 3, 0>(
      p, plan, stream);
}

}  // namespace specvlm
