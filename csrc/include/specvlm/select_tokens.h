// select_tokens: SpecVLM's two-stage choice of the video tokens that the draft reads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace specvlm {

constexpr int kSelectMostTokens = 1 << 22;  // masses of 40 bits then sum in 62
constexpr int kSelectMostRows = 65535;

struct SelectTokensParams {
  const float* scores;          // [rows,tokens], contiguous in the tokens, aligned to 4 bytes
  const std::uint8_t* mask;     // [rows,tokens], contiguous in the tokens, not 0: a candidate; nullptr: all are
  std::int64_t* indices;        // [rows,keep], contiguous in keep
  std::int32_t* num_attention;  // [rows]
  std::uint64_t* workspace;     // plan.workspace_words, aligned to 16 bytes; nullptr where that is 0
  std::uint32_t* arrivals;      // [plan.rows_per_launch] counters, 0 before and after; kGrid only, else nullptr
  std::int64_t scores_stride;   // elements, from row to row
  std::int64_t mask_stride;
  std::int64_t indices_stride;
  int rows;    // 0..kSelectMostRows
  int tokens;  // 1..kSelectMostTokens
  int keep;    // 1..tokens
  int share;   // round(top_p * 2^24); -1 for top_p = 1, -2 for top_p = 0
};

// Who works on a row: one CTA, a cluster of CTAs (sm_90 and newer), or CTAs that meet through global memory.
enum class SelectTokensKernel { kAlone, kCluster, kGrid };

struct SelectTokensPlan {
  SelectTokensKernel kernel;
  int ctas;                     // of a row
  int slots;                    // scores that a CTA takes, a multiple of 128
  bool resident;                // they stay in shared memory; otherwise every pass reads them again
  int rows_per_launch;          // fewer than rows only for kGrid, whose CTAs must all be there at once
  std::size_t workspace_words;  // of 8 bytes
};

// architecture: 90 where clusters may be used; shared_memory: bytes of a multiprocessor.
SelectTokensPlan select_tokens_plan(int rows, int tokens, int architecture, int multiprocessors, int shared_memory);

// Fills params.arrivals. Asynchronous on stream; throws std::invalid_argument or std::runtime_error.
void select_tokens(SelectTokensParams params, const SelectTokensPlan& plan, cudaStream_t stream);

}  // namespace specvlm
