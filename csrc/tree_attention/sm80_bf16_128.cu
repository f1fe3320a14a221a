#include "tree_attention/sm80_launch.cuh"

template void specvlm::tree_attention_sm80<__nv_bfloat16, 128>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                               cudaStream_t);
