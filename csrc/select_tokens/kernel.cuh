// The scores of a row are read once, by one or more CTAs; the keys stay in shared memory through both stages.
#pragma once

#include "common/overlap.cuh"
#include "select_tokens/search.cuh"

namespace specvlm {

// The tokens of stage II have ranks floor(j * (left-1) / (wanted-1)) among the `left` ones in index order.
struct EvenSpread {
  int step, period;  // rank r is taken if ceil(r * step / period) * period - r * step < step
  float ratio;

  __device__ EvenSpread(int left, int wanted) {
    step = wanted > 1 ? wanted - 1 : wanted;
    period = wanted > 1 ? left - 1 : max(left, 1);  // wanted = 1: rank 0 alone
    ratio = static_cast<float>(step) / static_cast<float>(period);
  }

  // How many ranks below r are taken: ceil(r * step / period); rest: that times period, minus r * step.
  __device__ __forceinline__ int taken_before(int r, int& rest) const {
    // r and the quotient are below 2^23, so the product is wrong by at most 1/2
    int taken = static_cast<int>(static_cast<float>(r) * ratio) + 1;
    rest = static_cast<int>(static_cast<unsigned>(taken) * period - static_cast<unsigned>(r) * step);
    if (rest < 0) {
      ++taken;
      rest += period;
    } else if (rest >= period) {
      --taken;
      rest -= period;
    }
    return taken;
  }
};

// Writes this CTA's chosen tokens to their places, and -1 to those that no candidate is left for.
template <typename Team, typename Tile>
__device__ __forceinline__ void emit(const SelectTokensParams& p, Team& team, const Tile& tile, const SelectCut& cut,
                                     std::int64_t row, SelectShared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // each warp takes consecutive tokens, so that places follow from sums over the CTAs and warps before
  const int steps = tile.vectors / 32, steps_per_warp = (steps + kSelectWarps - 1) / kSelectWarps;
  const int first_step = min(warp * steps_per_warp, steps), end_step = min(first_step + steps_per_warp, steps);
  int above = 0, equal = 0, live = 0;
#pragma unroll 1
  for (int step = first_step; step < end_step; ++step) {
    const uint4 four = tile.keys(step * 32 + lane);
    for (const std::uint32_t key : {four.x, four.y, four.z, four.w}) {
      above += key >> cut.shift > cut.prefix;
      equal += key >> cut.shift == cut.prefix;
      live += key != 0;
    }
  }
  above = __reduce_add_sync(~0u, above);
  equal = __reduce_add_sync(~0u, equal);
  live = __reduce_add_sync(~0u, live);
  if (lane == 0) {
    s.above_by_warp[warp] = above;
    s.equal_by_warp[warp] = equal;
    s.live_by_warp[warp] = live;
  }
  __syncthreads();
  const unsigned of_above = lane < kSelectWarps ? s.above_by_warp[lane] : 0;
  const unsigned of_equal = lane < kSelectWarps ? s.equal_by_warp[lane] : 0;
  const unsigned of_live = lane < kSelectWarps ? s.live_by_warp[lane] : 0;
  if (warp == 0) {
    team.post(1,
              {__reduce_add_sync(~0u, of_above), __reduce_add_sync(~0u, of_equal), __reduce_add_sync(~0u, of_live), 0});
  }
  team.await_posts(1);
  uint4 before = {lane < warp ? of_above : 0, lane < warp ? of_equal : 0, lane < warp ? of_live : 0, 0};
  team.for_posts(1, [&](const uint4& sums, int cta) {
    if (cta < team.rank) {
      before.x += sums.x;
      before.y += sums.y;
      before.z += sums.z;
    }
    before.w += sums.z;
  });
  int above_before = __reduce_add_sync(~0u, before.x), equal_before = __reduce_add_sync(~0u, before.y);
  int live_before = __reduce_add_sync(~0u, before.z);
  const int count = __reduce_add_sync(~0u, before.w);

  const int first_stage = cut.above + cut.ties, left = count - first_stage;
  const EvenSpread spread(left, min(p.keep - first_stage, left));
  std::int64_t* indices = p.indices + row * p.indices_stride;
#pragma unroll 1
  for (int step = first_step; step < end_step; ++step) {
    const uint4 four = tile.keys(step * 32 + lane);
    const std::uint32_t keys[4] = {four.x, four.y, four.z, four.w};
    unsigned fields = 0;  // three counts of 10 bits
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      fields +=
          (keys[e] >> cut.shift > cut.prefix) + ((keys[e] >> cut.shift == cut.prefix) << 10) + ((keys[e] != 0) << 20);
    }
    const unsigned to = warp_prefix(fields, 32), all = __shfl_sync(~0u, to, 31), from = to - fields;
    const int my_above = above_before + static_cast<int>(from & 0x3FF);
    int my_equal = equal_before + static_cast<int>(from >> 10 & 0x3FF);
    const int chosen = my_above + min(my_equal, cut.ties);  // in stage I, before this lane
    int rest;
    int place = chosen + spread.taken_before(live_before + static_cast<int>(from >> 20) - chosen, rest);
    const int token = tile.first + 4 * (step * 32 + lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const std::uint32_t bits = keys[e] >> cut.shift;
      bool take = bits > cut.prefix;
      if (bits == cut.prefix) take = my_equal++ < cut.ties;
      if (!take && keys[e] != 0) {
        take = rest < spread.step;
        rest += (take ? spread.period : 0) - spread.step;
      }
      if (take) indices[place++] = token + e;
    }
    above_before += all & 0x3FF;
    equal_before += all >> 10 & 0x3FF;
    live_before += all >> 20;
  }
#pragma unroll 1
  for (int i = min(p.keep, count) + team.rank * kSelectThreads + static_cast<int>(threadIdx.x); i < p.keep;
       i += team.ctas * kSelectThreads) {
    indices[i] = -1;
  }
  if (team.rank == 0 && threadIdx.x == 0) p.num_attention[row] = first_stage;
}

