// token_scores for Hopper with swapped operands: S^T = K Q^T.
//
// Without a softmax state a tile of keys needs each query row once. So the keys are wgmma's A operand in registers, 64
// positions a warpgroup, and the packed rows (query, head of the group) stay in shared memory as its B operand, block
// by block. A row of the accumulators is a cache position: the sum over the query rows is a sum inside a thread, and
// whatever a position beyond the queries holds stays in its own row. A producer warp (TMA, a ring of tiles) feeds two
// warpgroups, each with a tile of its own; while the tensor cores multiply one block, a warpgroup takes the
// exponentials of the block before, some of them with the FMA units.
//
// The tiles of all requests and heads form one line that is cut evenly among the CTAs. Each head's sums go to the
// workspace and token_scores_add_kernel adds them up in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/numeric.cuh"
#include "common/overlap.cuh"
#include "token_scores/span.cuh"

namespace specvlm {

constexpr int kMaxChunks = 8;  // boxes of Q, a barrier each
constexpr int kHeadCost = 1;   // in tiles: a CTA that changes heads waits for the next head's Q

struct ScoresLayout {
  int q, k, lse, barriers, prefix, bytes;  // offsets in shared memory
};

__host__ __device__ constexpr int score_tile_bytes(int head_dim) { return kSpanTile * head_dim * 2; }

__host__ __device__ constexpr ScoresLayout scores_layout(int head_dim, int rows, int stages, int batch) {
  ScoresLayout layout{};
  layout.k = layout.q + rows * head_dim * 2;
  layout.lse = layout.k + stages * score_tile_bytes(head_dim);
  layout.barriers = layout.lse + rows * 4;
  layout.prefix = layout.barriers + (2 * stages + kMaxChunks) * 8;
  layout.bytes = layout.prefix + (batch + 1) * 4 + 1024;  // 1024: to align the base
  return layout;
}

// A run of tiles of one request and head. On the line a head is kHeadCost units and then its tiles.
struct ScoreSegment {
  int request, head;
  int begin, end;  // tiles
  int units;       // of the line
};

// The segment that starts at a unit of the line and ends before `limit`. prefix[b]: units before request b.
__device__ __forceinline__ ScoreSegment score_segment_at(const Span& span, const int* prefix, int unit, int limit) {
  ScoreSegment s;
  s.request = 0;
  while (prefix[s.request + 1] <= unit) ++s.request;
  const int per_head = span.tiles(s.request) + kHeadCost, rest = unit - prefix[s.request];
  s.head = rest / per_head;
  const int from = rest - s.head * per_head, to = min(per_head, from + limit - unit);
  s.units = to - from;
  s.begin = max(from - kHeadCost, 0);
  s.end = max(to - kHeadCost, 0);
  return s;
}

// Where the negated lse of a packed row lies in shared memory: the four that a thread needs for 16 columns of its
// accumulators are next to each other.
__device__ __forceinline__ int lse_slot(int row) { return (row & ~15) + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }

// Which of the 8 accumulators of 16 columns the FMA units take, so that both positions of a thread get their share.
template <int POLYNOMIAL>
__device__ constexpr bool by_polynomial(int i) {
  constexpr int kOrder[8] = {4, 0, 6, 3, 2, 5, 1, 7};  // the first is number 1, then 6, 4, 3
  return kOrder[(i % 8) ^ (i / 8 % 2 * 2)] < POLYNOMIAL;
}

// For one warp of each CTA, while the kernel before may still run: asks for the lse of the CTA's first head to be
// brought near. Every CTA for itself: what another one asked for helps little. With few queries the lse is soon there
// anyway.
__device__ __forceinline__ void bring_lse_near(const TokenScoresParams& p, int tile_queries, int group) {
  constexpr int kFew = 8;
  if (p.queries <= kFew) return;
  // where the line's cut falls if all requests are equally long
  const int item = static_cast<int>(static_cast<std::int64_t>(blockIdx.x) * p.batch * p.kv_heads / gridDim.x);
  const int request = item / p.kv_heads;
  const float* lse = p.lse + request * p.lse_batch_stride + (item - request * p.kv_heads) * group;
  for (int query = threadIdx.x % 32; query < min(p.queries, tile_queries); query += 32)
    prefetch_to_l2(lse + query * p.lse_token_stride);
}

template <typename T, int D, int N, int WARPGROUPS, int POLYNOMIAL>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
    token_scores_kernel(const __grid_constant__ TokenScoresParams p, const __grid_constant__ TokenScoresPlan plan,
                        const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map) {
  static_assert(WARPGROUPS == 2 || WARPGROUPS == 3, "how many registers a thread gets is written down for these");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma is there on sm_90a alone
  constexpr int kHalves = D / 64, kConsumers = WARPGROUPS * 128, kTileBytes = score_tile_bytes(D);
  extern __shared__ char raw_shared[];
  char* shared = raw_shared + (1024 - shared_address(raw_shared) % 1024) % 1024;
  const ScoresLayout layout = scores_layout(D, plan.rows, plan.stages, p.batch);
  auto* full = reinterpret_cast<std::uint64_t*>(shared + layout.barriers);
  auto *empty = full + plan.stages, *q_full = empty + plan.stages;
  int* prefix = reinterpret_cast<int*>(shared + layout.prefix);
  auto* lse_shared = reinterpret_cast<float*>(shared + layout.lse);
  const Span span{p};
  const int group = p.q_heads / p.kv_heads, chunk_rows = plan.chunk_queries * group;

  if (threadIdx.x == kConsumers) {
    prefetch_map(&q_map);
    prefetch_map(&k_map);
    for (int s = 0; s < plan.stages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, 4);  // the warps of the one warpgroup that reads the stage
    }
    for (int c = 0; c < plan.chunks; ++c) ptx::mbarrier_init(q_full + c, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  // rows past the last chunk are multiplied, too, and must be finite
  const int pad = plan.rows - plan.chunks * chunk_rows;
  for (int i = threadIdx.x; i < kHalves * pad * 8; i += kConsumers + 128) {
    const int half = i / (pad * 8), offset = i % (pad * 8) * 16;
    *reinterpret_cast<uint4*>(shared + layout.q + ((half + 1) * plan.rows - pad) * 128 + offset) =
        make_uint4(0, 0, 0, 0);
  }
  ptx::fence_proxy_async(ptx::space_shared);
  if (threadIdx.x / 32 == kConsumers / 32 + 1) bring_lse_near(p, plan.tile_queries, group);
  wait_for_launch_before();  // what is above overlaps with the kernel before
  if (threadIdx.x < 32) {    // units before each request: a scan over the batch
    int before = 0;
    for (int first = 0; first < p.batch; first += 32) {
      const int request = first + threadIdx.x, tiles = request < p.batch ? span.tiles(request) : 0;
      int sum = tiles > 0 ? p.kv_heads * (tiles + kHeadCost) : 0;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (static_cast<int>(threadIdx.x) >= step) sum += other;
      }
      if (request < p.batch) prefix[request + 1] = before + sum;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) prefix[0] = 0;
  }
  __syncthreads();
  let_next_launch_start();

  const int total = prefix[p.batch];
  const int first = static_cast<int>(static_cast<std::int64_t>(blockIdx.x) * total / gridDim.x);
  const int limit = static_cast<int>(static_cast<std::int64_t>(blockIdx.x + 1) * total / gridDim.x);

  if (threadIdx.x >= kConsumers) {
    // ---- producer: lane i loads box i of a tile
    give_registers<WARPGROUPS == 2 ? 40 : 32>();
    if (threadIdx.x >= kConsumers + 32) return;
    const int lane = threadIdx.x % 32;
    const int box_rows = p.page_table == nullptr ? kSpanTile : min(p.page_size, kSpanTile);
    const int boxes = kSpanTile / box_rows, tiles_at_once = 32 / boxes;
    const std::uint64_t hint = plan.row_tiles == 1 ? kEvictFirst : kEvictNormal;
    int stage = 0;
    std::uint32_t phase = 1;  // the ring starts empty
    for (int unit = first; unit < limit;) {
      const ScoreSegment s = score_segment_at(span, prefix, unit, limit);
      unit += s.units;
      const int origin = span.origin(span.start(s.request));
      for (int row_tile = 0; row_tile < plan.row_tiles; ++row_tile) {
        int pages = 0;  // the warp looks up the pages of several tiles at a time
        for (int t = s.begin; t < s.end; ++t) {
          const int ahead = (t - s.begin) % tiles_at_once;
          if (p.page_table != nullptr && ahead == 0) {
            const int position = origin + (t + lane / boxes) * kSpanTile + lane % boxes * box_rows;
            const int entry = min(max(position / p.page_size, 0), p.max_pages - 1);
            pages = min(max(p.page_table[s.request * p.page_table_stride + entry], 0), p.pages - 1);
          }
          const int page = __shfl_sync(~0u, pages, ahead * boxes + lane % boxes);
          const int position = origin + t * kSpanTile + lane % boxes * box_rows;
          wait_for_phase(empty + stage, phase);
          if (lane == 0)
            ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + stage,
                                           kTileBytes);
          __syncwarp();
          if (lane < boxes) {
            char* target = shared + layout.k + stage * kTileBytes + lane * box_rows * 128;
            for (int h = 0; h < kHalves; ++h) {
              if (p.page_table == nullptr)
                load_box(target + h * kSpanTile * 128, &k_map, h * 64, s.head, position, s.request, full + stage, hint);
              else
                load_box(target + h * kSpanTile * 128, &k_map, h * 64, s.head, position & (p.page_size - 1), page,
                         full + stage, hint);
            }
          }
          if (++stage == plan.stages) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }

  // ---- consumers
  take_registers<WARPGROUPS == 2 ? 232 : 160>();
  // the shuffles tell the compiler that a warp agrees on these, so that they live in uniform registers
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  const int lane = threadIdx.x % 32;
  const float scale = log2_scale(p);
  const float hiding = copysignf(3.0e38f, -scale);
  const std::uint32_t q_operand = swizzled_operand(shared_address(shared + layout.q));
  // where this lane's row of ldmatrix begins: 16 positions of the warp, the 16-byte chunks of a row swizzled
  const std::uint32_t k_lane =
      shared_address(shared + layout.k) + (warp * 16 + lane % 16) * 128 + ((lane / 16) ^ (lane % 8)) * 16;

  int ring = 0;  // tiles that came before in the ring; tile i is warpgroup i % WARPGROUPS's
  std::uint32_t q_phase = 0;
  bool q_used = false;
  for (int unit = first; unit < limit;) {
    ScoreSegment s = score_segment_at(span, prefix, unit, limit);
    for (int* field : {&s.request, &s.head, &s.begin, &s.end, &s.units}) *field = __shfl_sync(~0u, *field, 0);
    unit += s.units;
    if (s.begin >= s.end) continue;
    const int start = __shfl_sync(~0u, span.start(s.request), 0), origin = span.origin(start);
    const int kv_len = p.kv_lens[s.request];  // on its way while Q is asked for
    float* partial = partial_scores(p, s.head, s.request);
    // the same threads take the same tiles for every row tile: what they add to, they wrote themselves
    const int turn = (warpgroup - ring % WARPGROUPS + WARPGROUPS) % WARPGROUPS;

    for (int row_tile = 0; row_tile < plan.row_tiles; ++row_tile) {
      const int first_query = row_tile * plan.tile_queries;
      const int rows = min(plan.tile_queries, p.queries - first_query) * group, blocks = (rows + N - 1) / N;

      if (q_used) named_barrier(1, kConsumers);  // all are done with Q and lse
      q_used = true;
      if (threadIdx.x == 0) {
        for (int c = 0; c < plan.chunks; ++c) {
          ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, q_full + c,
                                         chunk_rows * D * 2);
          for (int h = 0; h < kHalves; ++h)
            load_box(shared + layout.q + (h * plan.rows + c * chunk_rows) * 128, &q_map, h * 64, s.head * group,
                     first_query + c * plan.chunk_queries, s.request, q_full + c, kEvictLast);
        }
      }
      bool left_out = false;
      for (int row = threadIdx.x; row < plan.rows; row += kConsumers) {
        const int query = row < rows ? first_query + row / group : p.queries;  // past the rows: none
        const float value = minus_lse(p, s.request, query, s.head * group + row % group);
        lse_shared[lse_slot(row)] = value;
        left_out |= row < rows && isinf(value);
      }
      int ready = 0;  // chunks of Q that have come
      if (named_barrier_any(1, kConsumers, left_out)) {
        // rows that do not count may hold NaN, which -inf would not hide
        for (; ready < plan.chunks; ++ready) wait_for_phase(q_full + ready, q_phase);
        for (int i = threadIdx.x; i < rows * kHalves * 8; i += kConsumers) {
          const int row = i / (kHalves * 8), part = i % (kHalves * 8);
          if (isinf(lse_shared[lse_slot(row)]))
            *reinterpret_cast<uint4*>(shared + layout.q + (part / 8 * plan.rows + row) * 128 + part % 8 * 16) =
                make_uint4(0, 0, 0, 0);
        }
        ptx::fence_proxy_async(ptx::space_shared);
        named_barrier(1, kConsumers);
      }

      const int context = __shfl_sync(~0u, span.clamped(kv_len), 0);
      std::uint32_t keys[D / 16][4];
      int tile = s.begin + turn, block = 0;  // of the newest product
      int stage = (ring + turn) % plan.stages;
      std::uint32_t phase = (ring + turn) / plan.stages & 1;
      const int seen_tiles = max(context + 1 - origin, 0) / kSpanTile;  // every query sees all of the tiles before
      auto load_keys = [&] {
        // The tile before in this stage may be another warpgroup's: until that one is done with it, full's parity could
        // still speak of it.
        wait_for_phase(empty + stage, phase ^ 1);
        wait_for_phase(full + stage, phase);
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
          load_matrices(keys[step], (k_lane + stage * kTileBytes + step / 4 * (kSpanTile * 128)) ^ (step % 4 * 32));
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty + stage);
        stage += WARPGROUPS;  // at most one time around
        if (stage >= plan.stages) stage -= plan.stages, phase ^= 1;
      };
      auto multiply = [&](float (&acc)[N / 2], int block) {
        for (; ready < plan.chunks && ready * chunk_rows < (block + 1) * N; ++ready)
          wait_for_phase(q_full + ready, q_phase);
        // the shuffle puts it into a uniform register, where wgmma wants its descriptors
        const std::uint32_t q_block = __shfl_sync(~0u, q_operand + block * (N * 128 / 16), 0);
        wgmma_keep(acc);
        wgmma_keep(keys);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
          WgmmaRegisters<T, N>::run(acc, keys[step],
                                    swizzled_descriptor(q_block + step / 4 * (plan.rows * 128 / 16) + step % 4 * 2),
                                    step != 0);
        wgmma_commit();
      };

      // Rows that do not see one of this thread's two positions get a product that no exponential survives.
      auto hide = [&](float (&acc)[N / 2]) {
        if (tile < seen_tiles) return;
        const int position = origin + tile * kSpanTile + warp * 16 + lane / 4;
        int hidden[2];  // columns below do not see the position
#pragma unroll
        for (int i = 0; i < 2; ++i)
          hidden[i] =
              (min(max(position + 8 * i - context, 0), p.queries) - first_query) * group - block * N - lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          if (i / 4 * 8 + i % 2 < hidden[i / 2 % 2]) acc[i] = hiding;
      };
      float sums[2] = {0.0f, 0.0f};  // of the two positions
      auto lse_of = [&](int block) { return reinterpret_cast<const float4*>(lse_shared + block * N) + lane % 4; };
      auto add_shares = [&](const float (&acc)[N / 2], int block, float4 first_lse) {
        const float4* lse = lse_of(block);
#pragma unroll
        for (int i = 0; i < N / 2; i += 8) {
          const float4 minus = i == 0 ? first_lse : lse[i / 2];
          float share[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float m = j / 4 == 0 ? (j % 2 == 0 ? minus.x : minus.y) : (j % 2 == 0 ? minus.z : minus.w);
            const float x = fmaf(acc[i + j], scale, m);
            share[j] = by_polynomial<POLYNOMIAL>(i + j) ? exp2_polynomial(x) : exp2_fast(x);
          }
          sums[0] += (share[0] + share[1]) + (share[4] + share[5]);
          sums[1] += (share[2] + share[3]) + (share[6] + share[7]);
        }
      };
      auto finish_tile = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = sums[i];
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          const int column = origin - start + tile * kSpanTile + warp * 16 + lane / 4 + 8 * i;
          if (lane % 4 == 0 && column >= 0 && column < p.span_len) {
            if (row_tile > 0) sum += partial[column];
            partial[column] = sum;
          }
          sums[i] = 0.0f;
        }
      };

      // While the tensor cores multiply a block, this warpgroup takes the exponentials of the block before. Between the
      // issue of a product and the wait for it there is no branch: ptxas would make the two take turns.
      auto advance = [&] {
        if (++block < blocks) return true;
        block = 0;
        tile += WARPGROUPS;
        if (tile >= s.end) return false;
        load_keys();
        return true;
      };
      auto step = [&](const float (&now)[N / 2], float (&next)[N / 2]) {
        const int before = (block == 0 ? blocks : block) - 1;
        // With registers to spare it is read ahead of the product: the first exponentials would wait for it.
        constexpr bool kAhead = N < 128;
        float4 first_lse;
        if constexpr (kAhead) first_lse = *lse_of(before);
        multiply(next, block);
        if constexpr (!kAhead) first_lse = *lse_of(before);
        add_shares(now, before, first_lse);
        wgmma_wait<0>();
        wgmma_keep(next);
        wgmma_keep(keys);
        if (block == 0) finish_tile(tile - WARPGROUPS);
        hide(next);
      };
      if (tile < s.end) {
        float even[N / 2], odd[N / 2];
        load_keys();
        multiply(even, 0);
        wgmma_wait<0>();
        wgmma_keep(even);
        wgmma_keep(keys);
        hide(even);
        while (advance()) {
          step(even, odd);
          if (!advance()) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) even[i] = odd[i];
            break;
          }
          step(odd, even);
        }
        add_shares(even, blocks - 1, *lse_of(blocks - 1));
        finish_tile(tile - WARPGROUPS);
      }
      if (threadIdx.x == 0)  // chunks that no block needed must have come, too, before the next ones or the exit
        for (int c = 0; c < plan.chunks; ++c) wait_for_phase(q_full + c, q_phase);
      ring += s.end - s.begin;
      q_phase ^= 1;
    }
  }
#endif
}

}  // namespace specvlm
