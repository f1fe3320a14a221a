// What the last CTA of a request does with the masses of all tiles: the walk from the root, then the draw of the next
// token from what the children of the last node leave.
#pragma once

#include "verify_sample/mass.cuh"

namespace specvlm {

// Which tokens of a tile pass top_k and top_p.
struct Kept {
  float cut;
  int last;
  __device__ __forceinline__ bool operator()(float logit, int token) const {
    return logit > cut || (logit == cut && token <= last);
  }
};

// In shared memory, for every node of the tree.
struct SampleNode {
  double total;       // mass of its row, in units of a token with the logit `top`
  double share;       // its own mass in its parent's row, in the same units of that row
  std::int64_t mass;  // its own mass in its tile of its parent's row; 0 for the second of equal siblings
  float top;          // of its row
  float tile_top;     // of that tile
  float coin;
  int parent;  // -1 for a node that nothing leads to
  int token;
};

__device__ __forceinline__ SampleEntry load_entry(const SampleEntry* address) {
  const int4 words = __ldcg(reinterpret_cast<const int4*>(address));
  SampleEntry entry;
  entry.mass = static_cast<std::int64_t>(words.y) << 32 | static_cast<std::uint32_t>(words.x);
  entry.top = __int_as_float(words.z);
  entry.last = words.w;
  return entry;
}

__device__ __forceinline__ void subtract(std::int64_t* sum, std::int64_t mass) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(-mass));
}

template <typename T, bool FILTERED>
struct SampleTree {
  using Tile = LogitsTile<T, kSamplePerThread>;
  static constexpr int kSlots = Tile::kVectors * kLogitsWarps;  // what one warp reads at once: 32 vectors
  static constexpr int kSlotSize = 32 * Tile::kPerVector;

  const VerifySampleParams& p;
  const std::int64_t* tokens;
  const std::int32_t* parents;
  const float* coins;
  const SampleEntry* entries;  // [N,parts]
  const SampleState* states;   // [N]
  std::int64_t request;
  int parts;

  __device__ __forceinline__ SampleTree(const VerifySampleParams& p, const SampleWorkspace& workspace,
                                        std::int64_t request, int parts)
      : p(p),
        tokens(p.tokens + request * p.tokens_stride),
        parents(p.parents + request * p.parents_stride),
        coins(p.coins + request * p.coins_stride),
        entries(workspace.entries + request * p.nodes * parts),
        states(workspace.states + request * p.nodes),
        request(request),
        parts(parts) {}

  __device__ __forceinline__ const T* row(int node) const {
    return static_cast<const T*>(p.logits) + request * p.batch_stride + node * p.node_stride;
  }
  // Where a token lies in its row's tiles, which begin at a multiple of 16 bytes.
  __device__ __forceinline__ int place(int node, int token) const {
    return token + static_cast<int>(reinterpret_cast<std::uintptr_t>(row(node)) % 16 / sizeof(T));
  }
  __device__ __forceinline__ Kept kept(int node, const SampleEntry& entry) const {
    return {states[node].cut, entry.last};
  }
  // Units of one tile's masses in those of another with a top that is not lower.
  __device__ __forceinline__ double scale(float tile_top, float top) const {
    return exp2((static_cast<double>(tile_top) - top) * p.factor);
  }

