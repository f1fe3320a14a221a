#include <algorithm>
#include <limits>
#include <numeric>

#include "common/check.h"
#include "token_scores/sm80.cuh"
#include "token_scores/sm90_launch.cuh"

namespace specvlm {

extern template void token_scores_sm80<__nv_bfloat16, 64>(const TokenScoresParams&, const TokenScoresPlan&,
                                                          cudaStream_t);
extern template void token_scores_sm80<__nv_bfloat16, 128>(const TokenScoresParams&, const TokenScoresPlan&,
                                                           cudaStream_t);
extern template void token_scores_sm80<__half, 64>(const TokenScoresParams&, const TokenScoresPlan&, cudaStream_t);
extern template void token_scores_sm80<__half, 128>(const TokenScoresParams&, const TokenScoresPlan&, cudaStream_t);
extern template void token_scores_sm90<__nv_bfloat16, 64>(const TokenScoresParams&, const TokenScoresPlan&,
                                                          cudaStream_t);
extern template void token_scores_sm90<__nv_bfloat16, 128>(const TokenScoresParams&, const TokenScoresPlan&,
                                                           cudaStream_t);
extern template void token_scores_sm90<__half, 64>(const TokenScoresParams&, const TokenScoresPlan&, cudaStream_t);
extern template void token_scores_sm90<__half, 128>(const TokenScoresParams&, const TokenScoresPlan&, cudaStream_t);

namespace {

constexpr int kMaxRows = 640;           // packed rows of a row tile: 160 KB of Q at D = 128
constexpr int kMaxShared = 227 * 1024;  // of a CTA
constexpr int kMaxBox = 256;            // elements of a box's dim
constexpr int kMaxCapacity = 1 << 30;   // positions: sums of two of them are ints
constexpr int kMaxPacked = 1 << 20;     // packed rows of a KV head

int divide_up(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int unit) { return divide_up(a, unit) * unit; }

// How wgmma covers `rows` packed rows: the least time, counting 12 columns for what a block costs besides; three
// warpgroups do it in 9/10 of the time (measured on an H100).
int choose_columns(int rows) {
  const auto cost = [&](const ScoreShape& shape) {
    return divide_up(rows, shape.columns) * (shape.columns + 12) * (shape.warpgroups == 3 ? 9 : 10);
  };
  return std::min_element(std::begin(kScoreShapes), std::end(kScoreShapes),
                          [&](const ScoreShape& a, const ScoreShape& b) { return cost(a) < cost(b); })
      ->columns;
}

// Cuts tile_queries into boxes of chunk_queries. Swizzled boxes begin at multiples of 8 rows, so chunks are multiples
// of `unit` queries. A single row tile may reach past the last query, where TMA fills in zeros; one of several may not,
// since real rows follow.
bool choose_chunks(TokenScoresPlan& plan, int group, int unit) {
  const int wanted = std::min(kMaxChunks, divide_up(plan.tile_queries, divide_up(plan.columns, group)));
  for (plan.chunks = wanted; plan.chunks > 0; --plan.chunks) {
    plan.chunk_queries = round_up(divide_up(plan.tile_queries, plan.chunks), unit);
    const int covered = plan.chunks * plan.chunk_queries;
    const bool fits = plan.row_tiles == 1 ? covered * group <= kMaxRows : covered == plan.tile_queries;
    if (fits && plan.chunk_queries <= kMaxBox) return true;
  }
  return false;
}

// False where the shape is not for this kernel.
bool plan_sm90(TokenScoresPlan& plan, int batch, int queries, int group, int head_dim) {
  const int unit = 8 / std::gcd(group, 8), most = kMaxRows / group / unit * unit;
  if (group > kMaxBox || most == 0) return false;
  plan.kernel = TokenScoresKernel::kSm90;
  plan.row_tiles = divide_up(queries, most);
  plan.tile_queries = plan.row_tiles == 1 ? queries : round_up(divide_up(queries, plan.row_tiles), unit);
  for (;; plan.tile_queries += unit) {
    if (plan.tile_queries > most) return false;
    plan.columns = choose_columns(plan.tile_queries * group);
    if (choose_chunks(plan, group, unit)) break;
  }
  plan.row_tiles = divide_up(queries, plan.tile_queries);
  // lse lies in groups of 16 rows
  plan.rows = round_up(
      std::max(plan.chunks * plan.chunk_queries * group, round_up(plan.tile_queries * group, plan.columns)), 16);
  for (plan.stages = 8; plan.stages >= 3; --plan.stages)
    if (scores_layout(head_dim, plan.rows, plan.stages, batch).bytes <= kMaxShared) return true;
  return false;
}

template <typename T>
void run(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  if (plan.kernel == TokenScoresKernel::kSm80)
    p.head_dim == 64 ? token_scores_sm80<T, 64>(p, plan, stream) : token_scores_sm80<T, 128>(p, plan, stream);
  else
    p.head_dim == 64 ? token_scores_sm90<T, 64>(p, plan, stream) : token_scores_sm90<T, 128>(p, plan, stream);
}

}  // namespace

TokenScoresPlan token_scores_plan(int batch, int queries, int q_heads, int kv_heads, int head_dim, int span_len,
                                  int page_size, int architecture, int multiprocessors) {
  check_argument(head_dim == 64 || head_dim == 128, "head_dim: expected 64 or 128, got ", head_dim);
  check_argument(batch >= 1 && batch <= 65535, "batch: expected 1..65535, got ", batch);
  check_argument(kv_heads >= 1 && q_heads >= kv_heads && q_heads % kv_heads == 0,
                 "q_heads: expected a multiple of kv_heads, got ", q_heads, " and ", kv_heads);
  check_argument(queries >= 1 && static_cast<std::int64_t>(queries) * (q_heads / kv_heads) <= kMaxPacked,
                 "queries: expected at most 2**20 queries times heads of a group, got ", queries);
  check_argument(span_len >= 1 && span_len <= kMaxCapacity, "span_len: expected 1..2**30, got ", span_len);
  TokenScoresPlan plan{};
  const std::int64_t heads = static_cast<std::int64_t>(batch) * kv_heads;
  // with pages a span may begin anywhere in its first tile
  const std::int64_t units = heads * (kHeadCost + divide_up(span_len + kSpanTile - 1, kSpanTile));
  check_argument(units <= std::numeric_limits<int>::max(), "span_len: more than 2**31 tiles of work");
  plan.workspace_floats = static_cast<std::size_t>(heads) * span_len;
  const bool boxes = page_size == 0 || page_size >= 8;  // a swizzled box has 8 rows
  if (architecture >= 90 && boxes && plan_sm90(plan, batch, queries, q_heads / kv_heads, head_dim)) {
    plan.ctas = static_cast<int>(std::min<std::int64_t>(multiprocessors, units));
    return plan;
  }
  plan = TokenScoresPlan{};
  plan.kernel = TokenScoresKernel::kSm80;
  plan.columns = kSm80Rows;
  plan.row_tiles = 1;
  plan.tile_queries = queries;
  plan.ctas = static_cast<int>(heads * divide_up(span_len, kSm80Positions));
  plan.workspace_floats = static_cast<std::size_t>(heads) * span_len;
  return plan;
}

void token_scores(const TokenScoresParams& p, const TokenScoresPlan& plan, cudaStream_t stream) {
  check_argument(p.capacity >= 1 && p.capacity <= kMaxCapacity, "k: expected 1..2**30 positions, got ", p.capacity);
  check_argument(p.page_table == nullptr || p.pages >= 1, "k: expected at least one page");
  if (p.dtype == HalfType::kBFloat16)
    run<__nv_bfloat16>(p, plan, stream);
  else
    run<__half>(p, plan, stream);
}

}  // namespace specvlm
