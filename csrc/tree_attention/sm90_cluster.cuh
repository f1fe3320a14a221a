// Tree attention for Hopper where there is little of it: one launch, in which a cluster of CTAs shares an item.
//
// What small items cost is latency, so a CTA asks for all of its tiles at once and waits for memory once. An item is a
// request, a KV head and a row tile; every CTA of its cluster takes an even share of the tiles, and passes what it has
// of each row to the CTA that owns the row, which adds the parts in the order of the cache. As in sm90_rows.cuh the
// rows are on wgmma's 64-row side and P stays in registers: a row's maximum lies in 4 lanes, and one warpgroup needs
// neither barriers nor the shared memory that P would take. Half of the 64 are padding where ROWS is 32.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "common/numeric.cuh"
#include "common/overlap.cuh"
#include "tree_attention/parts.cuh"
#include "tree_attention/sm90_ring.cuh"

namespace specvlm {

constexpr int kMostClusterTiles = 6;              // of a CTA
constexpr int kMostClusterCtas = 16;              // half a warp
constexpr int kMostClusterNodes = 32;             // of a row tile: a lane looks after each
constexpr int kClusterThreads = kWarpgroup + 32;  // the last warp asks for what the others multiply

template <int D, int ROWS>
struct ClusterLayout {
  static constexpr int kHalves = D / 64;                    // 128-byte wide parts of a row
  static constexpr int kTileBytes = kHalves * kTile * 128;  // of keys, or of values
  static constexpr int kParts = kHalves * ROWS * 128;       // behind Q: of all CTAs, for the rows that this one owns
  static constexpr int kWeights = kParts + ROWS * D * 2;    // a reference and a sum for each row of each part
  static constexpr int kBarriers = kWeights + ROWS / 8 * kMostClusterCtas * 8;
  static constexpr int kTiles =
      (kBarriers + (2 * kMostClusterTiles + 3) * 8 + 1023) / 1024 * 1024;  // keys, values, ...
  static constexpr int bytes(int tiles) { return kTiles + tiles * 2 * kTileBytes; }
};

// The mbarriers in a CTA's shared memory: a tile's keys and values are there, the lengths by which they were loaded are
// right, and all parts of its rows have come; and the phase of the first two by which they are right.
template <class L>
struct ClusterBarriers {
  std::uint64_t *full_k, *full_v, *checked, *gathered;
  volatile std::uint32_t* parity;

  __device__ explicit ClusterBarriers(char* shared)
      : full_k(reinterpret_cast<std::uint64_t*>(shared + L::kBarriers)),
        full_v(full_k + kMostClusterTiles),
        checked(full_v + kMostClusterTiles),
        gathered(checked + 1),
        parity(reinterpret_cast<volatile std::uint32_t*>(gathered + 1)) {}
};

// What the CTA of a cluster with most of the tiles has, at full capacity.
constexpr int cluster_tiles(std::int64_t capacity, int ctas) {
  return static_cast<int>(((capacity + kTile - 1) / kTile + ctas - 1) / ctas);
}

// The even share of a CTA in an item's tiles. The last CTA, which has masks to look at, has none more than others.
struct ClusterShare {
  int begin, tiles;

  __device__ ClusterShare(int item_tiles, int cta, int cluster_shift) {
    const int round_up = (1 << cluster_shift) - 1;
    begin = (cta * item_tiles + round_up) >> cluster_shift;
    tiles = (((cta + 1) * item_tiles + round_up) >> cluster_shift) - begin;
  }
};

// The words of a node's mask, of which the first, mostly the only one, is asked for long before it is needed.
struct NodeMask {
  const std::int64_t* words;
  std::int64_t first;

