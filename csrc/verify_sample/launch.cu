#include <algorithm>

#include "common/check.h"
#include "common/counters.h"
#include "verify_sample/kernel.cuh"
#include "verify_sample/search.cuh"

namespace specvlm {
namespace {

static_assert(sizeof(SampleNode) * kSampleMaxNodes + 6144 <= 48 << 10, "static shared memory is at most 48 KB");

// One launch for each 8 bits of a key, and first one for the highest logits where only masses are searched for.
template <typename T>
void search(const VerifySampleParams& p, dim3 grid, bool count, bool mass, cudaStream_t stream) {
  constexpr int kDigits = LogitKey<T>::kDigits;
  if (!count) sample_search_kernel<T, SampleSearch::kTop><<<grid, kLogitsThreads, 0, stream>>>(p, 0, false);
  for (int digit = 0; count && digit < kDigits; ++digit) {
    sample_search_kernel<T, SampleSearch::kCount><<<grid, kLogitsThreads, 0, stream>>>(p, digit, false);
  }
  for (int digit = 0; mass && digit < kDigits; ++digit) {
    sample_search_kernel<T, SampleSearch::kMass><<<grid, kLogitsThreads, 0, stream>>>(p, digit, count);
  }
  check_cuda(cudaGetLastError(), "verify_sample search launch");
}

template <typename T>
void launch(const VerifySampleParams& p, int parts, cudaStream_t stream) {
  const dim3 grid(parts, p.nodes, p.batch);
  const std::size_t shared = sizeof(SampleNode) * p.nodes;
  const bool count = p.top_k < p.vocab, mass = p.top_p < 1.0;
  if (count || mass) {
    search<T>(p, grid, count, mass, stream);
    verify_sample_kernel<T, true><<<grid, kLogitsThreads, shared, stream>>>(p);
  } else {
    verify_sample_kernel<T, false><<<grid, kLogitsThreads, shared, stream>>>(p);
  }
  check_cuda(cudaGetLastError(), "verify_sample launch");
}

}  // namespace

std::size_t verify_sample_workspace(int batch, int nodes, int vocab, bool aligned, bool filtered) {
  const int parts = logits_parts(vocab, kSamplePerThread, aligned);
  const std::size_t filter = filtered ? sizeof(SampleState) + sizeof(std::int64_t) * kSearchBins * parts : 0;
  return static_cast<std::size_t>(batch) * nodes * (sizeof(SampleEntry) * parts + filter);
}

void verify_sample(VerifySampleParams params, bool aligned, cudaStream_t stream) {
  const bool filtered = params.top_k < params.vocab || params.top_p < 1.0;
  check_argument(params.batch >= 0 && params.batch <= kSampleMaxBatch, "batch: expected 0..", kSampleMaxBatch, ", got ",
                 params.batch);
  check_argument(params.nodes >= 1 && params.nodes <= kSampleMaxNodes, "nodes: expected 1..", kSampleMaxNodes, ", got ",
                 params.nodes);
  check_argument(!filtered || params.batch * params.nodes <= kSampleMaxRows, "batch * nodes: expected at most ",
                 kSampleMaxRows, " with top_k or top_p, got ", params.batch * params.nodes);
  check_argument(params.vocab >= 1 && params.vocab <= kSampleMaxVocab, "vocab: expected 1..", kSampleMaxVocab, ", got ",
                 params.vocab);
  check_argument(params.top_k >= 1, "top_k: expected at least 1, got ", params.top_k);
  check_argument(params.top_p > 0.0, "top_p: expected a value above 0, got ", params.top_p);
  check_argument(params.factor >= 1e-36 && params.factor <= 1e30, "factor: expected 1e-36..1e30, got ", params.factor);
  if (params.batch == 0) return;
  params.arrivals = acquire_counters(filtered ? params.batch * params.nodes : params.batch, stream);
  const int parts = logits_parts(params.vocab, kSamplePerThread, aligned);
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
