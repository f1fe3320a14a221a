// Launches one dtype and head dim; each is instantiated in a file of its own, so that they compile side by side.
#pragma once

#include <iterator>

#include "common/check.h"
#include "tree_attention/sm90.cuh"

namespace specvlm {

constexpr int kColumns[] = {8, 16, 32, 48, 64, 72, 80, 96, 104};  // packed rows of one warpgroup
constexpr int kMostColumns = 2 * kColumns[std::size(kColumns) - 1];

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

// A tensor of (D, heads, tokens, batch), innermost first, read in boxes of 64 dims.
inline CUtensorMap tensor_map(const char* name, const void* base, const TreeAttentionStrides& strides, HalfType dtype,
                              const cuuint64_t (&sizes)[4], int box_heads, int box_tokens) {
  CUtensorMap map;
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(strides.head) * 2, static_cast<cuuint64_t>(strides.token) * 2,
                              static_cast<cuuint64_t>(strides.batch) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(box_tokens), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const auto type = dtype == HalfType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = tensor_map_encoder()(&map, type, 4, const_cast<void*>(base), sizes, bytes, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_argument(result == CUDA_SUCCESS, name, ": no tensor map for strides (", strides.batch, ", ", strides.token,
                 ", ", strides.head, "): driver error ", static_cast<int>(result));
  return map;
}

inline CUtensorMap cache_map(const char* name, const void* base, const TreeAttentionStrides& strides,
                             const TreeAttentionParams& p) {
  const bool paged = p.page_table != nullptr;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.kv_heads),
                              static_cast<cuuint64_t>(paged ? p.page_size : p.capacity),
                              static_cast<cuuint64_t>(paged ? p.pages : p.batch)};
  return tensor_map(name, base, strides, p.dtype, sizes, 1, paged ? std::min(p.page_size, kTile) : kTile);
}

template <typename T, int D, int COLS>
void launch_tree_attention_sm90(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  RowTiles rows_of{plan.row_tiles, 0, p.q_heads / p.kv_heads, plan.row_tile};
  rows_of.nodes = rows_of.rows / rows_of.group;
  const cuuint64_t q_sizes[] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(p.q_heads),
                                static_cast<cuuint64_t>(p.nodes), static_cast<cuuint64_t>(p.batch)};
  const CUtensorMap q_map = tensor_map("q", p.q, p.q_strides, p.dtype, q_sizes, rows_of.group, rows_of.nodes);
  const CUtensorMap k_map = cache_map("k", p.k, p.k_strides, p), v_map = cache_map("v", p.v, p.v_strides, p);
  int page_shift = kTileShift;
  if (p.page_table != nullptr)
    for (page_shift = 0; 1 << page_shift < p.page_size;) ++page_shift;
  const int shared = AttentionLayout<D, COLS>::bytes(p.batch);
  prepare_kernel<tree_attention_kernel<T, D, COLS>>(shared);
  launch_overlapped(tree_attention_kernel<T, D, COLS>, dim3(plan.ctas), dim3(kAttentionThreads), shared, stream, p,
                    q_map, k_map, v_map, rows_of, page_shift);
  launch_combine_parts<T, D>(p, plan, rows_of, stream);
}

template <typename T, int D, int INDEX = 0>
void dispatch_columns(const TreeAttentionParams& p, const TreeAttentionPlan& plan, cudaStream_t stream) {
  if constexpr (INDEX == std::size(kColumns)) {
    throw std::invalid_argument("plan: made by tree_attention_plan?");
  } else if (2 * kColumns[INDEX] == plan.columns) {
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
