#include "common/check.h"
#include "common/counters.h"
#include "verify_greedy/kernel.cuh"

namespace specvlm {
namespace {

template <typename T>
void launch(const VerifyGreedyParams& p, int parts, cudaStream_t stream) {
  const std::size_t shared = 2 * sizeof(int) * p.nodes;
  verify_greedy_kernel<T><<<dim3(parts, p.nodes, p.batch), kLogitsThreads, shared, stream>>>(p);
  check_cuda(cudaGetLastError(), "verify_greedy launch");
}

}  // namespace

std::size_t verify_greedy_workspace(int batch, int nodes, int vocab, bool aligned) {
  return static_cast<std::size_t>(batch) * nodes * logits_parts(vocab, kVerifyPerThread, aligned);
}

void verify_greedy(VerifyGreedyParams params, bool aligned, cudaStream_t stream) {
  check_argument(params.batch >= 0 && params.batch <= kVerifyMaxBatch, "batch: expected 0..", kVerifyMaxBatch, ", got ",
                 params.batch);
  check_argument(params.nodes >= 1 && params.nodes <= kVerifyMaxNodes, "nodes: expected 1..", kVerifyMaxNodes, ", got ",
                 params.nodes);
  check_argument(params.vocab >= 1 && params.vocab <= kVerifyMaxVocab, "vocab: expected 1..", kVerifyMaxVocab, ", got ",
                 params.vocab);
  if (params.batch == 0) return;
  params.arrivals = acquire_counters(params.batch, stream);
  const int parts = logits_parts(params.vocab, kVerifyPerThread, aligned);
  switch (params.dtype) {
    case LogitsType::kBFloat16:
      return launch<__nv_bfloat16>(params, parts, stream);
    case LogitsType::kFloat16:
      return launch<__half>(params, parts, stream);
    case LogitsType::kFloat32:
      return launch<float>(params, parts, stream);
  }
}

}  // namespace specvlm