  __device__ __forceinline__ std::int64_t operator[](int i) const { return i == 0 ? first : words[i]; }
};

// The last warp: asks for the tiles of the CTA's share, and for Q.
template <class L, int ROWS>
__device__ __forceinline__ void fetch_share(const ItemLine& line, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                            const CUtensorMap& v_map, int page_shift, int cluster_shift, char* shared) {
  const TreeAttentionParams& p = line.p;
  const RowTiles& rows_of = line.rows_of;
  const auto [full_k, full_v, checked, gathered, parity_shared] = ClusterBarriers<L>(shared);
  const int cta = blockIdx.x & ((1 << cluster_shift) - 1), row_tile = blockIdx.x >> cluster_shift;
  const int head = blockIdx.y, request = blockIdx.z, lane = threadIdx.x % 32;
  const int box_shift = min(page_shift, kTileShift), boxes_shift = kTileShift - box_shift;  // log2: positions, boxes
  auto read_lengths = [&] {
    return make_int2(load_anew(p.kv_lens + request),
                     p.tree_lens == nullptr ? p.nodes : load_anew(p.tree_lens + request));
  };
  auto share_of = [&](int2 lengths) {
    const int context = min(max(__shfl_sync(~0u, lengths.x, 0), 0), p.capacity);
    const int live = min(max(__shfl_sync(~0u, lengths.y, 0), 0), p.nodes);
    return ClusterShare(line.tiles(context, live, row_tile), cta, cluster_shift);
  };

  // First, while the launch before may still run, all of it is brought into the L2, by lengths and pages that may be
  // old ones. Then it is loaded by the same lengths. They are read anew meanwhile: if they were old, it is loaded
  // again.
  int2 lengths = read_lengths();
  ClusterShare share = share_of(lengths);
  std::uint32_t parity = 0;
  bool load = false;
#pragma unroll 1
  while (true) {
    const int2 now = read_lengths();
    if (load && lane < 2 * kMostClusterTiles) {
      const int tile = lane < kMostClusterTiles ? lane : lane - kMostClusterTiles;
      const int q_bytes = lane == 0 ? L::kHalves * rows_of.rows * 128 : 0;  // Q comes with the first keys
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full_k + lane,
                                     tile < share.tiles ? L::kTileBytes + q_bytes : 0);
    }
    __syncwarp();
    if (share.tiles > 0 && elect_lane()) {
#pragma unroll
      for (int h = 0; h < L::kHalves; ++h)
        load_or_prefetch_box(load, shared + h * ROWS * 128, &q_map, h * 64, head * rows_of.group,
                             row_tile * rows_of.nodes, request, full_k);
    }
    const int boxes = share.tiles << boxes_shift;
#pragma unroll 1
    for (int first = 0; first < boxes; first += 32) {  // a lane looks up where one box is
      int outer = request, inner = share.begin * kTile + ((first + lane) << box_shift);
      if (p.page_table != nullptr) {
        const int index = inner >> page_shift;
        outer = p.pages, inner &= p.page_size - 1;  // outside of the map: zeros
        if (index < p.max_pages)
          outer = min(max(load_anew(p.page_table + request * p.page_table_stride + index), 0), p.pages - 1);
      }
#pragma unroll 1
      for (int i = 0; i < min(boxes - first, 32); ++i) {
        const int c3 = __shfl_sync(~0u, outer, i), c2 = __shfl_sync(~0u, inner, i);
        const int box = first + i, tile = box >> boxes_shift;
        char* keys = shared + L::kTiles + tile * 2 * L::kTileBytes + ((box - (tile << boxes_shift)) << box_shift) * 128;
        if (!elect_lane()) continue;
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h)
          load_or_prefetch_box(load, keys + h * kTile * 128, &k_map, h * 64, head, c2, c3, full_k + tile);
#pragma unroll
        for (int h = 0; h < L::kHalves; ++h)
          load_or_prefetch_box(load, keys + L::kTileBytes + h * kTile * 128, &v_map, h * 64, head, c2, c3,
                               full_v + tile);
      }
    }
    if (!load) {
      wait_for_launch_before();
      let_next_launch_start();
      load = true;
      continue;
    }
    if (__all_sync(~0u, now.x == lengths.x && now.y == lengths.y)) break;
    lengths = now;
    share = share_of(lengths);
    if (lane < 2 * kMostClusterTiles) wait_for_phase(full_k + lane, parity);
    __syncwarp();
    parity ^= 1;
  }
  if (lane == 0) {
    *parity_shared = parity;
    ptx::mbarrier_arrive(checked);
  }
}

