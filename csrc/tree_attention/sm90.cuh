// Tree attention for Hopper with swapped operands: S^T = K Q^T, O^T += V^T P^T.
//
// The cache fills the 64-row side of wgmma, the packed query rows (node, head of the group) its free side in steps of
// 8, so 208 rows cost 208 and K/V are read once for all of them. A CTA is a producer warp (TMA, a ring of K/V tiles)
// and two warpgroups, each with half of the rows and its own softmax state: one multiplies while the other takes
// exponentials. The tiles of all requests and heads form one line that is cut evenly among the CTAs; a head that
// ends up in several of them is put together by the combine kernel, in a fixed order.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "common/numeric.cuh"
#include "tree_attention/schedule.cuh"

namespace specvlm {

constexpr int kWarpgroup = 128;
constexpr int kAttentionThreads = 3 * kWarpgroup;
constexpr float kLag = 8.0f;  // how far (log2) a score may exceed the running reference before rescaling

template <int D, int COLS>
struct AttentionLayout {
  static constexpr int kRows = 2 * COLS;  // packed rows of the CTA
  static constexpr int kHalves = D / 64;  // 128-byte wide parts of a row
  static constexpr int kTileBytes = kHalves * kTile * 128;
  static constexpr int kStages = D == 128 ? 4 : 6;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kHalves * kRows * 128;
  static constexpr int kV = kK + kStages * kTileBytes;
  static constexpr int kP = kV + kStages * kTileBytes;
  static constexpr int kMask = kP + 2 * COLS * 128;
  static constexpr int kReduce = kMask + kRows * 8;
  static constexpr int kBarriers = kReduce + 2 * 4 * COLS * 4;
  static constexpr int kPrefix = kBarriers + 3 * kStages * 8;
  static constexpr int bytes(int batch) { return kPrefix + (batch + 1) * 4 + 1024; }  // 1024: to align the base
};

// The largest of each column among a warp's 16 positions, into reduce[warp][column].
template <int COLS>
__device__ __forceinline__ void column_max(const float (&x)[COLS / 2], float* reduce) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < COLS / 4; ++c) {
    float best = fmaxf(x[c / 2 * 4 + c % 2], x[c / 2 * 4 + 2 + c % 2]);
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 4));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 8));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 16));
    if (lane < 4) reduce[warp * COLS + c / 2 * 8 + lane * 2 + c % 2] = best;
  }
}

// Read anew where it is needed: kept in registers through the main loop it would cost a spill.
__device__ __forceinline__ int this_cta() {
  int cta;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
  return cta;
}

