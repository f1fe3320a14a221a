// Tree attention with warp-wide matrix products (sm_80 and newer): S = Q K^T, O += P V, any strides, pages of any size.
//
// A CTA holds up to 128 packed rows (node, head of the group), 16 a warp, with Q and O in registers. K and V arrive
// through a ring of tiles in shared memory, filled by cp.async ahead of the arithmetic and across the borders of items.
// The tiles of all requests, heads and row tiles form one line (line.cuh) that is cut evenly among the CTAs; an item
// that several of them share is put together by a second kernel (sm80_combine.cuh), in a fixed order.
#pragma once

#include <cstdint>

#include "common/ampere.cuh"
#include "common/numeric.cuh"
#include "tree_attention/sm80_combine.cuh"
#include "tree_attention/sm80_shapes.h"
#include "tree_attention/sm80_walk.cuh"

namespace specvlm {

constexpr float kSlack = 8.0f;  // how far (log2) a score may exceed its row's reference before sums are scaled
constexpr float kMinusInfinity = -__builtin_huge_valf();

template <int D, int WARPS_M, int WARPS_N>
struct Sm80Layout {
  static constexpr Sm80Shape kShape{WARPS_M, WARPS_N};
  static constexpr int kWarps = kShape.warps();
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kShape.rows();
  static constexpr int kResident = kShape.resident(D);
  static constexpr int kStages = kShape.stages(D);
  static constexpr int kSlice = kTile / WARPS_N;                     // positions of a tile per warp
  static constexpr int kAtOnce = D == 64 || kWarps > 6 ? 32 : 16;    // as many of them as the registers hold scores of
  static constexpr int kPart = kSlice < kAtOnce ? kSlice : kAtOnce;  // of these at a time
  static constexpr int kRowBytes = D * 2;  // of K and V; 16-byte chunk c of row r lies at c ^ (r % 8)
  static constexpr int kTileBytes = kShape.tile_bytes(D), kRingBytes = kStages * kTileBytes;  // of K, and of V
  static constexpr int kState = kShape.state_offset(D), kMerge = kShape.merge_offset(D);
};

// What all lanes of a warp agree on, and what they hand each other. In shared memory: registers are scarce.
struct WarpState {
  WalkTile load;                                  // to ask for next
  WalkTile ring[3];                               // in the stages of the ring
  int node[16], q_head[16];                       // of the warp's rows; node is -1 for a row without one
  float reference[16], total[16];                 // of the warp's rows
  std::uint64_t seen_by_row[16], seen_by_any[2];  // of a masked tile: bits of its positions; [tile % 2]
};
static_assert(sizeof(WarpState) == kSm80StateBytes, "sm80_shapes.h reserves it");

// Fills the ring. Lane i keeps the outer index (request or page) of positions i and i+32 of the tile to ask for next,
// looked up while the tile before it is on its way.
template <typename T, int D, int WARPS>
struct KvLoader {
  static constexpr int kChunks = D / 8;             // 16-byte chunks of a row
  static constexpr int kWarpRows = 32 / kChunks;    // rows that a warp copies at a time
  static constexpr int kSteps = kTile / kWarpRows;  // to copy a tile

  const ItemLine& line;
  WarpState& state;
  int outer[2];

  // Sets the tile to ask for next, and looks up its positions.
  __device__ __forceinline__ void set(const WalkTile& t) {
    const TreeAttentionParams& p = line.p;
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane == 0) state.load = t;
    __syncwarp();
    outer[0] = outer[1] = t.request;
    if (p.page_table != nullptr && t.left > 0) {
      const std::int32_t* table = p.page_table + t.request * p.page_table_stride;
      const int position = t.index * kTile + lane, shift = 31 - __clz(p.page_size);
      outer[0] = min(max(table[min(position, t.end - 1) >> shift], 0), p.pages - 1);
      outer[1] = min(max(table[min(position + 32, t.end - 1) >> shift], 0), p.pages - 1);
    }
  }

