// Tree attention for Hopper with the packed rows on wgmma's 64-row side: S = Q K^T, O += P V.
//
// For many rows. Two warpgroups have 64 rows each and take 128 positions at a time; Q and P are in registers as wgmma's
// A, and a row's maximum lies in 4 lanes. With few rows most of the 64 would be padding: then sm90.cuh's swapped
// operands are better. While a warpgroup takes the exponentials of a tile, the tensor cores multiply the values of the
// tile before and what the other warpgroup brings. Where an even number of CTAs have row tiles side by side, two form a
// cluster and load K and V for each other. Line, producer and combine kernel are those of sm90.cuh.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "common/numeric.cuh"
#include "tree_attention/parts.cuh"
#include "tree_attention/sm90_pages.cuh"
#include "tree_attention/sm90_producer.cuh"

namespace specvlm {

constexpr int kRowsPerWarpgroup = 64, kRowsTileShift = 7;

template <int D>
struct RowsLayout {
  static constexpr int kRows = 2 * kRowsPerWarpgroup;
  static constexpr int kHalves = D / 64;
  static constexpr int kTileShift = kRowsTileShift, kTile = 1 << kTileShift, kWords = kTile / 64;  // of 64 positions
  static constexpr bool kPairs = pairs_are_built(kTileShift, D);
  static constexpr int kTileBytes = kHalves * kTile * 128;
  static constexpr int kStagesK = D == 128 ? 3 : 6, kStagesV = kStagesK;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kHalves * kRows * 128;
  static constexpr int kV = kK + kStagesK * kTileBytes;
  static constexpr int kUnion = kV + kStagesV * kTileBytes;  // of the masks: words per warp, for this tile and the next
  static constexpr int kRuns = kUnion + 2 * 8 * kWords * 8;
  static constexpr int kBarriers = (kRuns + 3 * static_cast<int>(sizeof(ItemRun)) + 7) / 8 * 8;
  static constexpr int kLanded = kBarriers + (2 * kStagesK + 2 * kStagesV + 2) * 8;  // barriers of sm90_pages.cuh
  static constexpr int kPrefix = kLanded + (kStagesK + kStagesV) * 8;
  static constexpr int bytes(int batch) { return kPrefix + 2 * line_ints(batch) * 4 + 1024; }  // as AttentionLayout's
};

// COPIED: K and V come from pages that are too small for TMA.
template <typename T, int D, bool COPIED>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    tree_attention_rows_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ CUtensorMap q_map,
                               const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                               const RowTiles rows_of, int page_shift) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma and setmaxnreg are there on sm_90a alone
  using L = RowsLayout<D>;
  constexpr int kProducerRegisters = 24;  // all that the consumers can spare, for copies too
  constexpr int kTile = L::kTile, kWords = L::kWords, kScores = kTile / 2;
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
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32, barrier = 1 + group_of_warps;
  const float scale = p.scale * 1.4426950408889634f;                   // scores in log2; never 0
  const float hidden = copysignf(__int_as_float(0x7f800000), -scale);  // times scale: -inf
  auto* union_shared = reinterpret_cast<std::uint64_t*>(shared + L::kUnion) + group_of_warps * 8 * kWords;
  const std::uint32_t k_operand = swizzled_operand(shared_address(shared + L::kK));
  const std::uint32_t v_operand = swizzled_operand(shared_address(shared + L::kV), kTile * 128);
  const int warp_row = group_of_warps * kRowsPerWarpgroup + warp * 16;  // this thread's rows: + lane / 4, and 8 further

  const Turns turns{group_of_warps};
  if (group_of_warps == 1) turns.pass();

  int k_stage = 0, v_stage = 0;
  std::uint32_t k_phase = 0, v_phase = 0, q_phase = 0;
  for (volatile ItemRun* run = runs;; run = run == runs + 2 ? runs : run + 1) {
    wait_for_phase(full_q, q_phase);
    q_phase ^= 1;
    const int begin = __shfl_sync(~0u, run->begin, 0), end = __shfl_sync(~0u, run->end, 0);
    if (begin == end) break;
    const int unmasked = __shfl_sync(~0u, ItemLine(p, rows_of).unmasked(run->context, run->row_tile), 0);

    // The warp's rows of Q, as wgmma takes them from registers: shared memory has enough to do with keys and values.
    std::uint32_t q[D / 16][4];
    const int q_row = warp_row + lane / 8 % 2 * 8 + lane % 8;  // whose address this lane gives
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      load_matrices(q[step], shared_address(shared + L::kQ + (step / 4 * L::kRows + q_row) * 128) +
                                 (((step % 4 * 2 + lane / 16) ^ q_row % 8) * 16));
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty_q);

    float scores[kScores];
    float acc[L::kHalves * 32];           // the first tile's product overwrites them
    std::uint32_t shares[kTile / 16][4];  // exp2 of the scores in 16 bits
    float reference[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
    bool fresh[2] = {true, true};  // rows that have seen nothing yet
#pragma unroll
    for (int i = 0; i < kScores; ++i) asm volatile("" : "=f"(scores[i]));
#pragma unroll
    for (int i = 0; i < L::kHalves * 32; ++i) asm volatile("" : "=f"(acc[i]));
#pragma unroll
    for (int i = 0; i < kTile / 16 * 4; ++i) shares[i / 4][i % 4] = 0;

    auto multiply_values = [&](bool accumulate) {
      const std::uint32_t v_tile = v_operand + v_stage * (L::kTileBytes / 16);
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step)
        WgmmaRegisters<T, D, 1>::run(acc, shares[step], swizzled_descriptor(v_tile + step * 2048 / 16),
                                     step != 0 || accumulate);
    };
    auto keep_operands = [&] {
      wgmma_keep(shares);
      wgmma_keep(acc);
    };

    // As in sm90.cuh: a pass issues the products with a tile's keys and with the values of the tile before, of which
    // only the first is awaited. For the first tile the product with V is of leftovers, which the next overwrites.
    bool k_ready = false, again = false;