template <typename T, int D, int COLS>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    tree_attention_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, int row_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma and setmaxnreg are there on sm_90a alone
  using L = AttentionLayout<D, COLS>;
  extern __shared__ char raw_shared[];
  char* shared = raw_shared + (1024 - shared_address(raw_shared) % 1024) % 1024;
  auto* full_k = reinterpret_cast<std::uint64_t*>(shared + L::kBarriers);
  auto* full_v = full_k + L::kStages;
  auto* empty = full_v + L::kStages;
  int* prefix = reinterpret_cast<int*>(shared + L::kPrefix);
  const TileLine line{p, L::kRows, row_tiles};

  if (threadIdx.x < 32) {  // tiles before each request: a scan over the batch
    int before = 0;
    for (int first = 0; first < p.batch; first += 32) {
      const int request = first + threadIdx.x;
      int sum = request < p.batch ? p.kv_heads * line.tiles_per_head(request) : 0;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (static_cast<int>(threadIdx.x) >= step) sum += other;
      }
      if (request < p.batch) prefix[request + 1] = before + sum;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) prefix[0] = 0;
  }
  if (threadIdx.x == kWarpgroup * 2) {
    for (int s = 0; s < L::kStages; ++s) {
      ptx::mbarrier_init(full_k + s, 1);
      ptx::mbarrier_init(full_v + s, 1);
      ptx::mbarrier_init(empty + s, 8);  // every consumer warp says that it is done with the stage
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;\n");

  const int cta = blockIdx.x, total = prefix[p.batch], ctas = working_ctas(gridDim.x, total);
  if (cta >= ctas) return;
  const int first = first_tile_of(cta, ctas, total), limit = first_tile_of(cta + 1, ctas, total);

  if (threadIdx.x >= 2 * kWarpgroup) {
    // ---- producer
    give_registers<24>();
    if (threadIdx.x != 2 * kWarpgroup) return;
    int stage = 0;
    std::uint32_t phase = 1;  // the ring starts empty
    for (int tile = first; tile < limit;) {
      const Segment s = segment_at(line, prefix, tile, limit);
      for (int t = s.begin; t < s.end; ++t) {
        wait_for_phase(empty + stage, phase);
        char* k_stage = shared + L::kK + stage * L::kTileBytes;
        char* v_stage = shared + L::kV + stage * L::kTileBytes;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full_k + stage,
                                       L::kTileBytes);
        for (int h = 0; h < L::kHalves; ++h)
          load_box(k_stage + h * kTile * 128, &k_map, h * 64, s.head, t * kTile, s.request, full_k + stage);
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full_v + stage,
                                       L::kTileBytes);
        for (int h = 0; h < L::kHalves; ++h)
          load_box(v_stage + h * kTile * 128, &v_map, h * 64, s.head, t * kTile, s.request, full_v + stage);
        if (++stage == L::kStages) stage = 0, phase ^= 1;
      }
      tile += s.end - s.begin;
    }
    return;
  }

  // ---- consumers
  take_registers<240>();
  // the shuffles tell the compiler that a warp agrees on these, so that they live in uniform registers
  const int group_of_warps = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32, barrier = 1 + group_of_warps;
  const int group = p.q_heads / p.kv_heads;
  const float scale = p.scale * 1.4426950408889634f;  // scores in log2
  char* q_shared = shared + L::kQ + group_of_warps * COLS * 128;
  char* p_shared = shared + L::kP + group_of_warps * COLS * 128;
  auto* mask_shared = reinterpret_cast<std::uint64_t*>(shared + L::kMask) + group_of_warps * COLS;
  auto* reduce = reinterpret_cast<float*>(shared + L::kReduce) + group_of_warps * 4 * COLS;
  const std::uint32_t q_address = shared_address(q_shared), p_address = shared_address(p_shared);
  const std::uint32_t k_address = shared_address(shared + L::kK), v_address = shared_address(shared + L::kV);
  // where this lane's row of a transposed 8x8 matrix goes: rows are columns of the CTA, 16-byte chunks are positions
  const int matrix = lane / 8, matrix_row = lane % 8;
  const std::uint32_t p_lane =
      p_address + (matrix / 2 * 8 + matrix_row) * 128 + (((2 * warp + matrix % 2) ^ matrix_row) * 16);

  // The warpgroups take turns at the tensor cores, so that one multiplies while the other takes exponentials.
  const int my_turn = 3 + group_of_warps, other_turn = 4 - group_of_warps;
  if (group_of_warps == 1) named_barrier_arrive(other_turn, 2 * kWarpgroup);

  int stage = 0;
  std::uint32_t phase = 0;
  for (int tile = first; tile < limit;) {
    Segment s = segment_at(line, prefix, tile, limit);
    for (int* field : {&s.request, &s.head, &s.row_tile, &s.begin, &s.end, &s.item_tiles})
      *field = __shfl_sync(~0u, *field, 0);
    const int end = __shfl_sync(~0u, line.end(s.request, s.row_tile), 0);
    const int unmasked = __shfl_sync(~0u, line.unmasked(s.request, s.row_tile), 0);
    const int first_row = s.row_tile * L::kRows + group_of_warps * COLS;  // of this warpgroup
    const int all_rows = p.nodes * group;

    for (int i = thread; i < COLS * (D / 8); i += kWarpgroup) {
      const int n = i / (D / 8), chunk = i % (D / 8), row = first_row + n;
      uint4 data = make_uint4(0, 0, 0, 0);
      if (row < all_rows) {
        const T* source = static_cast<const T*>(p.q) + s.request * p.q_strides.batch +
                          static_cast<std::int64_t>(row / group) * p.q_strides.token +
                          static_cast<std::int64_t>(s.head * group + row % group) * p.q_strides.head;
        data = reinterpret_cast<const uint4*>(source)[chunk];
      }
      *reinterpret_cast<uint4*>(q_shared + chunk / 8 * (L::kRows * 128) + n * 128 + ((chunk % 8) ^ (n % 8)) * 16) =
          data;
    }
    ptx::fence_proxy_async(ptx::space_shared);
    named_barrier(barrier, kWarpgroup);

    float scores[COLS / 2];
    float acc[L::kHalves][COLS / 2];
    float reference[COLS / 4], sum[COLS / 4];  // sum < 0: this column has no reference yet
#pragma unroll
    for (int c = 0; c < COLS / 4; ++c) reference[c] = 0.0f, sum[c] = -1.0f;
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h)
#pragma unroll
      for (int i = 0; i < COLS / 2; ++i) acc[h][i] = 0.0f;

    auto multiply_keys = [&](int at) {
      std::uint32_t q_base = q_address, k_base = k_address + at * L::kTileBytes;
      asm volatile("" : "+r"(q_base));  // or eight descriptors of Q would be kept in registers, and others spilled
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        const std::uint32_t k_part = k_base + step / 4 * (kTile * 128) + step % 4 * 32;
        const std::uint32_t q_part = q_base + step / 4 * (L::kRows * 128) + step % 4 * 32;
        Wgmma<T, COLS, 0, 0>::run(scores, swizzled_descriptor(k_part), swizzled_descriptor(q_part), step != 0);
      }
    };

    wait_for_phase(full_k + stage, phase);
    named_barrier(my_turn, 2 * kWarpgroup);
    wgmma_keep(scores);
    wgmma_fence();
    multiply_keys(stage);
    wgmma_commit();
    named_barrier_arrive(other_turn, 2 * kWarpgroup);
    wgmma_wait();
    wgmma_keep(scores);

    for (int t = s.begin; t < s.end; ++t) {
      const int base = t * kTile;
      const bool masked = base + kTile > unmasked;
      if (masked) {
        if (thread < COLS)
          mask_shared[thread] = visible_bits(p, s.request, (first_row + thread) / group, line.context(s.request),
                                             line.live(s.request), base);
        named_barrier(barrier, kWarpgroup);
#pragma unroll
        for (int c = 0; c < COLS / 4; ++c) {
          const std::uint64_t bits = mask_shared[c / 2 * 8 + lane % 4 * 2 + c % 2] >> (warp * 16 + lane / 4);
          if (!(bits & 1)) scores[c / 2 * 4 + c % 2] = __int_as_float(0xff800000);
          if (!(bits >> 8 & 1)) scores[c / 2 * 4 + 2 + c % 2] = __int_as_float(0xff800000);
        }
      }
      float worst = -1.0f;
#pragma unroll
      for (int i = 0; i < COLS / 2; ++i) {
        scores[i] = fmaf(scores[i], scale, -reference[i / 4 * 2 + i % 2]);
        worst = fmaxf(worst, scores[i]);
      }
      // References only move when a score is far above its own, which hardly ever happens after the first tile.
      if (named_barrier_any(barrier, kWarpgroup, worst > kLag || masked || t == s.begin)) {
        column_max<COLS>(scores, reduce);
        named_barrier(barrier, kWarpgroup);
#pragma unroll
        for (int c = 0; c < COLS / 4; ++c) {
          const float* column = reduce + c / 2 * 8 + lane % 4 * 2 + c % 2;
          const float top = fmaxf(fmaxf(column[0], column[COLS]), fmaxf(column[2 * COLS], column[3 * COLS]));
          const bool fresh = sum[c] < 0, empty_column = top == __int_as_float(0xff800000);
          const float move = empty_column ? 0.0f : fresh ? top : fmaxf(top, 0.0f);
          const float decay = fresh ? 1.0f : exp2_fast(-move);  // a fresh column has accumulated nothing but zeros
          sum[c] = fresh ? (empty_column ? -1.0f : 0.0f) : sum[c] * decay;
          reference[c] += move;
          scores[c / 2 * 4 + c % 2] -= move;
          scores[c / 2 * 4 + 2 + c % 2] -= move;
#pragma unroll
          for (int h = 0; h < L::kHalves; ++h) {
            acc[h][c / 2 * 4 + c % 2] *= decay;
            acc[h][c / 2 * 4 + 2 + c % 2] *= decay;
          }
        }
        named_barrier(barrier, kWarpgroup);  // `reduce` is free again
      }
#pragma unroll
      for (int i = 0; i < COLS / 2; ++i) scores[i] = exp2_fast(scores[i]);
#pragma unroll
      for (int c = 0; c < COLS / 4; ++c) sum[c] += scores[c / 2 * 4 + c % 2] + scores[c / 2 * 4 + 2 + c % 2];
#pragma unroll
      for (int i = 0; i + 1 < COLS / 8; i += 2)
        store_matrices_transposed(
            p_lane + i * 1024, pack<T>(scores[4 * i], scores[4 * i + 1]), pack<T>(scores[4 * i + 2], scores[4 * i + 3]),
            pack<T>(scores[4 * i + 4], scores[4 * i + 5]), pack<T>(scores[4 * i + 6], scores[4 * i + 7]));
      if constexpr (COLS / 8 % 2 == 1) {
        constexpr int i = COLS / 8 - 1;
        store_matrices_transposed(p_lane + i * 1024, pack<T>(scores[4 * i], scores[4 * i + 1]),
                                  pack<T>(scores[4 * i + 2], scores[4 * i + 3]));
      }

      wait_for_phase(full_v + stage, phase);
      if (base + kTile > end) {  // what lies past the tree may be NaN, and 0 * NaN would spread
        char* v_stage = shared + L::kV + stage * L::kTileBytes;
        for (int i = thread; i < L::kHalves * kTile * 8; i += kWarpgroup)
          if (base + i / 8 % kTile >= end) reinterpret_cast<uint4*>(v_stage)[i] = make_uint4(0, 0, 0, 0);
      }
      ptx::fence_proxy_async(ptx::space_shared);
      named_barrier(barrier, kWarpgroup);
      named_barrier(my_turn, 2 * kWarpgroup);

#pragma unroll
      for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
      wgmma_fence();
      std::uint32_t p_base = p_address;
      asm volatile("" : "+r"(p_base));
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step) {
        const std::uint64_t p_part = swizzled_descriptor(p_base + step * 32);
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h) {
          const std::uint32_t v_part = v_address + stage * L::kTileBytes + h * (kTile * 128) + step * 2048;
          Wgmma<T, COLS, 1, 0>::run(acc[h], swizzled_descriptor(v_part), p_part, 1);
        }
      }
      const int used = stage;
      if (++stage == L::kStages) stage = 0, phase ^= 1;
      if (t + 1 < s.end) {
        wait_for_phase(full_k + stage, phase);
        wgmma_keep(scores);
        wgmma_fence();
        multiply_keys(stage);
      }
      wgmma_commit();
      named_barrier_arrive(other_turn, 2 * kWarpgroup);
      wgmma_wait();
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
      wgmma_keep(scores);
      if (lane == 0) ptx::mbarrier_arrive(empty + used);
    }

    // sums over the 8 lanes and 4 warps that share a column, in a fixed order
