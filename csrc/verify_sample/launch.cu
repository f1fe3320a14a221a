#include "common/check.h"
#include "common/counters.h"
#include "common/launch.h"
#include "verify_sample/kernel.cuh"
#include "verify_sample/search.cuh"

namespace specvlm {
namespace {

static_assert(sizeof(SampleNode) * kSampleMaxNodes + 6144 <= 48 << 10, "static shared memory is at most 48 KB");

// A call's launches. Each but the first only needs what the one before wrote after it has its logits.
class Chain {
 public:
  Chain(const VerifySampleParams& params, int parts, bool overlap, cudaStream_t stream)
      : params_(params), grid_(parts, params.nodes, params.batch), overlap_(overlap), stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(VerifySampleParams, Parameters...), std::size_t shared, Arguments... arguments) {
    if (overlap_ && !first_) {
      launch_overlapped(kernel, grid_, dim3(kLogitsThreads), static_cast<int>(shared), stream_, params_, arguments...);
    } else {
      kernel<<<grid_, kLogitsThreads, shared, stream_>>>(params_, arguments...);
      check_cuda(cudaGetLastError(), "verify_sample launch");
    }
    first_ = false;
  }

 private:
  const VerifySampleParams& params_;
  dim3 grid_;
  bool overlap_, first_ = true;
  cudaStream_t stream_;
};

template <typename T>
void launch(const VerifySampleParams& p, Chain chain) {
  constexpr int kDigits = LogitKey<T>::kDigits;
  const std::size_t shared = sizeof(SampleNode) * p.nodes;
  const bool count = p.top_k < p.vocab, mass = p.top_p < 1.0;
  if (!count && !mass) return chain.launch(verify_sample_kernel<T, false>, shared);
  if (!count) chain.launch(sample_search_kernel<T, SampleSearch::kTop>, 0, 0, false);
  for (int digit = 0; count && digit < kDigits; ++digit) {
    chain.launch(sample_search_kernel<T, SampleSearch::kCount>, 0, digit, false);
  }
  for (int digit = 0; mass && digit < kDigits; ++digit) {
    chain.launch(sample_search_kernel<T, SampleSearch::kMass>, 0, digit, count);
  }
  chain.launch(verify_sample_kernel<T, true>, shared);
}

}  // namespace

std::size_t verify_sample_workspace(int batch, int nodes, int vocab, bool aligned, bool filtered) {
  const int parts = logits_parts(vocab, kSamplePerThread, aligned);
  const std::size_t filter = filtered ? sizeof(SampleState) + sizeof(std::int64_t) * kSearchBins * parts : 0;
  return static_cast<std::size_t>(batch) * nodes * (sizeof(SampleEntry) * parts + filter);
}

void verify_sample(VerifySampleParams params, bool aligned, bool overlap, cudaStream_t stream) {
  const bool filtered = params.top_k < params.vocab || params.top_p < 1.0;
  check_argument(params.batch >= 0 && params.batch <= kSampleMaxBatch, "batch: expected 0..", kSampleMaxBatch, ", got ",
                 params.batch);
  check_argument(params.nodes >= 1 && params.nodes <= kSampleMaxNodes, "nodes: expected 1..", kSampleMaxNodes, ", got ",
                 params.nodes);
  check_argument(params.batch * params.nodes <= kSampleMaxRows, "batch * nodes: expected at most ", kSampleMaxRows,
                 ", got ", params.batch * params.nodes);
  check_argument(params.vocab >= 1 && params.vocab <= kSampleMaxVocab, "vocab: expected 1..", kSampleMaxVocab, ", got ",
                 params.vocab);
  check_argument(params.top_k >= 1, "top_k: expected at least 1, got ", params.top_k);
  check_argument(params.top_p > 0.0, "top_p: expected a value above 0, got ", params.top_p);
  check_argument(params.factor >= 1e-36 && params.factor <= 1e30, "factor: expected 1e-36..1e30, got ", params.factor);
  if (params.batch == 0) return;
  params.arrivals = acquire_counters(filtered ? params.batch * params.nodes : params.batch, stream);
  const Chain chain(params, logits_parts(params.vocab, kSamplePerThread, aligned), overlap, stream);
  switch (params.dtype) {
    case LogitsType::kBFloat16:
      return launch<__nv_bfloat16>(params, chain);
    case LogitsType::kFloat16:
      return launch<__half>(params, chain);
    case LogitsType::kFloat32:
      return launch<float>(params, chain);
  }
}

}  // namespace specvlm