// node_factor: 2^16 / group, rounded up: a row's node is row * node_factor >> 16.
template <typename T, int D, int ROWS>
__global__ void __launch_bounds__(kClusterThreads, ROWS == 32 ? 2 : 1)
    tree_attention_cluster_kernel(const __grid_constant__ TreeAttentionParams p,
                                  const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map, const RowTiles rows_of, int page_shift,
                                  int cluster_shift, int node_factor) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma is there on sm_90a alone
  using L = ClusterLayout<D, ROWS>;
  constexpr int kRowsOfThread = ROWS / 32;  // with 32 the 8 rows of the lower half of a warp's 16
  constexpr int kSlices = D / 32;           // 32 dims of two rows of a part are 32 words, one for each lane
  extern __shared__ __align__(1024) char shared[];
  const auto [full_k, full_v, checked, gathered, parity_shared] = ClusterBarriers<L>(shared);
  const int ctas = 1 << cluster_shift, cta = blockIdx.x & (ctas - 1), row_tile = blockIdx.x >> cluster_shift;
  const int head = blockIdx.y, request = blockIdx.z, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const ItemLine line(p, rows_of);
  const int owned_shift = (ROWS == 32 ? 5 : 6) - cluster_shift, owned = 1 << owned_shift;  // rows of a CTA

  if (warp == kWarpgroup / 32) {
    if (lane == 0) {
      prefetch_map(&k_map);
      prefetch_map(&q_map);
      prefetch_map(&v_map);
#pragma unroll
      for (int i = 0; i < 2 * kMostClusterTiles + 2; ++i) ptx::mbarrier_init(full_k + i, 1);
      ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, gathered,
                                     ctas * min(max(rows_of.rows - cta * owned, 0), owned) * (D * 2 + 8));
    }
    __syncwarp();
    ptx::barrier_cluster_arrive(ptx::sem_relaxed);
    fetch_share<L, ROWS>(line, q_map, k_map, v_map, page_shift, cluster_shift, shared);
    ptx::barrier_cluster_wait();
    return;
  }

  const int first_node = row_tile * rows_of.nodes;
  const std::int64_t* mask_row = nullptr;  // of this lane's node
  if (p.tree_mask != nullptr && lane < rows_of.nodes && first_node + lane < p.nodes)
    mask_row = p.tree_mask + request * p.mask_batch_stride + (first_node + lane) * p.mask_node_stride;
  if (mask_row != nullptr) prefetch_to_l2(mask_row);
  ptx::barrier_cluster_arrive(ptx::sem_relaxed);
  const float scale = p.scale * 1.4426950408889634f;            // scores in log2; never 0
  const int first_row = warp * (8 * kRowsOfThread) + lane / 4;  // of this thread; the second is 8 further
  // With 32 rows every warp gets 8 of them, and so every thread a row: groups of 8 rows that are 512 bytes apart are,
  // every second time, one of Q's, and whatever lies between goes into the upper halves of the warps' 16 rows.
  constexpr int kGroupStride = ROWS == 32 ? 512 : 1024;
  const std::uint32_t q_operand = swizzled_operand(shared_address(shared));
  const std::uint32_t k_operand = swizzled_operand(shared_address(shared + L::kTiles));
  const std::uint32_t v_operand = swizzled_operand(shared_address(shared + L::kTiles + L::kTileBytes), kTile * 128);

  float scores[kTile / 2], acc[D / 2];  // the first tile's products overwrite them
  std::uint32_t shares[kTile / 16][4];  // exp2 of the scores in 16 bits
#pragma unroll
  for (int n = 0; n < kTile / 2; ++n) asm volatile("" : "=f"(scores[n]));
#pragma unroll
  for (int n = 0; n < D / 2; ++n) asm volatile("" : "=f"(acc[n]));
