#include "tree_attention/sm90_launch.cuh"

template void specvlm::tree_attention_sm90<__nv_bfloat16, 64>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                              cudaStream_t);
