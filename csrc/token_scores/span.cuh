// What the kernels of token_scores share: where a request's span lies and how much of it any query sees.
#pragma once

#include <cstdint>

#include "common/l2.cuh"
#include "specvlm/token_scores.h"

namespace specvlm {

constexpr int kSpanTile = 64;  // cache positions per tile: wgmma's M

struct Span {
  const TokenScoresParams& p;

  __device__ int clamped(int kv_len) const { return min(max(kv_len, 0), p.capacity); }
  __device__ int start(int request) const {
    const int start = p.span_starts == nullptr ? p.span_start : load_anew(p.span_starts + request);
    return min(max(start, -p.span_len), p.capacity);
  }
  // Columns that lie inside the cache and that the last query sees: those from first() up to end().
  __device__ int first(int request) const { return max(0, -start(request)); }
  __device__ int end(int request) const {
    return min(p.span_len, min(clamped(load_anew(p.kv_lens + request)) + p.queries, p.capacity) - start(request));
  }
  // Position of the first tile. A box of pages must not leave its page, so there tiles begin at multiples of 64.
  __device__ int origin(int start) const { return p.page_table == nullptr ? start : start & ~(kSpanTile - 1); }
  // Tiles up to the last one that any query sees. With one request there is nothing to balance, and the loads need
  // not wait until its length has come from memory.
  __device__ int tiles(int request) const {
    const int columns = p.batch == 1 ? p.span_len : end(request), from = start(request);
    return columns <= 0 ? 0 : (from - origin(from) + columns + kSpanTile - 1) / kSpanTile;
  }
};

// Scores in log2. A scale of 0 would not let a product of infinity hide anything; 1e-30 has the same effect.
__device__ __forceinline__ float log2_scale(const TokenScoresParams& p) {
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);
  return copysignf(fmaxf(fabsf(scale), 1e-30f), scale);
}

// The negated lse of a packed row (query, head of the group) in log2; -inf for rows that do not count. log2(e) in two
// parts: rounded to one float it would make every score 1.3e-8 * lse too large.
__device__ __forceinline__ float minus_lse(const TokenScoresParams& p, int request, int query, int q_head) {
  float lse = __int_as_float(0x7f800000);
  if (query < p.queries && (p.query_mask == nullptr || p.query_mask[request * p.mask_batch_stride + query]))
    lse = p.lse[request * p.lse_batch_stride + query * p.lse_token_stride + q_head];
  return isinf(lse) ? __int_as_float(0xff800000) : fmaf(lse, -1.4426950216293335f, lse * -1.9259629e-8f);
}

// Partial scores of one KV head and request, [span_len].
__device__ __forceinline__ float* partial_scores(const TokenScoresParams& p, int head, int request) {
  return p.workspace + (static_cast<std::int64_t>(head) * p.batch + request) * p.span_len;
}

}  // namespace specvlm