#pragma unroll
    for (int c = 0; c < COLS / 4; ++c) {
      float part = fmaxf(sum[c], 0.0f);
      part += __shfl_xor_sync(~0u, part, 4);
      part += __shfl_xor_sync(~0u, part, 8);
      part += __shfl_xor_sync(~0u, part, 16);
      if (lane < 4) reduce[warp * COLS + c / 2 * 8 + lane * 2 + c % 2] = part;
    }
    named_barrier(barrier, kWarpgroup);

    const int live = line.live(s.request);
    const bool whole = s.begin == 0 && s.end == s.item_tiles;
    const int slot = 2 * this_cta() + (tile == first_tile_of(this_cta(), ctas, total) ? 0 : 1);
    float* part_out = p.workspace + static_cast<std::int64_t>(slot) * L::kRows * D;
    float* part_lse = p.workspace + static_cast<std::int64_t>(2 * gridDim.x) * L::kRows * D + slot * L::kRows;
#pragma unroll
    for (int c = 0; c < COLS / 4; ++c) {
      const int n = c / 2 * 8 + lane % 4 * 2 + c % 2, row = first_row + n, node = row / group;
      const float total_sum = (reduce[n] + reduce[COLS + n]) + (reduce[2 * COLS + n] + reduce[3 * COLS + n]);
      const bool seen = node < live && total_sum > 0.0f;
      const float inverse = seen ? 1.0f / total_sum : 0.0f;
      const float lse = seen ? reference[c] + log2f(total_sum) : __int_as_float(0xff800000);
      if (row >= all_rows) continue;
      const int q_head = s.head * group + row % group, in_tile = group_of_warps * COLS + n;
      if (warp == 0 && lane < 4) {
        if (!whole) {
          part_lse[in_tile] = lse;
        } else if (p.lse != nullptr) {
          p.lse[(static_cast<std::int64_t>(s.request) * p.nodes + node) * p.q_heads + q_head] =
              lse * 0.6931471805599453f;
        }
      }
      T* out = static_cast<T*>(p.out) + s.request * p.out_strides.batch +
               static_cast<std::int64_t>(node) * p.out_strides.token +
               static_cast<std::int64_t>(q_head) * p.out_strides.head;
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int d = h * 64 + warp * 16 + lane / 4 + r * 8;
          const float value = seen ? acc[h][c / 2 * 4 + r * 2 + c % 2] * inverse : 0.0f;
          if (whole)
            out[d] = static_cast<T>(value);
          else
            part_out[in_tile * D + d] = value;
        }
    }
    named_barrier(barrier, kWarpgroup);  // `reduce` and Q are free for the next segment
    tile += s.end - s.begin;
  }
#endif
}

}  // namespace specvlm