#pragma unroll
  for (int n = 0; n < kTile / 16 * 4; ++n) asm volatile("mov.u32 %0, 0;" : "=r"(shares[n / 4][n % 4]));
  auto multiply_values = [&](int i, bool accumulate) {
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step)
      WgmmaRegisters<T, D, 1>::run(acc, shares[step],
                                   swizzled_descriptor(v_operand + (i * 2 * L::kTileBytes + step * 2048) / 16),
                                   step != 0 || accumulate);
  };
  auto keep_operands = [&] {
    wgmma_keep(shares);
    wgmma_keep(acc);
  };

  ptx::barrier_cluster_wait();  // all CTAs are there, and their mbarriers
  wait_for_launch_before();
  const int context = __shfl_sync(~0u, line.context(request), 0), live = __shfl_sync(~0u, line.live(request), 0);
  const NodeMask mask{mask_row, mask_row != nullptr ? *mask_row : 0};
  const auto [begin, tiles] = ClusterShare(line.tiles(context, live, row_tile), cta, cluster_shift);
  const int unmasked = line.unmasked(context, row_tile);
  wait_for_phase(checked, 0);
  const std::uint32_t parity = __shfl_sync(~0u, *parity_shared, 0);
  float reference[kRowsOfThread], sum[kRowsOfThread];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) reference[r] = kNothing, sum[r] = 0.0f;

  // As in sm90_rows.cuh: a pass issues the products with a tile's keys and with the values of the tile before, of
  // which only the first is awaited. For the first tile the product with V is of leftovers, which the next
  // overwrites.
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    wait_for_phase(full_k + i, parity);
    wgmma_keep(scores);
    keep_operands();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      Wgmma<T, kTile, 0, 0>::run(
          scores, swizzled_descriptor<kGroupStride>(q_operand + (step / 4 * (ROWS * 128) + step % 4 * 32) / 16),
          swizzled_descriptor(k_operand + (i * 2 * L::kTileBytes + step / 4 * (kTile * 128) + step % 4 * 32) / 16),
          step != 0);
    wgmma_commit();
    multiply_values(max(i - 1, 0), i > 1);
    wgmma_commit();

    const int base = (begin + i) * kTile;
    const bool masked = base + kTile > unmasked;
    std::uint64_t seen_by_any = ~0ull, bits[kRowsOfThread] = {};
    if (masked) {
      std::uint64_t mine = 0;
      if (lane < rows_of.nodes) mine = visible_bits_of(p, first_node + lane, context, live, base, [&] { return mask; });
      const std::uint64_t low = __reduce_or_sync(~0u, static_cast<unsigned>(mine));
      const std::uint64_t high = __reduce_or_sync(~0u, static_cast<unsigned>(mine >> 32));
      seen_by_any = high << 32 | low;
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r)
        bits[r] = __shfl_sync(~0u, static_cast<unsigned long long>(mine), (first_row + 8 * r) * node_factor >> 16);
    }
    wgmma_wait<1>();
    wgmma_keep(scores);
#pragma unroll
    for (int n = 0; n < kTile / 2; ++n)
      if (n / 2 % 2 < kRowsOfThread) scores[n] *= scale;
    if (masked) {
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        const std::uint64_t of_thread = bits[r] >> (lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < 8; ++n) {  // positions 8 * n + lane % 4 * 2 and the next
          const std::uint32_t two = static_cast<std::uint32_t>(of_thread >> (8 * n));
          if (!(two & 1u)) scores[4 * n + 2 * r] = __int_as_float(0xff800000);
          if (!(two & 2u)) scores[4 * n + 2 * r + 1] = __int_as_float(0xff800000);
        }
      }
    }
    float decay[kRowsOfThread];
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      float top[2] = {reference[r], reference[r]}, part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < 16; ++n) top[n % 2] = fmaxf(top[n % 2], scores[n / 2 * 4 + 2 * r + n % 2]);
      top[0] = fmaxf(top[0], top[1]);
      top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 1));
      top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 2));
      decay[r] = exp2_fast(reference[r] - top[0]);
      reference[r] = top[0];
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        float& score = scores[n / 2 * 4 + 2 * r + n % 2];
        score = exp2_fast(score - top[0]);
        part[n % 2] += score;
      }
      sum[r] = fmaf(sum[r], decay[r], part[0] + part[1]);
    }
    wgmma_keep(scores);
    // The loop of this wait keeps ptxas from moving the next one up, in front of the exponentials.
    wait_for_phase(full_v + i, parity);
    wgmma_wait<0>();
    keep_operands();
