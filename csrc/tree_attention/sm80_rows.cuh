// What a warp of the sm_80 kernel does with its 16 rows.
#pragma once

#include <cstdint>

#include "common/ampere.cuh"
#include "common/numeric.cuh"
#include "tree_attention/sm80_loader.cuh"

namespace specvlm {

constexpr float kSlack = 8.0f;  // how far (log2) a score may exceed its row's reference before sums are scaled
constexpr float kMinusInfinity = -__builtin_huge_valf();

// The rows as the fragments of the matrix products hold them: of queries, scores and results this lane has rows lane/4
// (h = 0) and lane/4 + 8 (h = 1).
template <typename T, int D, typename L>
struct WarpRows {
  std::uint32_t q[D / 16][4];
  float acc[D / 8][4];
  float reference[2], sum[2];  // sum < 0: the row has no reference yet

  // Starts on a run of tiles: which rows they are, their queries, and nothing seen.
  __device__ __forceinline__ void begin(const TreeAttentionParams& p, const RowTiles& rows_of, const WalkTile& t,
                                        WarpState& state, int first_row) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < 16) {
      const int row = first_row + lane, node = row / rows_of.group;
      const bool there = row < rows_of.rows && t.row_tile * rows_of.nodes + node < p.nodes;
      state.node[lane] = there ? t.row_tile * rows_of.nodes + node : -1;
      state.q_head[lane] = t.head * rows_of.group + row - node * rows_of.group;
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int node = state.node[lane / 4 + 8 * h];
      const bool live = node >= 0 && node < t.live;
      const T* source = static_cast<const T*>(p.q) + t.request * p.q_strides.batch + node * p.q_strides.token +
                        state.q_head[lane / 4 + 8 * h] * p.q_strides.head + lane % 4 * 2;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        q[step][h] = live ? *reinterpret_cast<const std::uint32_t*>(source + step * 16) : 0;
        q[step][2 + h] = live ? *reinterpret_cast<const std::uint32_t*>(source + step * 16 + 8) : 0;
      }
      reference[h] = 0.0f, sum[h] = -1.0f;
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[j][c] = 0.0f;
  }

  // s = Q K^T for kPart positions. keys: this lane's row for load_matrices, in the first 16 of them.
  __device__ __forceinline__ void multiply_keys(float (&s)[L::kPart / 8][4], std::uint32_t keys) const {
#pragma unroll
    for (int j = 0; j < L::kPart / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[j][c] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int j = 0; j < L::kPart / 8; j += 2) {
        std::uint32_t k[4];
        load_matrices(k, (keys ^ (step * 32)) + j * 8 * L::kRowBytes);
        multiply_add<T>(s[j], q[step], k[0], k[1]);
        multiply_add<T>(s[j + 1], q[step], k[2], k[3]);
      }
    }
  }

  // Scores into weights of V: 2 to the power of their distance to the row's reference. visible: a word a row, whose bit
  // first + i is for score i; or nullptr if the rows see all.
  __device__ __forceinline__ void weigh(float (&s)[L::kPart / 8][4], float scale, const std::uint64_t* visible,
                                        int first) {
    const int lane = threadIdx.x % 32;
    float worst = kMinusInfinity;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < L::kPart / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          s[j][2 * h + c] = fmaf(s[j][2 * h + c], scale, -reference[h]);
          worst = fmaxf(worst, s[j][2 * h + c]);
        }
    if (visible != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto* words = reinterpret_cast<const std::uint32_t*>(visible + lane / 4 + 8 * h);
        const std::uint32_t bits = words[first / 32] >> (first % 32 + lane % 4 * 2);
#pragma unroll
        for (int j = 0; j < L::kPart / 8; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (!(bits >> (8 * j + c) & 1)) s[j][2 * h + c] = kMinusInfinity;
      }
    }
    // References only move when a score is far above its own, which hardly ever happens after the first tile.
    if (__any_sync(~0u, worst > kSlack || visible != nullptr || sum[0] < 0 || sum[1] < 0)) move_references(s);
#pragma unroll
    for (int j = 0; j < L::kPart / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[j][c] = exp2_fast(s[j][c]);
      sum[0] += s[j][0] + s[j][1];
      sum[1] += s[j][2] + s[j][3];
    }
  }

  __device__ __forceinline__ void move_references(float (&s)[L::kPart / 8][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = kMinusInfinity;
#pragma unroll
      for (int j = 0; j < L::kPart / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const bool fresh = sum[h] < 0, none = top == kMinusInfinity;
      const float move = none ? 0.0f : fresh ? top : fmaxf(top, 0.0f);
      const float decay = fresh ? 1.0f : exp2_fast(-move);  // a fresh row has added up nothing but zeros
      sum[h] = fresh ? (none ? -1.0f : 0.0f) : sum[h] * decay;
      reference[h] += move;
#pragma unroll
      for (int j = 0; j < L::kPart / 8; ++j) s[j][2 * h] -= move, s[j][2 * h + 1] -= move;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) acc[j][2 * h] *= decay, acc[j][2 * h + 1] *= decay;
    }
  }

  // acc += P V for kPart positions. values: this lane's row for load_matrices_transposed, in the first 16 of them.
  __device__ __forceinline__ void add_values(const float (&s)[L::kPart / 8][4], std::uint32_t values) {
#pragma unroll
    for (int step = 0; step < L::kPart / 16; ++step) {
      const float (&low)[4] = s[2 * step], (&high)[4] = s[2 * step + 1];
      const std::uint32_t weights[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                                        pack<T>(high[2], high[3])};
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        std::uint32_t v[4];
        load_matrices_transposed(v, (values ^ (j * 16)) + step * 16 * L::kRowBytes);
        multiply_add<T>(acc[j], weights, v[0], v[1]);
        multiply_add<T>(acc[j + 1], weights, v[2], v[3]);
      }
    }
  }

  // The softmax denominator of a row, over the four lanes that share it.
  __device__ __forceinline__ float total(int h) const {
    float all = sum[h] < 0 ? 0.0f : sum[h];
    all += __shfl_xor_sync(~0u, all, 1);
    return all + __shfl_xor_sync(~0u, all, 2);
  }
};

}  // namespace specvlm