template <SelectTokensKernel KERNEL, bool RESIDENT>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_tokens_kernel(const __grid_constant__ SelectTokensParams p, int slots) {
  extern __shared__ uint4 dynamic[];
  SelectShared& s = *reinterpret_cast<SelectShared*>(dynamic);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row = blockIdx.y;
  SelectTeam<KERNEL> team(p, s.posts);
  reinterpret_cast<uint4*>(s.counts)[threadIdx.x] = {0, 0, 0, 0};
  reinterpret_cast<uint4*>(s.low_bits)[threadIdx.x] = {0, 0, 0, 0};
  if (threadIdx.x == 0) s.rest_mass = 0;
  wait_for_launch_before();  // what is above overlaps with the kernel before
  let_next_launch_start();
  const SelectTile<RESIDENT> tile(p, row, blockIdx.x, slots, dynamic + sizeof(SelectShared) / sizeof(uint4));
  tile.request();
  if constexpr (!team.kAlone) {
    uint4* sums = reinterpret_cast<uint4*>(team.sums);
#pragma unroll 1
    for (int i = team.rank * kSelectThreads + static_cast<int>(threadIdx.x); i < kSelectSums / 2;
         i += team.ctas * kSelectThreads) {
      sums[i] = {0, 0, 0, 0};
    }
  }
  team.arrive_first();
  const std::uint32_t highest_of_warp = __reduce_max_sync(~0u, tile.receive());
  if (lane == 0) s.highest_by_warp[warp] = highest_of_warp;
  __syncthreads();
  team.wait_first();
  if (warp == 0) {
    team.post(0, {__reduce_max_sync(~0u, lane < kSelectWarps ? s.highest_by_warp[lane] : 0), 0, 0, 0});
  }
  team.await_posts(0);
  std::uint32_t highest = 0;
  team.for_posts(0, [&](const uint4& of_cta, int) { highest = max(highest, of_cta.x); });
  highest = __reduce_max_sync(~0u, highest);

  const SelectCut cut = find_cut(p, team, tile, highest, s);
  emit(p, team, tile, cut, row, s);
  team.leave();
}

}  // namespace specvlm
