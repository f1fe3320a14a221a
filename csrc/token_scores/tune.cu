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
  try_shapes<128, 2, 0, 128, 2, 2, 128, 2, 3, 96, 2, 0, 96, 2, 2, 96, 2, 3, 80, 2, 0, 80, 2, 2, 80, 2, 3,  //
             64, 2, 0, 64, 2, 2, 64, 2, 3, 80, 3, 2, 64, 3, 0, 64, 3, 1, 64, 3, 2, 48, 3, 0, 48, 3, 1, 48, 3, 2>(
      p, plan, stream);
}

}  // namespace specvlm
