// Arithmetic that the attention kernels share: packing to 16 bits, exponentials.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace specvlm {

template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x for x up to 127 without the exponential unit, which takes a warp 8 cycles: 2^round(x) by the exponent bits, the
// rest by a polynomial (minimax on [-0.5, 0.5] with value 1 at 0: relative error 3e-6). Exactly 0 from -127 down.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its ulp is 1, so that adding it rounds to an integer
  float clamped;
  asm("max.NaN.f32 %0, %1, 0fC2FE0000;" : "=f"(clamped) : "f"(x));  // -127
  const float shifted = clamped + kRound, rest = clamped - (shifted - kRound);
  float value = fmaf(0.00958286f, rest, 0.05590643f);
  value = fmaf(value, rest, 0.24024099f);
  value = fmaf(value, rest, 0.69312419f);
  value = fmaf(value, rest, 1.0f);
  return __int_as_float(__float_as_int(value) + (__float_as_int(shifted) << 23));
}

}  // namespace specvlm
