// Tree attention for Hopper with swapped operands: S^T = K Q^T, O^T += V^T P^T.
//
// The cache fills the 64-row side of wgmma, the packed query rows (node, head of the group) its free side in steps of
// 8, so 208 rows cost 208 and K/V are read once for all of them. A CTA is a producer warp (TMA: the rows' Q, a ring of
// K/V tiles) and two warpgroups, each with half of the rows and its own softmax state: one multiplies while the other
// takes exponentials. The tiles of all requests and heads form one line that is cut evenly among the CTAs; an item that
// ends up in several of them is put together by the combine kernel, in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/numeric.cuh"
#include "tree_attention/parts.cuh"
#include "tree_attention/sm90_pages.cuh"
#include "tree_attention/sm90_producer.cuh"

namespace specvlm {

constexpr int kWideColumns = 80;  // of a warpgroup

// 128 positions a step with 80 columns, the most for which the registers suffice: half as many barriers, votes and
// turns (4% at S = 32,768). With fewer columns it gained nothing, and lost 1 to 2 us where there are few steps.
__host__ __device__ constexpr int swapped_tile_shift(int columns) {
  return columns == kWideColumns ? kTileShift + 1 : kTileShift;
}

template <int D, int COLS>
struct AttentionLayout {
  static constexpr int kRows = 2 * COLS;  // columns of the CTA: its packed rows and what pads them
  static constexpr int kHalves = D / 64;  // 128-byte wide parts of a row
  static constexpr int kTileShift = swapped_tile_shift(COLS), kTile = 1 << kTileShift;
  static constexpr bool kPairs = pairs_are_built(kTileShift, D);
  static constexpr int kBlocks = kTile / 64;  // of positions, each an M of wgmma
  static constexpr int kTileBytes = kHalves * kTile * 128;
  static constexpr int kPBytes = COLS * 128;  // P of a warpgroup for 64 positions; two of them: for the two blocks of a
                                              // tile, or so that one is read while one is written
  static constexpr int kStages = (220 * 1024 - kHalves * kRows * 128 - 4 * kPBytes) / kTileBytes;
  static constexpr int kStagesK = kBlocks == 2 ? (kStages + 1) / 2 : D == 128 ? 4 : 6;
  static constexpr int kStagesV = kBlocks == 2 ? kStages / 2 : D == 128 ? (COLS > 80 ? 3 : 4) : 6;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kHalves * kRows * 128;
  static constexpr int kV = kK + kStagesK * kTileBytes;
  static constexpr int kP = kV + kStagesV * kTileBytes;
  static constexpr int kMask = kP + 4 * kPBytes;
  static constexpr int kUnion = kMask + kBlocks * kRows * 8;  // of the masks: one word per warp and block
  static constexpr int kColumn = kUnion + kBlocks * 8 * 8;    // two floats per column
  static constexpr int kReference = kColumn + kRows * 8;
  static constexpr int kRuns = kReference + kRows * 4;
  static constexpr int kBarriers = (kRuns + 3 * static_cast<int>(sizeof(ItemRun)) + 7) / 8 * 8;
  static constexpr int kLanded = kBarriers + (2 * kStagesK + 2 * kStagesV + 2) * 8;  // barriers of sm90_pages.cuh
  static constexpr int kPrefix = kLanded + (kStagesK + kStagesV) * 8;
  // what TeamLine remembers, twice; 1024: to align the base
  static constexpr int bytes(int batch) { return kPrefix + 2 * line_ints(batch) * 4 + 1024; }
};

// COPIED: K and V come from pages that are too small for TMA.
template <typename T, int D, int COLS, bool COPIED>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    tree_attention_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                          const RowTiles rows_of, int page_shift) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma and setmaxnreg are there on sm_90a alone
  using L = AttentionLayout<D, COLS>;
  constexpr int kTile = L::kTile, kBlocks = L::kBlocks;
  // Where a tile takes long enough, the vote on references is that of the barrier behind it.
  constexpr bool kLateVote = COLS > kWideColumns;
  // Where P's exponents are wide, too, a column's first reference is its largest score at two positions, not at all.
  constexpr bool kGuess = kLateVote && std::is_same_v<T, __nv_bfloat16>;
  // copies go faster with more registers, where the consumers can spare them
  constexpr int kProducerRegisters = COPIED && COLS <= 64 ? 72 : 24;
  extern __shared__ char raw_shared[];
  char* shared = raw_shared + (1024 - shared_address(raw_shared) % 1024) % 1024;
  if (threadIdx.x >= 2 * kWarpgroup) {
    give_registers<kProducerRegisters>();
    if constexpr (COPIED)
      produce_by_copies<L>(p, q_map, rows_of, page_shift, shared);
    else
      produce<L>(p, q_map, k_map, v_map, rows_of, page_shift, shared);
    return;
  }

  take_registers<consumer_registers(kProducerRegisters)>();
  const AttentionRing<L> ring(shared);
  const auto [full_k, empty_k, full_v, empty_v, full_q, empty_q, runs] = ring;
  const bool paired = !COPIED && L::kPairs && rows_of.paired;
  begin_consuming<L>(shared, rows_of.rows, paired);
  // the shuffles tell the compiler that a warp agrees on these, so that they live in uniform registers
  const int group_of_warps = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  const int lane = threadIdx.x % 32, barrier = 1 + group_of_warps;
  const float scale = p.scale * 1.4426950408889634f;  // scores in log2; never 0
  char* p_shared = shared + L::kP + group_of_warps * 2 * L::kPBytes;
  auto* mask_shared = reinterpret_cast<std::uint16_t*>(shared + L::kMask) +
                      group_of_warps * kBlocks * 4 * COLS;  // [block][warp][column]
  auto* union_shared = reinterpret_cast<std::uint64_t*>(shared + L::kUnion) + group_of_warps * kBlocks * 4;
  auto* column_shared = reinterpret_cast<float2*>(shared + L::kColumn) + group_of_warps * COLS;
  auto* column_reference = reinterpret_cast<float*>(shared + L::kReference) + group_of_warps * COLS;
  const std::uint32_t q_operand = swizzled_operand(shared_address(shared + L::kQ) + group_of_warps * COLS * 128);
  const std::uint32_t k_operand = swizzled_operand(shared_address(shared + L::kK));
  const std::uint32_t v_operand = swizzled_operand(shared_address(shared + L::kV));
  const std::uint32_t p_operand = swizzled_operand(shared_address(p_shared));
  // where this lane's row of a transposed 8x8 matrix goes: rows are columns of the CTA, 16-byte chunks are positions
  auto p_lane = [&] {
    const int lane = thread_again() % 32, matrix = lane / 8, matrix_row = lane % 8;
    return shared_address(p_shared) + (matrix / 2 * 8 + matrix_row) * 128 +
           (((2 * warp + matrix % 2) ^ matrix_row) * 16);
  };
  // [COLS x 64] values to 16 bits and into P's place, transposed: positions (or dims) along a row
  auto store_transposed = [&](std::uint32_t p_lane, auto value) {
#pragma unroll
    for (int i = 0; i + 1 < COLS / 8; i += 2)
      store_matrices_transposed(
          p_lane + i * 1024, pack<T>(value(4 * i), value(4 * i + 1)), pack<T>(value(4 * i + 2), value(4 * i + 3)),
          pack<T>(value(4 * i + 4), value(4 * i + 5)), pack<T>(value(4 * i + 6), value(4 * i + 7)));
    if constexpr (COLS / 8 % 2 == 1) {
      constexpr int i = COLS / 8 - 1;
      store_matrices_transposed(p_lane + i * 1024, pack<T>(value(4 * i), value(4 * i + 1)),
                                pack<T>(value(4 * i + 2), value(4 * i + 3)));
    }
  };
  // kShare threads look after a column between them, the first of which owns it.
  constexpr int kShare = COLS <= 16 ? 8 : COLS <= 32 ? 4 : COLS <= 64 ? 2 : 1;
  struct Column {
    int index;
    bool owned;
  };
  auto column_of = [](int thread) { return Column{thread / kShare, thread / kShare < COLS && thread % kShare == 0}; };
  // They get what the 32 threads that hold values of the column have for it, combined in a fixed order.
  // scratch: [32][COLS], a P that is not in use.
  auto over_positions = [&](int thread, float* scratch, auto value, auto combine) {
    const int warp = thread / 32, lane = thread % 32;
    // where a row's eight columns lie, so that four rows make up all banks
    auto octet = [](int row, int index) {
      return row * COLS + (index ^ (COLS % 32 == 0 ? row % 4 : COLS % 16 == 0 ? row / 2 % 2 : 0)) * 8;
    };
#pragma unroll
    for (int i = 0; i < COLS / 8; ++i)
      *reinterpret_cast<float2*>(scratch + octet(warp * 8 + lane / 4, i) + lane % 4 * 2) =
          make_float2(value(2 * i), value(2 * i + 1));
    named_barrier(barrier, kWarpgroup);
    float all = 0.0f;
    if (thread / kShare < COLS) {
      const int column = thread / kShare, first = thread % kShare * (32 / kShare);
      all = scratch[octet(first, column / 8) + column % 8];
#pragma unroll 4
      for (int i = 1; i < 32 / kShare; ++i) all = combine(all, scratch[octet(first + i, column / 8) + column % 8]);
    }
#pragma unroll
    for (int step = 1; step < kShare; step *= 2) all = combine(all, __shfl_xor_sync(~0u, all, step));
    return all;
  };

  const Turns turns{group_of_warps};
  if (group_of_warps == 1) turns.pass();

  int k_stage = 0, v_stage = 0;
  std::uint32_t k_phase = 0, v_phase = 0, q_phase = 0;
  for (volatile ItemRun* run = runs;; run = run == runs + 2 ? runs : run + 1) {
    wait_for_phase(full_q, q_phase);
    q_phase ^= 1;
    const int begin = __shfl_sync(~0u, run->begin, 0), end = __shfl_sync(~0u, run->end, 0);
    if (begin == end) break;
    const auto seen_by_all = [&] { return ItemLine(p, rows_of).unmasked(run->context, run->row_tile); };
    const int unmasked = kBlocks == 1 ? __shfl_sync(~0u, seen_by_all(), 0) : 0;

    float scores[kBlocks][COLS / 2];
    float acc[L::kHalves][COLS / 2];  // the first tile's product overwrites them
    float reference[COLS / 4], sum[COLS / 4];
    // Only its owner looks at it. A column without a row has no mask, and must not vote for ever for want of a
    // reference.
    if (const auto [column, owner] = column_of(thread_again() % kWarpgroup); owner)
      column_reference[column] = group_of_warps * COLS + column < rows_of.rows ? kNothing : 0.0f;
#pragma unroll
    for (int c = 0; c < COLS / 4; ++c) reference[c] = 0.0f, sum[c] = 0.0f;
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h)
#pragma unroll
      for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "=f"(acc[h][i]));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "=f"(scores[b][i]));

    // Descriptors of operands that never move would be kept in registers from tile to tile, and cost spills.
    auto compute_here = [](std::uint32_t& a, std::uint32_t& b) {
      if constexpr (kBlocks == 2) asm volatile("" : "+r"(a), "+r"(b));
    };
    int p_place = 0;  // of what the pass before has written
    auto multiply_values = [&](bool accumulate) {
      std::uint32_t v_tile = v_operand + v_stage * (L::kTileBytes / 16);
      std::uint32_t p_tile = p_operand + p_place * (L::kPBytes / 16);
      compute_here(v_tile, p_tile);
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step)
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h)
          Wgmma<T, COLS, 1, 0>::run(acc[h], swizzled_descriptor(v_tile + (h * (kTile * 128) + step * 2048) / 16),
                                    swizzled_descriptor(p_tile + step / 4 * (L::kPBytes / 16) + step % 4 * 2),
                                    step != 0 || accumulate);
    };
    // A pass issues the products with a tile's keys and with the values of the tile before, of which only the first is
    // awaited: the second runs while the pass takes the tile's exponentials. For the first tile the product with V is
    // of leftovers, which the next overwrites. Branches around them would make the compiler serialize all products, and
    // separate code would be fetched cold.
    bool k_ready = false, again = false;
