// Launches one dtype and head dim; each is instantiated in a file of its own, so that they compile side by side.
#pragma once

#include <iterator>

#include "common/check.h"
#include "tree_attention/combine.cuh"
#include "tree_attention/sm90.cuh"

namespace specvlm {

constexpr int kColumns[] = {8, 16, 32, 48, 64, 72, 80, 96, 104};  // packed rows of one warpgroup

using Encode = decltype(&cuTensorMapEncodeTiled);

inline Encode tensor_map_encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

// A cache [B,S,Hkv,D] read in boxes of 64 positions of one head and 64 of its dims.
inline CUtensorMap cache_map(const void* base, const TreeAttentionStrides& strides, const TreeAttentionParams& p) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.kv_heads),
                              static_cast<cuuint64_t>(p.capacity), static_cast<cuuint64_t>(p.batch)};
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(strides.head) * 2, static_cast<cuuint64_t>(strides.token) * 2,
                              static_cast<cuuint64_t>(strides.batch) * 2};
  const cuuint32_t box[] = {64, 1, kTile, 1}, steps[] = {1, 1, 1, 1};
  const auto type = p.dtype == HalfType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = tensor_map_encoder()(&map, type, 4, const_cast<void*>(base), sizes, bytes, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_argument(result == CUDA_SUCCESS, "k, v: no tensor map for strides (", strides.batch, ", ", strides.token, ", ",
                 strides.head, ") of ", p.capacity, " tokens: driver error ", static_cast<int>(result));
  return map;
}

template <typename T, int D, int COLS>
void launch_tree_attention_sm90(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  const CUtensorMap k_map = cache_map(p.k, p.k_strides, p), v_map = cache_map(p.v, p.v_strides, p);
  const auto kernel = tree_attention_kernel<T, D, COLS>;
  const int shared = AttentionLayout<D, COLS>::bytes(p.batch);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  kernel<<<plan.ctas, kAttentionThreads, shared, stream>>>(p, k_map, v_map, plan.row_tiles);
  check_cuda(cudaGetLastError(), "tree_attention launch");
  launch_tree_attention_combine<T, D>(p, plan, true, stream);
}

template <typename T, int D, int INDEX = 0>
void dispatch_columns(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  if constexpr (INDEX == std::size(kColumns)) {
    throw std::invalid_argument("plan: made by tree_attention_plan?");
  } else if (2 * kColumns[INDEX] == plan.row_tile) {
    launch_tree_attention_sm90<T, D, kColumns[INDEX]>(p, plan, stream);
  } else {
    dispatch_columns<T, D, INDEX + 1>(p, plan, stream);
  }
}

template <typename T, int D>
void tree_attention_sm90(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  dispatch_columns<T, D>(p, plan, stream);
}

}  // namespace specvlm