  __device__ __forceinline__ void verify(const Share& share) const {
    extern __shared__ SampleNode nodes[];
    __shared__ int last_node, length;
    load_children(nodes, share);
    sum_rows(nodes);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.nodes; i += kLogitsThreads) {
      const bool some = nodes[i].mass > 0;
      nodes[i].share = some ? nodes[i].mass * scale(nodes[i].tile_top, nodes[nodes[i].parent].top) : 0.0;
    }
    __syncthreads();
    if (threadIdx.x < 32) walk(nodes, last_node, length);
    __syncthreads();
    std::int32_t* path = p.path + request * p.path_stride;
#pragma unroll 1
    for (int i = length + threadIdx.x; i < p.nodes; i += kLogitsThreads) path[i] = -1;
    if (threadIdx.x == 0) p.length[request] = length;
    draw(nodes, last_node, share);
  }

 private:
  // All of a SampleNode but `total`, `share` and `top`.
  __device__ __forceinline__ void load_children(SampleNode* nodes, const Share& share) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.nodes; i += kLogitsThreads) {
      const int parent = parents[i];
      const std::int64_t token = tokens[i];
      const bool real = parent >= 0 && parent < i && token >= 0 && token < p.vocab;
      SampleNode& node = nodes[i];
      node.coin = coins[i];
      node.parent = real ? parent : -1;
      node.token = real ? static_cast<int>(token) : -1;
      node.mass = 0;
      node.tile_top = 0.0f;
      if (real) {
        const float logit = load_logit(row(parent) + token);
        const SampleEntry tile = load_entry(entries + parent * parts + place(parent, node.token) / Tile::kSize);
        node.tile_top = tile.top;
        if (!FILTERED || kept(parent, tile)(logit, node.token)) node.mass = share.mass(logit, tile.top);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.nodes; i += kLogitsThreads) {
      const int parent = nodes[i].parent, token = nodes[i].token;
      if (parent < 0) continue;
      bool second = false;
#pragma unroll 4
      for (int j = parent + 1; j < i; ++j) second |= nodes[j].parent == parent && nodes[j].token == token;
      if (second) nodes[i].mass = 0;
    }
  }

  // `total` and `top` of every node, always in the same order.
  __device__ __forceinline__ void sum_rows(SampleNode* nodes) const {
    constexpr int kLanes = 8, kDeep = 4;  // lanes per node, loads of each in flight
#pragma unroll 1
    for (int first = 0; first < p.nodes; first += kLogitsThreads / kLanes) {
      const int u = first + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
      const SampleEntry* tiles = entries + u * parts;
      float top = __uint_as_float(0xFF800000);
      double total = 0.0;  // in units of `top`
#pragma unroll 1
      for (int start = lane; u < p.nodes && start < parts; start += kLanes * kDeep) {
        SampleEntry some[kDeep];
        float higher = top;
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
          some[i] = {0, top, 0};
          if (start + i * kLanes < parts) some[i] = load_entry(tiles + start + i * kLanes);
          higher = fmaxf(higher, some[i].top);
        }
        if (total > 0.0) total *= scale(top, higher);
        top = higher;
#pragma unroll
        for (int i = 0; i < kDeep; ++i) total += scaled(some[i], top);
      }
      float higher = top;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
      if (total > 0.0) total *= scale(top, higher);
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      if (u < p.nodes && lane == 0) {
        nodes[u].total = total;
        nodes[u].top = higher;
      }
    }
  }

  // A tile's mass in units of a token with the logit `top`; 0 in a row with an infinite top, which has no distribution.
  __device__ __forceinline__ double scaled(const SampleEntry& tile, float top) const {
    return tile.mass > 0 ? static_cast<double>(tile.mass) * scale(tile.top, top) : 0.0;
  }

  // One warp. A child's interval ends at the sum of its own and the lower siblings' masses.
  __device__ __forceinline__ void walk(const SampleNode* nodes, int& last_node, int& length) const {
    const int lane = threadIdx.x;
    std::int32_t* path = p.path + request * p.path_stride;
    int node = 0, count = 0;
    bool walking = true;
#pragma unroll 1
    while (walking) {  // ends: a child lies above its parent
      const double total = nodes[node].total, goal = nodes[node].coin * total;
      double below = 0.0;
      walking = false;
#pragma unroll 1
      for (int first = node + 1; first < p.nodes && !walking; first += 32) {
        const int i = first + lane;
        const double share = i < p.nodes && nodes[i].parent == node ? nodes[i].share : 0.0;
        const double reach = below + warp_prefix(share);
        const bool nothing_else = reach * (1.0 + 0x1p-40) >= total;  // then a coin cannot fall past it
        const unsigned taken = __ballot_sync(~0u, share > 0.0 && (goal < reach || nothing_else));
        below = __shfl_sync(~0u, reach, 31);
        if (taken != 0) {
          node = first + __ffs(taken) - 1;
          if (lane == 0) path[count] = node;
          ++count;
          walking = true;
        }
      }
    }
    if (lane == 0) {
      last_node = node;
      length = count;
    }
  }

  // next_token: first the tile where the sum of what is left passes the coin's share of it, then the warp's 32 vectors,
  // then the token.
  __device__ __forceinline__ void draw(const SampleNode* nodes, int node, const Share& share) const {
    __shared__ SampleEntry left[kSampleMaxParts];
    __shared__ double reach[kSampleMaxParts];
    __shared__ std::int64_t left_of_slot[kSlots];
    __shared__ std::int64_t goal_in_tile;
    __shared__ int chosen_tile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float coin = coins[p.nodes], top = nodes[node].top;
    const SampleEntry* tiles = entries + node * parts;
    if (static_cast<int>(threadIdx.x) < parts) left[threadIdx.x] = load_entry(tiles + threadIdx.x);
    if (static_cast<int>(threadIdx.x) < kSlots) left_of_slot[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = node + 1 + threadIdx.x; i < p.nodes; i += kLogitsThreads) {
      if (nodes[i].parent == node && nodes[i].mass > 0) {
        subtract(&left[place(node, nodes[i].token) / Tile::kSize].mass, nodes[i].mass);
      }
    }
    __syncthreads();
    if (warp == 0) {
      double below = 0.0;
#pragma unroll 1
      for (int first = 0; first < parts; first += 32) {
        below += warp_prefix(first + lane < parts ? scaled(left[first + lane], top) : 0.0);
        if (first + lane < parts) reach[first + lane] = below;
        below = __shfl_sync(~0u, below, 31);
      }
      __syncwarp();
      const double goal = coin * below;
      int tile = parts;
#pragma unroll 1
      for (int first = 0; first < parts && tile == parts; first += 32) {
        const int i = first + lane;
        const unsigned past = __ballot_sync(~0u, i < parts && left[i].mass > 0 && reach[i] > goal);
        if (past != 0) tile = first + __ffs(past) - 1;
      }
      if (lane == 0) {
        chosen_tile = tile;
        if (tile < parts) {  // the draw takes the first token whose sum within the tile exceeds goal_in_tile
          const double within = (goal - (tile > 0 ? reach[tile - 1] : 0.0)) / scale(left[tile].top, top);
          const double most = static_cast<double>(left[tile].mass - 1);
          goal_in_tile = static_cast<std::int64_t>(fmin(fmax(within, 0.0), most));
        }
      }
    }
    __syncthreads();
    if (chosen_tile == parts) {  // no distribution, or a coin that is none
      if (threadIdx.x == 0) p.next_token[request] = p.vocab - 1;
      return;
    }

    const SampleEntry entry = left[chosen_tile];
    const Kept keeps = FILTERED ? kept(node, entry) : Kept{};
    const Tile tile(row(node), chosen_tile, p.vocab);
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
      MassSum sum;
#pragma unroll
      for (int e = 0; e < Tile::kPerVector; ++e) {
        const float logit = tile.logit(v, e);
        if (!FILTERED || keeps(logit, tile.token(v, e))) sum.add(share(logit, entry.top));
      }
      const std::int64_t of_warp = sum.warp_total();
      if (lane == 0) subtract(left_of_slot + v * kLogitsWarps + warp, -of_warp);
    }
