#include "common/check.h"
#include "common/counters.h"
#include "draft_topk/kernel.cuh"

namespace specvlm {
namespace {

constexpr int kFew = 8, kMany = 32;  // logits per thread; each a whole number of 16-byte vectors
constexpr int kCtasPerMultiprocessor = 4;

template <typename T, int PER_THREAD>
void launch(const DraftTopkParams& p, int parts, cudaStream_t stream) {
  const auto kernel = p.k <= 16 ? draft_topk_kernel<T, PER_THREAD, 16> : draft_topk_kernel<T, PER_THREAD, kTopKMost>;
  kernel<<<dim3(parts, p.rows), kLogitsThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "draft_topk launch");
}

template <typename T>
void launch(const DraftTopkParams& p, const DraftTopkPlan& plan, cudaStream_t stream) {
  (plan.per_thread == kFew ? launch<T, kFew> : launch<T, kMany>)(p, plan.parts, stream);
}

}  // namespace

DraftTopkPlan draft_topk_plan(int rows, int vocab, int k, bool aligned, int multiprocessors) {
  static_assert(kDraftTopkMost == kTopKMost);
  check_argument(rows >= 0 && rows <= kDraftTopkMaxRows, "rows: expected 0..", kDraftTopkMaxRows, ", got ", rows);
  check_argument(vocab >= 1 && vocab <= 1 << 20, "vocab: expected 1..2**20, got ", vocab);
  check_argument(k >= 1 && k <= kDraftTopkMost && k <= vocab, "k: expected 1..min(vocab, ", kDraftTopkMost, "), got ",
                 k);
  DraftTopkPlan plan{};
  for (const int per_thread : {kFew, kMany}) {
    plan.per_thread = per_thread;
    plan.parts = logits_parts(vocab, per_thread, aligned);
    if (plan.parts <= kTopKMaxParts && rows * plan.parts <= kCtasPerMultiprocessor * multiprocessors) break;
  }
  plan.workspace_entries = static_cast<std::size_t>(rows) * plan.parts * (k + 1);
  return plan;
}

void draft_topk(DraftTopkParams params, const DraftTopkPlan& plan, cudaStream_t stream) {
  if (params.rows == 0) return;
  check_argument(plan.per_thread == kFew || plan.per_thread == kMany, "plan: made by draft_topk_plan?");
  params.arrivals = acquire_counters(params.rows, stream);
  switch (params.dtype) {
    case LogitsType::kBFloat16:
      return launch<__nv_bfloat16>(params, plan, stream);
    case LogitsType::kFloat16:
      return launch<__half>(params, plan, stream);
    case LogitsType::kFloat32:
      return launch<float>(params, plan, stream);
  }
}

}  // namespace specvlm
