"""What several references share: cache layout, visibility, exact ordering of floats."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: half types are never summed in half."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def contiguous_cache(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """[B,S,Hkv,D] view of a cache, or the pages [P,page_size,Hkv,D] gathered through page_table [B,max_pages]."""
    if page_table is None:
        return cache
    pages = cache[page_table.long().clamp(0, max(cache.shape[0] - 1, 0))]
    return pages.flatten(1, 2)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """bool [..., n] from int64 bit words [..., W]: bit j%64 of word j//64."""
    j = torch.arange(n, device=words.device)
    return (words[..., j // 64] >> (j % 64)) & 1 == 1


def pack_bits(mask: Tensor) -> Tensor:
    """int64 bit words [..., ceil(n/64)] from bool [..., n]: the inverse of unpack_bits."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 64)).unflatten(-1, (-1, 64))
    weights = torch.ones(64, dtype=torch.int64, device=mask.device) << torch.arange(64, device=mask.device)
    return (padded * weights).sum(-1)  # distinct bits: the sum is their union, bit 63 included


def visible_positions(
    kv_lens: Tensor, n: int, s: int, tree_mask: Tensor | None = None, tree_lens: Tensor | None = None
) -> Tensor:
    """bool [B,n,s]: which cache positions each tree node may attend to."""
    b, device = kv_lens.shape[0], kv_lens.device
    if tree_mask is None:
        tree = torch.ones(n, n, dtype=torch.bool, device=device).tril().expand(b, n, n)
    else:
        tree = unpack_bits(tree_mask, n).expand(b, n, n)
    if tree_lens is not None:
        live = torch.arange(n, device=device) < tree_lens.long().clamp(0, n)[:, None]
        tree = tree & live[:, :, None] & live[:, None, :]
    else:
        live = torch.ones(b, n, dtype=torch.bool, device=device)
    context = kv_lens.long().clamp(0, s)
    node = torch.arange(s, device=device) - context[:, None]  # [b,s]: tree node stored at each position
    in_tree = (node >= 0) & (node < n)
    bits = torch.gather(tree, 2, node.clamp(0, n - 1)[:, None, :].expand(b, n, s)) & in_tree[:, None, :]
    return bits | ((node < 0)[:, None, :] & live[:, :, None])


def nan_lowest(x: Tensor) -> Tensor:
    """x with NaN replaced by -inf, the order used for every comparison of scores and logits."""
    return torch.where(torch.isnan(x), float("-inf"), x)


def argmax_first(x: Tensor) -> Tensor:
    """int64 [...]: index of the largest entry of the last dim, NaN lowest, ties to the lower index."""
    x = nan_lowest(x)
    ids = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), ids, x.shape[-1]).amin(-1)
