// draft_topk: the k most likely tokens of every row of logits, with their log-probabilities.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "specvlm/logits.h"

namespace specvlm {

constexpr int kDraftTopkMost = 64;       // k
constexpr int kDraftTopkMaxRows = 4096;  // one counter each

struct DraftTopkParams {
  const void* logits;        // [rows,vocab], contiguous in the vocabulary, aligned to its own elements
  std::int64_t row_stride;   // elements
  float* log_probs;          // [rows,k] contiguous
  std::int64_t* token_ids;   // [rows,k] contiguous
  std::uint64_t* workspace;  // plan.workspace_entries
  std::uint32_t* arrivals;   // [rows] counters, 0 before and after the launch
  int rows;                  // 0..kDraftTopkMaxRows
  int vocab;                 // 1..2^20
  int k;                     // 1..min(vocab, kDraftTopkMost)
  float factor;              // log2(e) / temperature
  LogitsType dtype;
};

// How rows are cut.
struct DraftTopkPlan {
  int parts;                      // CTAs per row
  std::size_t workspace_entries;  // of 8 bytes
};

// aligned: the first logit and the row stride are multiples of 16 bytes.
DraftTopkPlan draft_topk_plan(int rows, int vocab, int k, bool aligned);

// Fills params.arrivals. Asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void draft_topk(DraftTopkParams params, const DraftTopkPlan& plan, cudaStream_t stream);

}  // namespace specvlm
