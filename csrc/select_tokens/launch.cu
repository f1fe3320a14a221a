#include <algorithm>

#include "common/check.h"
#include "common/counters.h"
#include "common/launch.h"
#include "select_tokens/kernel.cuh"

namespace specvlm {
namespace {

constexpr int kSlotUnit = 128;            // a vector for every lane of a warp
constexpr int kFewTokens = 4096;          // one CTA needs about as long for so many as the CTAs of a cluster to meet
constexpr int kMostAlone = 32768;         // one launch up to here, whatever the GPU
constexpr int kCluster = 8;               // the largest that every GPU with clusters can place
constexpr int kMostClusterSlots = 20480;  // of a CTA
constexpr int kFewSlots = 4096;           // of a CTA of kGrid: a barrier takes longer the more meet
constexpr int kSkew = 3;                  // slots before a row that does not start at 16 bytes

int up(int value, int unit) { return (value + unit - 1) / unit * unit; }

int shared_bytes(const SelectTokensPlan& plan) {
  return static_cast<int>(sizeof(SelectShared)) + (plan.resident ? plan.slots * static_cast<int>(sizeof(float)) : 0);
}

template <SelectTokensKernel KERNEL, bool RESIDENT>
void launch(const SelectTokensParams& p, const SelectTokensPlan& plan, cudaStream_t stream) {
  constexpr auto kKernel = select_tokens_kernel<KERNEL, RESIDENT>;
  prepare_kernel<kKernel>(shared_bytes(plan));
  const dim3 grid(plan.ctas, p.rows), block(kSelectThreads);
  if (KERNEL == SelectTokensKernel::kCluster)
    return launch_overlapped_clusters(kKernel, grid, block, plan.ctas, shared_bytes(plan), stream, p, plan.slots);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes(plan);
  config.stream = stream;
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;  // all CTAs are there, or none
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = KERNEL == SelectTokensKernel::kGrid ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, p, plan.slots), "select_tokens launch");
}

}  // namespace

SelectTokensPlan select_tokens_plan(int rows, int tokens, int architecture, int multiprocessors, int shared_memory) {
  check_argument(rows >= 0 && rows <= kSelectMostRows, "rows: expected 0..", kSelectMostRows, ", got ", rows);
  check_argument(tokens >= 1 && tokens <= kSelectMostTokens, "tokens: expected 1..", kSelectMostTokens, ", got ",
                 tokens);
  constexpr int kReserved = 1024;  // of shared memory, for every CTA
  const int fitting = (shared_memory - kReserved - static_cast<int>(sizeof(SelectShared))) /
                      static_cast<int>(sizeof(float)) / kSlotUnit * kSlotUnit;
  const int slots = tokens + kSkew;
  SelectTokensPlan plan{};
  plan.kernel = SelectTokensKernel::kAlone;
  plan.ctas = 1;
  plan.rows_per_launch = std::max(rows, 1);
  if (architecture >= 90 && tokens > kFewTokens) {
    int ctas = kCluster;
    while (ctas > 1 && static_cast<std::int64_t>(rows) * ctas > multiprocessors) ctas /= 2;
    if (ctas > 1 && slots <= ctas * std::min(kMostClusterSlots, fitting)) {
      plan.kernel = SelectTokensKernel::kCluster;
      plan.ctas = ctas;
    }
  }
  if (plan.kernel == SelectTokensKernel::kAlone && tokens > kMostAlone && multiprocessors > 1) {
    const int least = std::min((slots + fitting - 1) / fitting, multiprocessors);
    plan.kernel = SelectTokensKernel::kGrid;
    plan.rows_per_launch = std::max(1, std::min(rows, multiprocessors / least));
    plan.ctas = std::max(least, std::min(multiprocessors / plan.rows_per_launch, (slots + kFewSlots - 1) / kFewSlots));
    if (plan.ctas == 1) {  // many rows
      plan.kernel = SelectTokensKernel::kAlone;
      plan.rows_per_launch = std::max(rows, 1);
    }
  }
  plan.slots = up((slots + plan.ctas - 1) / plan.ctas, kSlotUnit);
  plan.resident = plan.slots <= fitting;
  check_argument(plan.slots < static_cast<int>(kCarry), "tokens: ", tokens, " are too many for ", multiprocessors,
                 " multiprocessors");
  if (plan.kernel != SelectTokensKernel::kAlone) {
    plan.workspace_words = static_cast<std::size_t>(plan.rows_per_launch) * select_row_words(plan.ctas);
  }
  return plan;
}

void select_tokens(SelectTokensParams params, const SelectTokensPlan& plan, cudaStream_t stream) {
  const auto run = [&](const SelectTokensParams& p) {
    switch (plan.kernel) {
      case SelectTokensKernel::kAlone:
        return (plan.resident ? launch<SelectTokensKernel::kAlone, true>
                              : launch<SelectTokensKernel::kAlone, false>)(p, plan, stream);
      case SelectTokensKernel::kCluster:
        return launch<SelectTokensKernel::kCluster, true>(p, plan, stream);
      case SelectTokensKernel::kGrid:
        return (plan.resident ? launch<SelectTokensKernel::kGrid, true>
                              : launch<SelectTokensKernel::kGrid, false>)(p, plan, stream);
    }
  };
  const int rows = params.rows;
  for (int row = 0; row < rows; row += plan.rows_per_launch) {
    SelectTokensParams p = params;
    p.rows = std::min(plan.rows_per_launch, rows - row);
    p.scores += row * params.scores_stride;
    p.mask = params.mask == nullptr ? nullptr : params.mask + row * params.mask_stride;
    p.indices += row * params.indices_stride;
    p.num_attention += row;
    p.arrivals = plan.kernel == SelectTokensKernel::kGrid ? acquire_counters(p.rows, stream) : nullptr;
    run(p);
  }
}

}  // namespace specvlm