#pragma unroll 1
    for (int t = begin; t < end; t += !again) {
      if (!k_ready) wait_for_phase(full_k + k_stage, k_phase);
      turns.take(!again);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) wgmma_keep(scores[b]);
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
      wgmma_fence();
      std::uint32_t k_tile = k_operand + k_stage * (L::kTileBytes / 16), q_rows = q_operand;
      compute_here(k_tile, q_rows);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
          Wgmma<T, COLS, 0, 0>::run(
              scores[b], swizzled_descriptor(k_tile + (step / 4 * (kTile * 128) + b * (64 * 128) + step % 4 * 32) / 16),
              swizzled_descriptor(q_rows + (step / 4 * (L::kRows * 128) + step % 4 * 32) / 16), step != 0);
      wgmma_commit();
      multiply_values(t > begin + !again);
      wgmma_commit();
      turns.pass(!again);
      const bool next_v = t > begin && !again;
      if (next_v && ++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1;
      if constexpr (kBlocks == 1) p_place ^= 1;
      wgmma_wait<1>();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) wgmma_keep(scores[b]);

      const bool last_stage = k_stage + 1 == L::kStagesK;
      auto next_keys = [&] {
        release_stage(ring.empty_k + k_stage, lane, paired);
        k_stage = last_stage ? 0 : k_stage + 1;
        k_phase ^= last_stage;
      };
      if constexpr (!kLateVote) next_keys();

      const int p_offset = p_place * L::kPBytes;
      const int lane = thread_again() % 32;                                             // or it would cost a spill
      const bool masked = (t + 1) * kTile > (kBlocks == 1 ? unmasked : seen_by_all());  // two: no register to keep it
      std::uint64_t seen_by_any[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) seen_by_any[b] = ~0ull;
      bool move = again || t == begin;  // the references
      if (masked) {
        const int request = run->request, first_node = run->row_tile * rows_of.nodes;
        const int context = run->context, live = run->live;
#pragma unroll 1
        for (int b = 0; b < kBlocks; ++b) {
          std::uint64_t mine = 0;
#pragma unroll 1
          for (int n = thread_again() % kWarpgroup; n < rows_of.rows; n += kWarpgroup) {
            const std::uint64_t bits =
                visible_bits(p, request, first_node + n / rows_of.group, context, live, t * kTile + b * 64);
            const int mine_at = n - group_of_warps * COLS;
            if (mine_at >= 0 && mine_at < COLS)
#pragma unroll
              for (int w = 0; w < 4; ++w)
                mask_shared[(b * 4 + w) * COLS + mine_at] = static_cast<std::uint16_t>(bits >> (16 * w));
            mine |= bits;
          }
          const std::uint64_t low = __reduce_or_sync(~0u, static_cast<unsigned>(mine));
          const std::uint64_t high = __reduce_or_sync(~0u, static_cast<unsigned>(mine >> 32));
          if (lane == 0) union_shared[b * 4 + warp] = high << 32 | low;
        }
        const auto [column, owner] = column_of(thread_again() % kWarpgroup);
        move |= named_barrier_any(barrier, kWarpgroup, owner && column_reference[column] == kNothing);
        const float hidden = copysignf(__int_as_float(0x7f800000), -scale);  // times scale: -inf
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const std::uint64_t* of_warps = union_shared + b * 4;
          seen_by_any[b] = (of_warps[0] | of_warps[1]) | (of_warps[2] | of_warps[3]);
          const auto* mine_of =
              reinterpret_cast<const std::uint32_t*>(mask_shared + (b * 4 + warp) * COLS + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < COLS / 8; ++i) {  // bits 0, 8, 16 and 24: two positions of a column, then of the next
            const std::uint32_t bits = mine_of[i * 4] >> (lane / 4);
            if (!(bits & 1u)) scores[b][4 * i] = hidden;
            if (!(bits & 1u << 16)) scores[b][4 * i + 1] = hidden;
            if (!(bits & 1u << 8)) scores[b][4 * i + 2] = hidden;
            if (!(bits & 1u << 24)) scores[b][4 * i + 3] = hidden;
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < COLS / 2; ++i) scores[b][i] = fmaf(scores[b][i], scale, -reference[i / 4 * 2 + i % 2]);
      if constexpr (!kLateVote) {
        float worst[4] = {-1.0f, -1.0f, -1.0f, -1.0f};  // four chains: one would be a chain of 40 dependent steps
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int i = 0; i < COLS / 2; ++i) worst[i % 4] = fmaxf(worst[i % 4], scores[b][i]);
        const bool above = fmaxf(fmaxf(worst[0], worst[1]), fmaxf(worst[2], worst[3])) > kLag;
        move = named_barrier_any(barrier, kWarpgroup, above || move);
      }
      auto of_tile = [&](int c, auto value) {
        const int i = c / 2 * 4 + c % 2;
        float all = value(scores[0][i]) + value(scores[0][i + 2]);
        if constexpr (kBlocks == 2) all += value(scores[1][i]) + value(scores[1][i + 2]);
        return all;
      };
      if constexpr (kGuess) {
        if (t == begin && !masked && !again) {
          auto* guess = reinterpret_cast<float2*>(column_shared);  // of two columns
          bool none = false;
          if (thread_again() % kWarpgroup < 4)
#pragma unroll
            for (int i = 0; i < COLS / 8; ++i) {
              const float a = fmaxf(scores[0][4 * i], scores[0][4 * i + 2]),
                          b = fmaxf(scores[0][4 * i + 1], scores[0][4 * i + 3]);
              guess[i * 4 + lane % 4] = make_float2(a, b);
              none |= !(fminf(a, b) > __int_as_float(0xff800000));
            }
          move = named_barrier_any(barrier, kWarpgroup, none);
          if (!move) {
            if (const auto [column, owner] = column_of(thread_again() % kWarpgroup); owner)
              column_reference[column] = reinterpret_cast<const float*>(guess)[column];
#pragma unroll
            for (int i = 0; i < COLS / 8; ++i) {
              const float2 by = guess[i * 4 + lane % 4];
              reference[2 * i] = by.x, reference[2 * i + 1] = by.y;
              scores[0][4 * i] -= by.x, scores[0][4 * i + 1] -= by.y;
              scores[0][4 * i + 2] -= by.x, scores[0][4 * i + 3] -= by.y;
            }
          }
        }
      }
      if (move) {
        if constexpr (kBlocks == 2) {  // P is read by the product with the tile before
          wgmma_wait<0>();
          named_barrier(barrier, kWarpgroup);
        }
        const float top = over_positions(
            thread_again() % kWarpgroup, reinterpret_cast<float*>(p_shared + p_offset),
            [&](int c) {
              const int i = c / 2 * 4 + c % 2;
              const float of_block = fmaxf(scores[0][i], scores[0][i + 2]);
              return kBlocks == 1 ? of_block
                                  : fmaxf(of_block, fmaxf(scores[kBlocks - 1][i], scores[kBlocks - 1][i + 2]));
            },
            [](float a, float b) { return fmaxf(a, b); });
        if (const auto [column, owner] = column_of(thread_again() % kWarpgroup); owner) {
          const float old = column_reference[column];
          const bool nothing = top == __int_as_float(0xff800000), fresh = old == kNothing;
          const float by = nothing ? 0.0f : fresh ? top : fmaxf(top, 0.0f);
          column_shared[column] = make_float2(by, fresh ? 0.0f : exp2_fast(-by));
          if (!nothing) column_reference[column] = fresh ? by : old + by;
        }
        named_barrier(barrier, kWarpgroup);
#pragma unroll
        for (int c = 0; c < COLS / 4; ++c) {
          const float by = column_shared[c / 2 * 8 + lane % 4 * 2 + c % 2].x;
          reference[c] += by;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            scores[b][c / 2 * 4 + c % 2] -= by;
            scores[b][c / 2 * 4 + 2 + c % 2] -= by;
          }
        }
        if (t != begin || again) {
#pragma unroll
          for (int c = 0; c < COLS / 4; ++c) {
            const float decay = column_shared[c / 2 * 8 + lane % 4 * 2 + c % 2].y;
            sum[c] *= decay;
            if (again)  // without what the pass before has added, which may be inf
              sum[c] = decay > 0.0f && sum[c] < 1e30f ? sum[c] - of_tile(c, exp2_fast) : 0.0f;
          }
        }
      }
      const bool v_ready = phase_done(full_v + v_stage, v_phase);  // asked early: the answer takes 60 cycles
      float grown[4] = {};  // four chains: one would be a chain of 26 dependent steps
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < COLS / 2; ++i) scores[b][i] = exp2_fast(scores[b][i]);
#pragma unroll
      for (int c = 0; c < COLS / 4; ++c) {
        const float more = of_tile(c, [](float x) { return x; });
        sum[c] += more;
        grown[c % 4] = fmaxf(grown[c % 4], more);  // a NaN of one column must not hide what is in others
      }
      if constexpr (kBlocks == 2) {  // every warp's product with the tile before is done: P's place is free
        wgmma_wait<0>();
        named_barrier(barrier, kWarpgroup);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        store_transposed(p_lane() + p_offset + b * L::kPBytes, [&](int i) { return scores[b][i]; });

      if (!v_ready) wait_for_phase(full_v + v_stage, v_phase);
      bool unseen = false;  // by any row
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) unseen |= ~seen_by_any[b] != 0;
      if (masked && unseen) {  // a position that no row sees may hold NaN, and 0 * NaN would spread
        char* v_tile = shared + L::kV + v_stage * L::kTileBytes;
#pragma unroll 1
        for (int i = thread_again() % kWarpgroup; i < L::kHalves * kTile * 8; i += kWarpgroup)
          if (!((i / 8 % kTile < 64 ? seen_by_any[0] : seen_by_any[kBlocks - 1]) >> (i / 8 % 64) & 1))
            reinterpret_cast<uint4*>(v_tile)[i] = make_uint4(0, 0, 0, 0);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
      if (move && t != begin) {  // not before: until here the accumulators are wgmma's
#pragma unroll
        for (int c = 0; c < COLS / 4; ++c) {
          const float decay = column_shared[c / 2 * 8 + lane % 4 * 2 + c % 2].y;
#pragma unroll
          for (int h = 0; h < L::kHalves; ++h) {
            acc[h][c / 2 * 4 + c % 2] *= decay;
            acc[h][c / 2 * 4 + 2 + c % 2] *= decay;
          }
        }
      }
      if (next_v) release_stage(empty_v + (v_stage == 0 ? L::kStagesV : v_stage) - 1, lane, paired);
      ptx::fence_proxy_async(ptx::space_shared);
      if constexpr (!kLateVote) {
        k_ready = t + 1 == end || phase_done(full_k + k_stage, k_phase);
        if (lane == 0 && t + 1 == end) ptx::mbarrier_arrive(empty_q);
        named_barrier(barrier, kWarpgroup);
        continue;
      }
      k_ready = t + 1 == end || phase_done(full_k + (last_stage ? 0 : k_stage + 1), k_phase ^ last_stage);
      // Far above its reference, a score would be too large for P. That shows in the sums, and is so rare that a pass
      // then counts for nothing (P of zeros) and the next one takes the tile again, with new references.
      const bool above = fmaxf(fmaxf(grown[0], grown[1]), fmaxf(grown[2], grown[3])) > kMostGrowth<T>;
      again = __any_sync(~0u, named_barrier_any(barrier, kWarpgroup, above) && !move);
      if (again) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
          store_transposed(p_lane() + p_offset + b * L::kPBytes, [](int) { return 0.0f; });
        ptx::fence_proxy_async(ptx::space_shared);
        named_barrier(barrier, kWarpgroup);
        k_ready = true;
      } else {
        if (lane == 0 && t + 1 == end) ptx::mbarrier_arrive(empty_q);
        next_keys();
      }
    }
    turns.take();
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
    wgmma_fence();
    multiply_values(end > begin + 1);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) wgmma_keep(acc[h]);
    release_stage(empty_v + v_stage, lane, paired);
    if (++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1;
    named_barrier(barrier, kWarpgroup);  // every warp's products are done: P's places are free
    const int thread = thread_again() % kWarpgroup, lane = thread % 32;
    const auto [column, owner] = column_of(thread);
    const float column_sum = over_positions(
        thread, reinterpret_cast<float*>(p_shared), [&](int c) { return sum[c]; },
        [](float a, float b) { return a + b; });

    if (run->begin != 0 || run->end != run->item_tiles) {  // the combine kernel does the rest
      const Part<D> part{p.workspace, L::kRows, static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x), begin == 0};
      if (owner) {
        part.references()[group_of_warps * COLS + column] = column_reference[column];
        part.sums()[group_of_warps * COLS + column] = column_sum;
        column_shared[column].x = column_sum != 0.0f ? 1.0f / column_sum : 0.0f;
      }
      named_barrier(barrier, kWarpgroup);
      uint2* target = part.octet(group_of_warps * (COLS / 8)) + thread;
#pragma unroll
      for (int i = 0; i < COLS / 8; ++i) {
        const float a = column_shared[i * 8 + lane % 4 * 2].x, b = column_shared[i * 8 + lane % 4 * 2 + 1].x;
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h)
          target[(i * L::kHalves + h) * kWarpgroup] = make_uint2(pack<T>(acc[h][4 * i] * a, acc[h][4 * i + 1] * b),
                                                                 pack<T>(acc[h][4 * i + 2] * a, acc[h][4 * i + 3] * b));
      }
      continue;
    }

    const int request = run->request, first_head = run->head * rows_of.group;
    const int first_row = run->row_tile * rows_of.rows + group_of_warps * COLS;  // of this warpgroup
    const int live_rows = run->live * rows_of.group, all_rows = p.nodes * rows_of.group;
    const int rows = min(COLS, rows_of.rows - group_of_warps * COLS);
    if (owner) {
      const int row = first_row + column;
      const bool seen = row < live_rows && column_sum != 0.0f;
      if (p.lse != nullptr && column < rows && row < all_rows)
        p.lse[(static_cast<std::int64_t>(request) * p.nodes + row / rows_of.group) * p.q_heads + first_head +
              row % rows_of.group] =
            seen ? (column_reference[column] + log2f(column_sum)) * 0.6931471805599453f : __int_as_float(0xff800000);
      column_shared[column].x = seen ? 1.0f / column_sum : 0.0f;
    }
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) {
      named_barrier(barrier, kWarpgroup);  // P's place is free, column_shared is there
      store_transposed(p_lane(), [&](int i) {
        const float inverse = column_shared[i / 4 * 8 + lane % 4 * 2 + i % 2].x;
        return inverse == 0.0f ? 0.0f : acc[h][i] * inverse;
      });
      named_barrier(barrier, kWarpgroup);
#pragma unroll 1
      for (int i = thread; i < rows * 8; i += kWarpgroup) {
        const int n = i / 8, chunk = i % 8, row = first_row + n;
        if (row >= all_rows) break;
        T* out = static_cast<T*>(p.out) + request * p.out_strides.batch +
                 static_cast<std::int64_t>(row / rows_of.group) * p.out_strides.token +
                 static_cast<std::int64_t>(first_head + row % rows_of.group) * p.out_strides.head;
        reinterpret_cast<uint4*>(out)[h * 8 + chunk] =
            *reinterpret_cast<const uint4*>(p_shared + n * 128 + (chunk ^ n % 8) * 16);
      }
    }
  }
#endif
}

}  // namespace specvlm
