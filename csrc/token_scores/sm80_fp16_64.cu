#include "token_scores/sm80.cuh"

template void specvlm::token_scores_sm80<__half, 64>(const TokenScoresParams&, const TokenScoresPlan&, cudaStream_t);
