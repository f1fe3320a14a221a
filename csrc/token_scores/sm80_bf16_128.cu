#include "token_scores/sm80.cuh"

template void specvlm::token_scores_sm80<__nv_bfloat16, 128>(const TokenScoresParams&, const TokenScoresPlan&,
                                                             cudaStream_t);
