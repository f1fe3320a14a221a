#include "token_scores/sm90_launch.cuh"

template void specvlm::token_scores_sm90<__nv_bfloat16, 64>(const TokenScoresParams&, const TokenScoresPlan&,
                                                            cudaStream_t);