#pragma unroll 1
    for (int t = begin; t < end; t += !again) {
      if (!k_ready) wait_for_phase(full_k + k_stage, k_phase);
      turns.take(!again);
      wgmma_keep(scores);
      wgmma_keep(q);
      keep_operands();
      wgmma_fence();
      const std::uint32_t k_tile = k_operand + k_stage * (L::kTileBytes / 16);
#pragma unroll
      for (int step = 0; step < D / 16; ++step)
        WgmmaRegisters<T, kTile>::run(
            scores, q[step], swizzled_descriptor(k_tile + (step / 4 * (kTile * 128) + step % 4 * 32) / 16), step != 0);
      wgmma_commit();
      multiply_values(t > begin + !again);
      wgmma_commit();
      turns.pass(!again);
      const int v_before = v_stage;
      const bool next_v = t > begin && !again;
      if (next_v && ++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1;
      wgmma_wait<1>();
      wgmma_keep(scores);
      wgmma_keep(q);

      const bool masked = (t + 1) * kTile > unmasked;
      std::uint64_t seen_by_any[kWords];
#pragma unroll
      for (int word = 0; word < kWords; ++word) seen_by_any[word] = ~0ull;
      if (masked) {
        const int request = run->request, first_node = run->row_tile * rows_of.nodes;
        const int context = run->context, live = run->live;
        auto* words = union_shared + t % 2 * 4 * kWords;
#pragma unroll 1
        for (int word = 0; word < kWords; ++word) {
          std::uint64_t any = 0;
#pragma unroll 1
          for (int n = thread; n < rows_of.rows; n += kWarpgroup)
            any |= visible_bits(p, request, first_node + n / rows_of.group, context, live, t * kTile + word * 64);
          const std::uint64_t low = __reduce_or_sync(~0u, static_cast<unsigned>(any));
          const std::uint64_t high = __reduce_or_sync(~0u, static_cast<unsigned>(any >> 32));
          if (lane == 0) words[word * 4 + warp] = high << 32 | low;
        }
        named_barrier(barrier, kWarpgroup);
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          const std::uint64_t* of_warps = words + word * 4;
          seen_by_any[word] = (of_warps[0] | of_warps[1]) | (of_warps[2] | of_warps[3]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_row + lane / 4 + 8 * r;
#pragma unroll
          for (int word = 0; word < kWords; ++word) {
            std::uint64_t bits = 0;
            if (row < rows_of.rows)
              bits = visible_bits(p, request, first_node + row / rows_of.group, context, live, t * kTile + word * 64);
            bits >>= lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // positions 8 * i + lane % 4 * 2 and the next
              const std::uint32_t two = static_cast<std::uint32_t>(bits >> (8 * i));
              if (!(two & 1u)) scores[word * 32 + 4 * i + 2 * r] = hidden;
              if (!(two & 2u)) scores[word * 32 + 4 * i + 2 * r + 1] = hidden;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores[i] = fmaf(scores[i], scale, -reference[i / 2 % 2]);
      // References move at the first tile a row sees; later only where a score is far above its own.
      const bool moved = __any_sync(~0u, again || t == begin || (masked && (fresh[0] || fresh[1])));
      float decay[2] = {1.0f, 1.0f};
      if (moved) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float top = scores[2 * r];
#pragma unroll
          for (int i = 0; i < kScores / 4; ++i)
            top = fmaxf(top, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          const bool nothing = top == __int_as_float(0xff800000);
          const float move = nothing ? 0.0f : fresh[r] ? top : fmaxf(top, 0.0f);
          decay[r] = fresh[r] ? 1.0f : exp2_fast(-move);
          fresh[r] = fresh[r] && nothing;
          reference[r] += move;
          sum[r] *= decay[r];
#pragma unroll
          for (int i = 0; i < kScores / 4; ++i) scores[4 * i + 2 * r] -= move, scores[4 * i + 2 * r + 1] -= move;
        }
      }
      const bool v_ready = phase_done(full_v + v_stage, v_phase);  // asked early: the answer takes 60 cycles
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores[i] = exp2_fast(scores[i]);
      float of_tile[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kScores / 8; ++i)
          part[i % 4] += (scores[8 * i + 2 * r] + scores[8 * i + 2 * r + 1]) +
                         (scores[8 * i + 4 + 2 * r] + scores[8 * i + 5 + 2 * r]);
        of_tile[r] = (part[0] + part[1]) + (part[2] + part[3]);
      }

      if (!v_ready) wait_for_phase(full_v + v_stage, v_phase);
      bool unseen = false;  // by any row
#pragma unroll
      for (int word = 0; word < kWords; ++word) unseen |= ~seen_by_any[word] != 0;
      if (masked && unseen) {  // a position that no row sees may hold NaN, and 0 * NaN would spread
        char* v_tile = shared + L::kV + v_stage * L::kTileBytes;
#pragma unroll 1
        for (int i = thread; i < L::kHalves * kTile * 8; i += kWarpgroup)
          if (!((kWords == 1 || i / 8 % kTile < 64 ? seen_by_any[0] : seen_by_any[kWords - 1]) >> (i / 8 % 64) & 1))
            reinterpret_cast<uint4*>(v_tile)[i] = make_uint4(0, 0, 0, 0);
        ptx::fence_proxy_async(ptx::space_shared);
        named_barrier(barrier, kWarpgroup);
      }
      wgmma_wait<0>();
      keep_operands();
      if (moved && t != begin) {  // not before: until here the accumulators are wgmma's
#pragma unroll
        for (int i = 0; i < L::kHalves * 32; ++i) acc[i] *= decay[i / 2 % 2];
      }
      if (next_v) release_stage(empty_v + v_before, lane, paired);
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) shares[step][i] = pack<T>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
      const bool last_stage = k_stage + 1 == L::kStagesK;
      k_ready = t + 1 == end || phase_done(full_k + (last_stage ? 0 : k_stage + 1), k_phase ^ last_stage);
      // As in sm90.cuh: far above its reference, a score would be too large for P. Then the warpgroup's pass counts for
      // nothing, and the next one takes the tile again.
      const bool above = fmaxf(of_tile[0], of_tile[1]) > kMostGrowth<T>;
      again = __any_sync(~0u, named_barrier_any(barrier, kWarpgroup, above) && !again);
      if (again) {
#pragma unroll
        for (int i = 0; i < kTile / 16 * 4; ++i) shares[i / 4][i % 4] = 0;
        k_ready = true;
      } else {
        sum[0] += of_tile[0], sum[1] += of_tile[1];
        release_stage(ring.empty_k + k_stage, lane, paired);
        k_stage = last_stage ? 0 : k_stage + 1;
        k_phase ^= last_stage;
      }
    }
    turns.take();
    keep_operands();
    wgmma_fence();
    multiply_values(end > begin + 1);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
    keep_operands();
    release_stage(empty_v + v_stage, lane, paired);
    if (++v_stage == L::kStagesV) v_stage = 0, v_phase ^= 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }

    if (run->begin != 0 || run->end != run->item_tiles) {  // the combine kernel does the rest
      const Part<D> part{p.workspace, L::kRows, static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x), begin == 0};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (lane % 4 == 0) {
          const int row = warp_row + lane / 4 + 8 * r;
          part.references()[row] = fresh[r] ? kNothing : reference[r];
          part.sums()[row] = sum[r];
        }
        const float inverse = sum[r] != 0.0f ? 1.0f / sum[r] : 0.0f;
        uint2* target = part.octet(warp_row / 8 + r) + lane;
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            target[h * kWarpgroup + j * 32] = make_uint2(
                pack<T>(acc[32 * h + 8 * j + 2 * r] * inverse, acc[32 * h + 8 * j + 2 * r + 1] * inverse),
                pack<T>(acc[32 * h + 8 * j + 4 + 2 * r] * inverse, acc[32 * h + 8 * j + 5 + 2 * r] * inverse));
      }
      continue;
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int local = warp_row + lane / 4 + 8 * r, row = run->row_tile * rows_of.rows + local;
      if (local >= rows_of.rows || row >= p.nodes * rows_of.group) continue;
      const int node = row / rows_of.group, q_head = run->head * rows_of.group + row % rows_of.group;
      const bool seen = row < run->live * rows_of.group && sum[r] != 0.0f;
      if (p.lse != nullptr && lane % 4 == 0)
        p.lse[(static_cast<std::int64_t>(run->request) * p.nodes + node) * p.q_heads + q_head] =
            seen ? (reference[r] + log2f(sum[r])) * 0.6931471805599453f : __int_as_float(0xff800000);
      const float inverse = seen ? 1.0f / sum[r] : 0.0f;
      T* out = static_cast<T*>(p.out) + run->request * p.out_strides.batch +
               static_cast<std::int64_t>(node) * p.out_strides.token +
               static_cast<std::int64_t>(q_head) * p.out_strides.head + lane % 4 * 2;
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          *reinterpret_cast<std::uint32_t*>(out + h * 64 + 8 * i) =
              seen ? pack<T>(acc[32 * h + 4 * i + 2 * r] * inverse, acc[32 * h + 4 * i + 2 * r + 1] * inverse) : 0u;
    }
  }
#endif
}

}  // namespace specvlm