#pragma unroll 1
    for (int i = node + 1 + threadIdx.x; i < p.nodes; i += kLogitsThreads) {
      const int within = place(node, nodes[i].token) - chosen_tile * Tile::kSize;
      if (nodes[i].parent == node && nodes[i].mass > 0 && within >= 0 && within < Tile::kSize) {
        subtract(left_of_slot + within / kSlotSize, nodes[i].mass);
      }
    }
    __syncthreads();
    if (warp != 0) return;

    // one warp: the slot, then the lane, then the element
    std::int64_t goal = goal_in_tile, below = 0;
    int slot = kSlots - 1;
#pragma unroll 1
    for (int first = 0; first < kSlots; first += 32) {
      const std::int64_t upto = below + warp_prefix(left_of_slot[first + lane]);
      const unsigned past = __ballot_sync(~0u, upto > goal);
      if (past != 0) {
        slot = first + __ffs(past) - 1;
        goal -= __shfl_sync(~0u, upto - left_of_slot[first + lane], __ffs(past) - 1);
        break;
      }
      below = __shfl_sync(~0u, upto, 31);
    }
    const int shift = place(node, 0), start = chosen_tile * Tile::kSize + slot * kSlotSize - shift;
    const int mine = start + lane * Tile::kPerVector;
    unsigned gone = 0;
#pragma unroll 1
    for (int i = node + 1; i < p.nodes; ++i) {
      const int within = nodes[i].token - mine;
      if (nodes[i].parent == node && within >= 0 && within < Tile::kPerVector) gone |= 1u << within;
    }
    std::int64_t of_lane = 0;
#pragma unroll
    for (int e = 0; e < Tile::kPerVector; ++e) {
      of_lane += mass_of(node, mine + e, gone >> e & 1, entry.top, keeps, share);
    }
    const std::int64_t upto = warp_prefix(of_lane);
    const unsigned past = __ballot_sync(~0u, upto > goal);
    if (lane == (past != 0 ? __ffs(past) - 1 : 31)) {
      std::int64_t sum = upto - of_lane;
      int found = p.vocab - 1;
#pragma unroll 1
      for (int e = 0; e < Tile::kPerVector; ++e) {
        sum += mass_of(node, mine + e, gone >> e & 1, entry.top, keeps, share);
        if (sum > goal) {
          found = mine + e;
          break;
        }
      }
      p.next_token[request] = found;
    }
  }

  __device__ __forceinline__ std::int64_t mass_of(int node, int token, bool gone, float top, const Kept& keeps,
                                                  const Share& share) const {
    if (gone || token < 0 || token >= p.vocab) return 0;
    const float logit = load_logit(row(node) + token);
    return !FILTERED || keeps(logit, token) ? share.mass(logit, top) : 0;
  }
};

}  // namespace specvlm
