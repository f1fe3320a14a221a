// What the kernels of token_scores share: where a request's span lies and how much of it any query sees.
#pragma once

#include <cstdint>

#include "specvlm/token_scores.h"

namespace specvlm {

constexpr int kSpanTile = 64;  // cache positions per tile: wgmma's M

struct Span {
  const TokenScoresParams& p;

  __device__ int clamped(int kv_len) const { return min(max(kv_len, 0), p.capacity); }
  __device__ int start(int request) const {
    const int start = p.span_starts == nullptr ? p.span_start : p.span_starts[request];
    return min(max(start, -p.span_len), p.capacity);
  }
  // Columns that lie inside the cache and that the last query sees: those from first() up to end().
  __device__ int first(int request) const { return max(0, -start(request)); }
  __device__ int end(int request) const {
    return min(p.span_len, min(clamped(p.kv_lens[request]) + p.queries, p.capacity) - start(request));
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

// Partial scores of one KV head and request, [span_len].
__device__ __forceinline__ float* partial_scores(const TokenScoresParams& p, int head, int request) {
  return p.workspace + (static_cast<std::int64_t>(head) * p.batch + request) * p.span_len;
}

}  // namespace specvlm
