#include "common/check.h"
#include "common/counters.h"
#include "draft_topk/kernel.cuh"

namespace specvlm {
namespace {

// Logits per thread, a whole number of 16-byte vectors. With 8 and four times the CTAs, few rows took 11.4 us on an
// H100 instead of 6.6: there is more for the last CTA to merge.
constexpr int kPerThread = 32;

template <typename T>
void launch(const DraftTopkParams& p, int parts, cudaStream_t stream) {
  const auto kernel = p.k <= 16 ? draft_topk_kernel<T, kPerThread, 16> : draft_topk_kernel<T, kPerThread, kTopKMost>;
  kernel<<<dim3(parts, p.rows), kLogitsThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "draft_topk launch");
}

}  // namespace

DraftTopkPlan draft_topk_plan(int rows, int vocab, int k, bool aligned) {
  static_assert(kDraftTopkMost == kTopKMost);
  check_argument(rows >= 0 && rows <= kDraftTopkMaxRows, "rows: expected 0..", kDraftTopkMaxRows, ", got ", rows);
  check_argument(vocab >= 1 && vocab <= 1 << 20, "vocab: expected 1..2**20, got ", vocab);
  check_argument(k >= 1 && k <= kDraftTopkMost && k <= vocab, "k: expected 1..min(vocab, ", kDraftTopkMost, "), got ",
                 k);
  DraftTopkPlan plan{};
  plan.parts = logits_parts(vocab, kPerThread, aligned);
  plan.workspace_entries = static_cast<std::size_t>(rows) * plan.parts * (k + 1);
  return plan;
}

void draft_topk(DraftTopkParams params, const DraftTopkPlan& plan, cudaStream_t stream) {
  if (params.rows == 0) return;
  check_argument(plan.parts > 0 && plan.parts <= kTopKMaxParts, "plan: made by draft_topk_plan?");
  params.arrivals = acquire_counters(params.rows, stream);
  switch (params.dtype) {
    case LogitsType::kBFloat16:
      return launch<__nv_bfloat16>(params, plan.parts, stream);
    case LogitsType::kFloat16:
      return launch<__half>(params, plan.parts, stream);
    case LogitsType::kFloat32:
      return launch<float>(params, plan.parts, stream);
  }
}

}  // namespace specvlm