  // Asks for the next tile; closes a group of copies even where there is none. heads_per_kv: that share a head of K.
  __device__ __forceinline__ void issue(int stage, std::uint32_t k_stage, std::uint32_t v_stage, int heads_per_kv) {
    const TreeAttentionParams& p = line.p;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = lane % kChunks;
    WalkTile t = state.load;
    if (lane == 0) state.ring[stage] = t;
    __syncwarp();
    if (t.left > 0) {
      const int inner_mask = p.page_table == nullptr ? ~0 : p.page_size - 1;
      const int kv_head = heads_per_kv == 1 ? t.head : t.head / heads_per_kv;
      const T* k = static_cast<const T*>(p.k) + kv_head * p.k_strides.head + chunk * 8;
      const T* v = static_cast<const T*>(p.v) + kv_head * p.v_strides.head + chunk * 8;
#pragma unroll 2
      for (int step = warp; step < kSteps; step += WARPS) {
        const int row = step * kWarpRows + lane / kChunks, position = t.index * kTile + row;
        const int low = __shfl_sync(~0u, outer[0], row % 32), high = __shfl_sync(~0u, outer[1], row % 32);
        const std::int64_t out = row < 32 ? low : high, in = min(position, t.end - 1) & inner_mask;
        const int bytes = position < t.end ? 16 : 0;
        const std::uint32_t target = row * (D * 2) + (chunk ^ (row % 8)) * 16;
        copy_async(k_stage + target, k + (out * p.k_strides.batch + in * p.k_strides.token), bytes);
        copy_async(v_stage + target, v + (out * p.v_strides.batch + in * p.v_strides.token), bytes);
      }
      ++t.index;
      --t.left;
      find_tile(line, t);
      set(t);
    }
    copy_async_commit();
  }
};

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

// A row's softmax denominator over the lanes that share it; `sum` is negative where the row has seen nothing.
__device__ __forceinline__ float row_total(float sum) {
  float total = sum < 0 ? 0.0f : sum;
  total += __shfl_xor_sync(~0u, total, 1);
  return total + __shfl_xor_sync(~0u, total, 2);
}

// Writes rows that one warp has all positions of.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const TreeAttentionParams& p, const Sm80Parts<D>& parts,
                                           const WarpState& state, const WalkTile& t, const float (&acc)[D / 8][4],
                                           const float (&reference)[2], const float (&sum)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = row_total(sum[h]);
    const int row = lane / 4 + 8 * h, node = state.node[row];
    const bool seen = node < t.live && total != 0.0f;  // NaN is seen
    const float inverse = 1.0f / total;
    if (node >= 0) {
      const RowTarget<T, D> target(p, parts, t, node, state.q_head[row], warp * 16 + row);
      if (lane % 4 == 0) target.store_lse(seen ? reference[h] + log2f(total) : kMinusInfinity);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        target.store(j * 8 + lane % 4 * 2, seen ? acc[j][2 * h] * inverse : 0.0f,
                     seen ? acc[j][2 * h + 1] * inverse : 0.0f);
    }
  }
}

// Writes rows whose positions several warps share: adds their results in the order of the positions, 32 dims at a time.
template <typename T, int D, int WARPS_M, int WARPS_N>
__device__ __forceinline__ void merge_and_store_rows(const TreeAttentionParams& p, const Sm80Parts<D>& parts,
                                                     WarpState* states, const WalkTile& t, const float (&acc)[D / 8][4],
                                                     const float (&reference)[2], const float (&sum)[2], float* merge) {
  using L = Sm80Layout<D, WARPS_M, WARPS_N>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = row_total(sum[h]);
    if (lane % 4 == 0) {
      states[warp].reference[lane / 4 + 8 * h] = reference[h];
      states[warp].total[lane / 4 + 8 * h] = total;
    }
  }
  __syncthreads();

  // of a row: the highest reference, and the total relative to it
  auto whole_of = [&](int row) {
    float2 whole = make_float2(kMinusInfinity, 0.0f);
#pragma unroll
    for (int n = 0; n < WARPS_N; ++n) {
      const WarpState& state = states[n * WARPS_M + row / 16];
      if (state.total[row % 16] != 0.0f) whole.x = fmaxf(whole.x, state.reference[row % 16]);
    }
#pragma unroll
    for (int n = 0; n < WARPS_N; ++n) {
      const WarpState& state = states[n * WARPS_M + row / 16];
      if (state.total[row % 16] != 0.0f)
        whole.y += state.total[row % 16] * exp2_fast(state.reference[row % 16] - whole.x);
    }
    return whole;
  };
  float weight[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float top = whole_of(warp % WARPS_M * 16 + lane / 4 + 8 * h).x;
    weight[h] = states[warp].total[lane / 4 + 8 * h] != 0.0f ? exp2_fast(reference[h] - top) : 0.0f;
  }

