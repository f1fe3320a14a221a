"""Move the accepted path's keys and values to the front of the tree's slots, in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact_kv(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    *,
    page_table: Tensor | None = None,
) -> None:
    b, n = path.shape
    if b == 0:
        return
    first = k_caches[0]
    capacity = first.shape[1] * (1 if page_table is None else page_table.shape[1])
    context = kv_lens.long().clamp(0, capacity)
    accepted = length.long().clamp(0, n - 1)
    i = torch.arange(n, device=path.device)
    source, target = context[:, None] + path, context[:, None] + 1 + i
    # an ascending path has path[i] > i; what is not so, or lies outside, stays where it is
    moves = (i < accepted[:, None]) & (path > i + 1) & (path < n) & (source < capacity)
    row, col = moves.nonzero(as_tuple=True)
    src, dst = source[row, col], target[row, col]
    for caches in (k_caches, v_caches):
        for cache in caches:
            if page_table is None:
                cache[row, dst] = cache[row, src]
            else:
                size = cache.shape[1]
                page = page_table.long().clamp(0, cache.shape[0] - 1)
                cache[page[row, dst // size], dst % size] = cache[page[row, src // size], src % size]
    kv_lens.copy_((context + accepted + 1).clamp(max=capacity))
