// How results leave the sm_80 kernel.
#pragma once

#include <cstdint>

#include "common/numeric.cuh"
#include "tree_attention/sm80_combine.cuh"
#include "tree_attention/sm80_rows.cuh"

namespace specvlm {

// Where one row's result goes: to the output if this CTA had all of the item, else to the workspace.
template <typename T, int D>
struct RowTarget {
  T* out;       // or nullptr
  float* part;  // or nullptr
  float* lse;   // of the output (natural log, may be nullptr) or of the part (log2)

  __device__ __forceinline__ RowTarget(const TreeAttentionParams& p, const Sm80Parts<D>& parts, const WalkTile& t,
                                       int node, int q_head, int row) {
    if (t.begin == 0 && (t.index + 1) * kTile >= t.end) {
      out = static_cast<T*>(p.out) + t.request * p.out_strides.batch + node * p.out_strides.token +
            q_head * p.out_strides.head;
      part = nullptr;
      lse = p.lse == nullptr ? nullptr
                             : p.lse + (static_cast<std::int64_t>(t.request) * p.nodes + node) * p.q_heads + q_head;
    } else {
      const std::int64_t index = parts.index(blockIdx.x, t.begin == 0, row);
      out = nullptr;
      part = parts.result(index);
      lse = parts.log2_sum(index);
    }
  }

  __device__ __forceinline__ void store_lse(float log2_sum) const {
    if (part != nullptr)
      *lse = log2_sum;
    else if (lse != nullptr)
      *lse = log2_sum * 0.6931471805599453f;
  }

  __device__ __forceinline__ void store(int d, float v0, float v1) const {
    if (part != nullptr)
      *reinterpret_cast<float2*>(part + d) = make_float2(v0, v1);
    else
      *reinterpret_cast<std::uint32_t*>(out + d) = pack<T>(v0, v1);
  }

  __device__ __forceinline__ void store(int d, float4 v) const {
    if (part != nullptr)
      *reinterpret_cast<float4*>(part + d) = v;
    else
      *reinterpret_cast<uint2*>(out + d) = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w));
  }
};

// Writes rows that one warp has all positions of.
template <typename T, int D, typename L>
__device__ __forceinline__ void store_rows(const TreeAttentionParams& p, const Sm80Parts<D>& parts,
                                           const WarpState& state, const WalkTile& t, const WarpRows<T, D, L>& rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = rows.total(h);
    const int row = lane / 4 + 8 * h, node = state.node[row];
    const bool seen = node < t.live && total != 0.0f;  // NaN is seen
    const float inverse = 1.0f / total;
    if (node >= 0) {
      const RowTarget<T, D> target(p, parts, t, node, state.q_head[row], warp * 16 + row);
      if (lane % 4 == 0) target.store_lse(seen ? rows.reference[h] + log2f(total) : kMinusInfinity);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        target.store(j * 8 + lane % 4 * 2, seen ? rows.acc[j][2 * h] * inverse : 0.0f,
                     seen ? rows.acc[j][2 * h + 1] * inverse : 0.0f);
    }
  }
}

// Writes rows whose positions several warps share: adds their results in the order of the positions, 32 dims at a time.
template <typename T, int D, typename L>
__device__ __forceinline__ void merge_and_store_rows(const TreeAttentionParams& p, const Sm80Parts<D>& parts,
                                                     WarpState* states, const WalkTile& t,
                                                     const WarpRows<T, D, L>& rows, float* merge) {
  constexpr int kWarpsM = L::kShape.warps_m, kWarpsN = L::kShape.warps_n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = rows.total(h);
    if (lane % 4 == 0) {
      states[warp].reference[lane / 4 + 8 * h] = rows.reference[h];
      states[warp].total[lane / 4 + 8 * h] = total;
    }
  }
  __syncthreads();

  // of a row: the highest reference, and the total relative to it
  auto whole_of = [&](int row) {
    float2 whole = make_float2(kMinusInfinity, 0.0f);
#pragma unroll
    for (int n = 0; n < kWarpsN; ++n) {
      const WarpState& state = states[n * kWarpsM + row / 16];
      if (state.total[row % 16] != 0.0f) whole.x = fmaxf(whole.x, state.reference[row % 16]);
    }
#pragma unroll
    for (int n = 0; n < kWarpsN; ++n) {
      const WarpState& state = states[n * kWarpsM + row / 16];
      if (state.total[row % 16] != 0.0f)
        whole.y += state.total[row % 16] * exp2_fast(state.reference[row % 16] - whole.x);
    }
    return whole;
  };
  float weight[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float top = whole_of(warp % kWarpsM * 16 + lane / 4 + 8 * h).x;
    weight[h] = states[warp].total[lane / 4 + 8 * h] != 0.0f ? exp2_fast(rows.reference[h] - top) : 0.0f;
  }

#pragma unroll
  for (int d = 0; d < D; d += 32) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* value = &rows.acc[d / 8 + j][2 * h];
        const int column = (j ^ (lane / 4 % 4)) * 8 + lane % 4 * 2;  // 8 dims at j ^ (row % 4): no bank conflicts
        *reinterpret_cast<float2*>(merge + (warp * 16 + lane / 4 + 8 * h) * 32 + column) =
            weight[h] != 0.0f ? make_float2(value[0] * weight[h], value[1] * weight[h]) : make_float2(0.0f, 0.0f);
      }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < L::kRows * 8; i += L::kThreads) {
      const int row = i / 8, quad = i % 8, node = states[row / 16].node[row % 16];
      if (node < 0) continue;
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int n = 0; n < kWarpsN; ++n) {
        const int column = (quad / 2 ^ (row % 4)) * 8 + quad % 2 * 4;
        const float4 part = *reinterpret_cast<const float4*>(merge + (n * L::kRows + row) * 32 + column);
        v = make_float4(v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w);
      }
      const float2 whole = whole_of(row);
      const bool seen = node < t.live && whole.y != 0.0f;  // NaN is seen
      const float inverse = 1.0f / whole.y;
      const RowTarget<T, D> target(p, parts, t, node, states[row / 16].q_head[row % 16], row);
      if (d == 0 && quad == 0) target.store_lse(seen ? whole.x + log2f(whole.y) : kMinusInfinity);
      target.store(d + quad * 4, seen ? make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse)
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    __syncthreads();
  }
}

}  // namespace specvlm
