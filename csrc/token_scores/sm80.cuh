// token_scores for sm_80 and everything newer: the same product S^T = K Q^T with mma.sync.
//
// A CTA takes 128 positions of one head, 32 a warp, and keeps their keys in registers; all packed rows (query, head of
// the group) pass by in blocks through two buffers in shared memory. Keys are copied position by position, so pages of
// any size will do.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ampere.cuh"
#include "common/check.h"
#include "common/numeric.cuh"
#include "token_scores/add.cuh"

namespace specvlm {

constexpr int kSm80Threads = 128;
constexpr int kSm80Positions = 128;  // of a CTA; twice the keys a warp, so that shared memory keeps up with mma.sync
constexpr int kSm80Rows = 64;        // packed rows of a block

template <typename T, int D>
__global__ void __launch_bounds__(kSm80Threads) token_scores_sm80_kernel(const __grid_constant__ TokenScoresParams p) {
  constexpr int kRowBytes = D * 2, kBlockBytes = kSm80Rows * kRowBytes, kTiles = kSm80Rows / 8;
  __shared__ __align__(1024) char shared[2 * kBlockBytes];  // first the keys, then two blocks of Q
  __shared__ float lse_shared[2][kSm80Rows];
  const int request = blockIdx.z, head = blockIdx.y, first_column = blockIdx.x * kSm80Positions;
  const Span span{p};
  if (first_column >= span.end(request)) return;
  const int first_position = span.start(request) + first_column, context = span.clamped(p.kv_lens[request]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.q_heads / p.kv_heads, rows = p.queries * group;
  const std::uint32_t address = shared_address(shared);

  // two threads copy a row, so that each 32-byte sector is read at once; its 16-byte chunks are swizzled
  const int copy_row = threadIdx.x / 2;
  auto copy = [&](int row, const void* source, bool there) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int chunk = 2 * i + static_cast<int>(threadIdx.x) % 2;
      copy_async(address + row * kRowBytes + (chunk ^ row % 8) * 16, static_cast<const T*>(source) + chunk * 8,
                 there ? 16 : 0);
    }
  };
  for (int row = copy_row; row < kSm80Positions; row += kSm80Threads / 2) {
    const int position = first_position + row;
    const bool there = position >= 0 && position < p.capacity;
    std::int64_t offset = head * p.k_strides.head;
    if (there && p.page_table == nullptr) {
      offset += request * p.k_strides.batch + position * p.k_strides.token;
    } else if (there) {
      const int entry = p.page_table[request * p.page_table_stride + position / p.page_size];
      offset += min(max(entry, 0), p.pages - 1) * p.k_strides.batch + position % p.page_size * p.k_strides.token;
    }
    copy(row, static_cast<const T*>(p.k) + offset, there);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  // ldmatrix: this lane's row of four 8x8 matrices
  std::uint32_t keys[2][D / 16][4];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      load_matrices(keys[m][step],
                    address + (warp * 32 + m * 16 + lane % 16) * kRowBytes + ((2 * step + lane / 16) ^ lane % 8) * 16);
  __syncthreads();

  const float scale = log2_scale(p);
  auto row_lse = [&](int row) { return minus_lse(p, request, row / group, head * group + row % group); };
  auto copy_block = [&](int block, float lse) {  // rows that do not count become 0: they may hold NaN
    const int row = block * kSm80Rows + copy_row;
    const bool there = !isinf(lse);
    const std::int64_t offset = there ? request * p.q_strides.batch + row / group * p.q_strides.token +
                                            (head * group + row % group) * p.q_strides.head
                                      : 0;
    copy(block % 2 * kSm80Rows + copy_row, static_cast<const T*>(p.q) + offset, there);
    copy_async_commit();
    if (threadIdx.x % 2 == 0) lse_shared[block % 2][copy_row] = lse;
  };

  int hidden[2][2];  // rows below it do not see the position
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int position = first_position + warp * 32 + i / 2 * 16 + i % 2 * 8 + lane / 4;
    hidden[i / 2][i % 2] = min(max(position - context, 0), p.queries) * group;
  }
  const bool masked = first_position + kSm80Positions - 1 > context;  // not all queries see all positions
  float sums[2][2] = {};
  auto add_block = [&](auto with_mask, int block) {
    const std::uint32_t q_address = address + block % 2 * kBlockBytes;
    float acc[2][kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        std::uint32_t q[4];  // 16 rows by 16 dims
        load_matrices(q, q_address + (n * 8 + lane / 16 * 8 + lane % 8) * kRowBytes +
                             ((2 * step + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(acc[m][n], keys[m][step], q[0], q[1]);
          multiply_add<T>(acc[m][n + 1], keys[m][step], q[2], q[3]);
        }
      }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = n * 8 + lane % 4 * 2, row = block * kSm80Rows + column;
      const float2 minus = *reinterpret_cast<const float2*>(&lse_shared[block % 2][column]);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float share[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float x = fmaf(acc[m][n][2 * i + j], scale, j == 0 ? minus.x : minus.y);
            if constexpr (with_mask.value) x = row + j < hidden[m][i] ? __int_as_float(0xff800000) : x;
            share[j] = exp2_fast(x);
          }
          sums[m][i] += share[0] + share[1];
        }
    }
  };

  const int blocks = (rows + kSm80Rows - 1) / kSm80Rows;
  copy_block(0, row_lse(copy_row));
  float next_lse = row_lse(kSm80Rows + copy_row);  // a block ahead of its rows: they wait for it
  for (int block = 0; block < blocks; ++block) {
    copy_async_wait<0>();
    __syncthreads();  // the block is there, and the other buffer is free
    if (block + 1 < blocks) copy_block(block + 1, next_lse);
    next_lse = row_lse((block + 2) * kSm80Rows + copy_row);
    if (masked)
      add_block(std::true_type{}, block);
    else
      add_block(std::false_type{}, block);
  }

  float* partial = partial_scores(p, head, request);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = sums[i / 2][i % 2];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int column = first_column + warp * 32 + i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (lane % 4 == 0 && column < p.span_len) partial[column] = sum;
  }
}

template <typename T, int D>
void token_scores_sm80(const TokenScoresParams& p, const TokenScoresPlan&, cudaStream_t stream) {
  const dim3 grid((p.span_len + kSm80Positions - 1) / kSm80Positions, p.kv_heads, p.batch);
  token_scores_sm80_kernel<T, D><<<grid, kSm80Threads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "token_scores launch");
  launch_token_scores_add<false>(p, stream);
}

}  // namespace specvlm
