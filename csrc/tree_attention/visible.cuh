// Which positions a row sees: shared by the attention kernels.
#pragma once

#include <cstdint>

#include "specvlm/tree_attention.h"

namespace specvlm {

constexpr int kTileShift = 6, kTile = 1 << kTileShift;  // cache positions per tile; wgmma's M

// Which of a row's 64 positions from `base` on are seen: bits of the context, then of the tree. words(): those of the
// node's mask, to be indexed.
template <typename Words>
__device__ __forceinline__ std::uint64_t visible_bits_of(const TreeAttentionParams& p, int node, int context, int live,
                                                         int base, const Words& words) {
  if (node >= live) return 0;
  const int skip = base - context;  // tree node at bit 0; negative: so many context positions come first
  auto low_ones = [](int count) { return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1; };
  std::uint64_t tree;
  if (p.tree_mask == nullptr) {
    tree = low_ones(node + 1 - max(skip, 0));
  } else {
    const auto row = words();
    const int word = max(skip, 0) / 64, shift = max(skip, 0) % 64;
    tree = word < p.mask_words ? static_cast<std::uint64_t>(row[word]) >> shift : 0;
    if (shift != 0 && word + 1 < p.mask_words) tree |= static_cast<std::uint64_t>(row[word + 1]) << (64 - shift);
  }
  tree &= low_ones(live - max(skip, 0));
  const std::uint64_t seen = skip <= -64 ? ~0ull : skip < 0 ? (tree << -skip) | low_ones(-skip) : tree;
  return seen & low_ones(p.capacity - base);
}

__device__ __forceinline__ std::uint64_t visible_bits(const TreeAttentionParams& p, int request, int node, int context,
                                                      int live, int base) {
  return visible_bits_of(p, node, context, live, base,
                         [&] { return p.tree_mask + request * p.mask_batch_stride + node * p.mask_node_stride; });
}

}  // namespace specvlm
