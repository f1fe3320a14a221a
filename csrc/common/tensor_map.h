// Host side of TMA: tensor maps of 16-bit tensors, read in boxes with 128-byte swizzled rows.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <stdexcept>

#include "common/check.h"

namespace specvlm {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, without linking libcuda.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTensorMap>(function);
  }();
  return encode;
}

struct TensorMapDim {
  std::int64_t size;
  std::int64_t stride;  // in elements
  int box;
};

// A tensor [dims[2], dims[1], dims[0], head_dim] with a contiguous last dim, in boxes that are 64 elements wide.
inline CUtensorMap half_tensor_map(const char* name, const void* base, bool bf16, int head_dim,
                                   const TensorMapDim (&dims)[3]) {
  cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim)}, strides[3];
  cuuint32_t box[4] = {64};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = static_cast<cuuint64_t>(dims[i].size);
    // the stride of a dim of size 1 is never used, and may be anything
    strides[i] = static_cast<cuuint64_t>(dims[i].size == 1 ? head_dim : dims[i].stride) * 2;
    box[i + 1] = static_cast<cuuint32_t>(dims[i].box);
  }
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(base),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_argument(result == CUDA_SUCCESS, name, ": no tensor map for sizes (", dims[2].size, ", ", dims[1].size, ", ",
                 dims[0].size, ", ", head_dim, ") and strides (", dims[2].stride, ", ", dims[1].stride, ", ",
                 dims[0].stride, ", 1): driver error ", static_cast<int>(result));
  return map;
}

}  // namespace specvlm