#pragma unroll
    for (int n = 0; n < D / 2; ++n)
      if (n / 2 % 2 < kRowsOfThread) acc[n] *= decay[n / 2 % 2 % kRowsOfThread];
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (n % 2 < kRowsOfThread) shares[step][n] = pack<T>(scores[8 * step + 2 * n], scores[8 * step + 2 * n + 1]);
    if (masked && seen_by_any != ~0ull) {  // a position that no row sees may hold NaN, and 0 * NaN would spread
      auto* values = reinterpret_cast<uint4*>(shared + L::kTiles + i * 2 * L::kTileBytes + L::kTileBytes);
#pragma unroll 1
      for (int n = threadIdx.x; n < L::kHalves * kTile * 8; n += kWarpgroup)
        if (!(seen_by_any >> (n / 8 % kTile) & 1)) values[n] = make_uint4(0, 0, 0, 0);
      ptx::fence_proxy_async(ptx::space_shared);
      named_barrier(1, kWarpgroup);
    }
  }
  keep_operands();
  wgmma_fence();
  multiply_values(max(tiles - 1, 0), tiles > 1);
  wgmma_commit();

  // A part: divided by its own sum and in 16 bits, as in parts.cuh. Two rows and 32 dims lie side by side, in the
  // order in which the lanes hold them. References and sums go first, while the last product runs.
  char* owner[kRowsOfThread];  // shared memory of the CTAs that own this thread's rows
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = first_row + 8 * r, local = row & (owned - 1);
    owner[r] = static_cast<char*>(__cluster_map_shared_rank(shared, row >> owned_shift));
    const float weight[2] = {reference[r], sum[r]};
    if (row < rows_of.rows && lane % 4 == 0)
      ptx::st_async(reinterpret_cast<float*>(owner[r] + L::kWeights + (local * kMostClusterCtas + cta) * 8), weight,
                    ClusterBarriers<L>(owner[r]).gathered);
  }
  wgmma_wait<0>();
  wgmma_keep(acc);
  if (tiles == 0) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) acc[i] = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int row = first_row + 8 * r, local = row & (owned - 1);
    if (row >= rows_of.rows) continue;
    char* target = owner[r] + L::kParts + (cta * owned + (local & ~1)) * (D * 2) + local % 2 * 64 + lane % 4 * 16;
    const float inverse = sum[r] > 0.0f ? reciprocal_fast(sum[r]) : 0.0f;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      auto word = [&](int n) {
        const int at = (slice * 4 + n) * 4 + 2 * r;
        return pack<T>(acc[at] * inverse, acc[at + 1] * inverse);
      };
      const std::uint32_t words[4] = {word(0), word(1), word(2), word(3)};
      ptx::st_async(reinterpret_cast<std::uint32_t*>(target + slice * 128), words,
                    ClusterBarriers<L>(owner[r]).gathered);
    }
  }

  const int i = lane % 16;
#pragma unroll 1
  for (int unit = warp; unit < owned / 2 * kSlices; unit += kWarpgroup / 32) {  // two rows, a half warp each
    const int pair = unit / kSlices, slice = unit % kSlices, local = pair * 2 + lane / 16, row = cta * owned + local;
    const int node_of_tile = row * node_factor >> 16, node = first_node + node_of_tile;
    const int q_head = head * rows_of.group + row - node_of_tile * rows_of.group;
    const bool written = row < rows_of.rows && node < p.nodes;
    T* out = static_cast<T*>(p.out) + request * p.out_strides.batch +
             static_cast<std::int64_t>(node) * p.out_strides.token +
             static_cast<std::int64_t>(q_head) * p.out_strides.head + slice * 32;
    const auto* words =
        reinterpret_cast<const std::uint32_t*>(shared + L::kParts) + unit * 32 + lane / 16 * 16 + i % 4 * 4 + i / 4;
    while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, gathered, 0)) {
    }
    float2 weight = make_float2(kNothing, 0.0f);  // a reference and a sum
    if (i < ctas) weight = reinterpret_cast<const float2*>(shared + L::kWeights)[local * kMostClusterCtas + i];
    float top = weight.x;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    weight.y *= exp2_fast(weight.x - top);
    float total = weight.y;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    const bool seen = node < live && total != 0.0f;
    const float of_total = weight.y * reciprocal_fast(total);
    float2 value = make_float2(0.0f, 0.0f);
    int first = 0;
#pragma unroll 1
    do {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float2 of_part = unpack<T>(words[(first + part) * owned * (D / 2)]);
        const float factor = __shfl_sync(~0u, of_total, first + part, 16);
        value.x = fmaf(of_part.x, factor, value.x);
        value.y = fmaf(of_part.y, factor, value.y);
      }
      first += 4;
    } while (first < ctas);
    if (!written) continue;
    reinterpret_cast<std::uint32_t*>(out)[i] = seen ? pack<T>(value.x, value.y) : 0u;
    if (p.lse != nullptr && slice == 0 && i == 0)
      p.lse[(static_cast<std::int64_t>(request) * p.nodes + node) * p.q_heads + q_head] =
          seen ? (top + __log2f(total)) * 0.6931471805599453f : __int_as_float(0xff800000);
  }
#endif
}

}  // namespace specvlm