#pragma unroll
  for (int d = 0; d < D; d += 32) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* value = &acc[d / 8 + j][2 * h];
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
      for (int n = 0; n < WARPS_N; ++n) {
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

// scale: of scores in log2. heads_per_kv: 1, or into how many heads each head of K and V was cut, so that a group fits.
template <typename T, int D, int WARPS_M, int WARPS_N>
__global__ void __launch_bounds__(Sm80Layout<D, WARPS_M, WARPS_N>::kThreads, Sm80Layout<D, WARPS_M, WARPS_N>::kResident)
    tree_attention_sm80_kernel(const __grid_constant__ TreeAttentionParams p, const __grid_constant__ RowTiles rows_of,
                               const __grid_constant__ Sm80Parts<D> parts, float scale, int heads_per_kv) {
  using L = Sm80Layout<D, WARPS_M, WARPS_N>;
  extern __shared__ __align__(1024) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* states = reinterpret_cast<WarpState*>(shared + L::kState);
  WarpState& state = states[warp];
  const ItemLine line(p, rows_of);
  KvLoader<T, D, L::kWarps> loader{line, state, {}};
  {
    const Cut cut(parts.ctas, warp_units(line));
    const int cta = static_cast<int>(blockIdx.x);
    if (cta >= cut.ctas) return;
    loader.set(first_tile(line, cut.start(cta), cut.start(cta + 1) - cut.start(cta)));
  }

  const int slice = warp / WARPS_M * L::kSlice;  // this warp's first position in a tile
  const std::uint32_t k_ring = shared_address(shared);
  // this lane's row for load_matrices, of K: positions 0-7 (chunks 0, 1) and 8-15 (0, 1); of V, transposed: positions
  // 0-7 and 8-15 of chunk 0, then of chunk 1
  const std::uint32_t k_lane = (slice + lane / 16 * 8 + lane % 8) * L::kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  const std::uint32_t v_lane = (slice + lane / 8 % 2 * 8 + lane % 8) * L::kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;

  std::uint32_t q[D / 16][4];
  float acc[D / 8][4], reference[2], sum[2];  // sum < 0: the row has no reference yet
  int stage = 0;                              // to compute next
#pragma unroll 1
  for (int asked = 0;;) {  // tiles, until the ring is full
    const bool computes = asked == L::kStages - 1;
    const WalkTile& t = state.ring[stage];
    if (computes) {
      if (t.left == 0) break;
      if (t.index == t.begin) {
        __syncwarp();
        if (lane < 16) {
          const int row = warp % WARPS_M * 16 + lane, node = row / rows_of.group;
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
      if ((t.index + 1) * kTile > t.unmasked) {
        std::uint64_t bits = 0;
        __syncwarp();
        if (lane < 16) {
          if (state.node[lane] >= 0)
            bits = visible_bits(p, t.request, state.node[lane], t.context, t.live, t.index * kTile);
          state.seen_by_row[lane] = bits;
        }
        const std::uint32_t low = __reduce_or_sync(~0u, static_cast<std::uint32_t>(bits));
        const std::uint32_t high = __reduce_or_sync(~0u, static_cast<std::uint32_t>(bits >> 32));
        if (lane == 0) state.seen_by_any[t.index % 2] = static_cast<std::uint64_t>(high) << 32 | low;
      }
      copy_async_wait<L::kStages - 2>();
      __syncthreads();  // the tile is there for all, and all are done with the tile before it
    }
    const int free_stage = !computes ? asked : stage == 0 ? L::kStages - 1 : stage - 1;
    const std::uint32_t free_tile = k_ring + free_stage * L::kTileBytes;
    loader.issue(free_stage, free_tile, free_tile + L::kRingBytes, heads_per_kv);
    if (!computes) {
      ++asked;
      continue;
    }

    const bool masked = (t.index + 1) * kTile > t.unmasked;
    if (masked && p.tree_mask != nullptr) {        // a node that no row sees may hold NaN, and 0 * NaN would spread
      const int inside = t.end - t.index * kTile;  // positions from there on are zeros already
      std::uint64_t unseen = inside >= kTile ? ~0ull : (1ull << inside) - 1;
#pragma unroll
      for (int w = 0; w < WARPS_M; ++w) unseen &= ~states[w].seen_by_any[t.index % 2];
      if (unseen != 0) {
        auto* v_tile = reinterpret_cast<uint4*>(shared + stage * L::kTileBytes + L::kRingBytes);
#pragma unroll 1
        for (int i = threadIdx.x; i < kTile * (D / 8); i += L::kThreads)
          if (unseen >> (i / (D / 8)) & 1) v_tile[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
      }
    }

#pragma unroll 1
    for (int part = 0; part < L::kSlice; part += L::kPart) {
      const std::uint32_t tile = k_ring + stage * L::kTileBytes + part * L::kRowBytes;
      float s[L::kPart / 8][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
#pragma unroll
        for (int j = 0; j < L::kPart / 8; j += 2) {
          std::uint32_t k[4];
          load_matrices(k, ((tile + k_lane) ^ (step * 32)) + j * 8 * L::kRowBytes);
          multiply_add<T>(s[j], q[step], k[0], k[1]);
          multiply_add<T>(s[j + 1], q[step], k[2], k[3]);
        }
      }

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
      if (masked) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto* bits = reinterpret_cast<const std::uint32_t*>(&state.seen_by_row[lane / 4 + 8 * h]);
          const std::uint32_t seen = bits[(slice + part) / 32] >> ((slice + part) % 32 + lane % 4 * 2);
#pragma unroll
          for (int j = 0; j < L::kPart / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (!(seen >> (8 * j + c) & 1)) s[j][2 * h + c] = kMinusInfinity;
        }
      }
      // References only move when a score is far above its own, which hardly ever happens after the first tile.
      if (__any_sync(~0u, worst > kSlack || masked || sum[0] < 0 || sum[1] < 0)) {
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

      std::uint32_t weights[L::kPart / 16][4];
#pragma unroll
      for (int j = 0; j < L::kPart / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s[j][c] = exp2_fast(s[j][c]);
        sum[0] += s[j][0] + s[j][1];
        sum[1] += s[j][2] + s[j][3];
        weights[j / 2][j % 2 * 2] = pack<T>(s[j][0], s[j][1]);
        weights[j / 2][j % 2 * 2 + 1] = pack<T>(s[j][2], s[j][3]);
      }
#pragma unroll
      for (int step = 0; step < L::kPart / 16; ++step) {
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
          std::uint32_t v[4];
          load_matrices_transposed(v, ((tile + L::kRingBytes + v_lane) ^ (j * 16)) + step * 16 * L::kRowBytes);
          multiply_add<T>(acc[j], weights[step], v[0], v[1]);
          multiply_add<T>(acc[j + 1], weights[step], v[2], v[3]);
        }
      }
    }

    if (t.left == 1) {
      if constexpr (WARPS_N == 1)
        store_rows<T, D>(p, parts, state, t, acc, reference, sum);
      else
        merge_and_store_rows<T, D, WARPS_M, WARPS_N>(p, parts, states, t, acc, reference, sum,
                                                     reinterpret_cast<float*>(shared + L::kMerge));
    }
    stage = stage + 1 == L::kStages ? 0 : stage + 1;
  }
}

}  // namespace specvlm
