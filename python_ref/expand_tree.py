"""Which nodes a draft reads next, and the best of all that it proposed: a tree by cumulative log-probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import nan_lowest, pack_bits


class Expansion(NamedTuple):
    """tokens int64 [B,N], parents int32 [B,N], depths int32 [B,N], mask int64 words [B,N,ceil(N/64)] and rows int32
    [B,N] of a tree, level by level; rows: which row of the draft's logits a node's children come from, or -1."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    mask: Tensor
    rows: Tensor


def expand_tree(
    log_probs: Tensor, token_ids: Tensor, root: Tensor, nodes: int | None = None, *, out: Expansion | None = None
) -> Expansion:
    b, rows, k = log_probs.shape
    device, levels = log_probs.device, 1 + (rows - 1) // k
    gain = nan_lowest(log_probs).clamp(max=0)  # no child is likelier than its parent
    depth_of_row = (torch.arange(rows, device=device) + k - 1) // k
    scores = torch.zeros_like(gain)  # of the candidates: candidate row * k + rank is the child of a row
    row_scores = gain.new_zeros(b, rows + k)
    row_candidates = torch.full((b, rows + k), -1, device=device)  # what a row is the child of; rows + k: the next ones
    for level in range(levels):
        start, stop = max(0, 1 + (level - 1) * k), 1 + level * k
        scores[:, start:stop] = row_scores[:, start:stop, None] + gain[:, start:stop]
        best = torch.sort(scores[:, start:stop].flatten(1), descending=True, stable=True)
        row_scores[:, stop : stop + k] = best.values[:, :k]
        row_candidates[:, stop : stop + k] = best.indices[:, :k] + start * k

    if nodes is None:
        chosen = row_candidates[:, 1:]
    else:
        kept = torch.sort(scores.flatten(1), descending=True, stable=True).indices[:, : nodes - 1]
        chosen = kept.gather(1, torch.sort(depth_of_row[kept // k], dim=1, stable=True).indices)
    n = 1 + chosen.shape[1]
    node_of = torch.zeros(b, 1 + rows * k, dtype=torch.int64, device=device)  # of candidates from -1, the root, on
    node_of.scatter_(1, 1 + chosen, torch.arange(1, n, device=device).expand(b, -1))
    row_of = torch.full((b, rows * k), -1, device=device)
    row_of.scatter_(1, row_candidates[:, 1:rows], torch.arange(1, rows, device=device).expand(b, -1))
    above = chosen // k
    parents = node_of.gather(1, 1 + row_candidates.gather(1, above))

    top = torch.zeros(b, 1, dtype=torch.int64, device=device)  # the root
    to_root = torch.cat([top, parents], 1)
    seen = torch.zeros(b, n, n, dtype=torch.bool, device=device)
    ancestor = torch.arange(n, device=device).expand(b, n)
    for _ in range(1 + levels):
        seen.scatter_(2, ancestor[..., None], True)
        ancestor = to_root.gather(1, ancestor)
    tree = Expansion(
        tokens=torch.cat([root[:, None], token_ids.flatten(1).gather(1, chosen)], 1),
        parents=torch.cat([top - 1, parents], 1).int(),
        depths=torch.cat([top, 1 + depth_of_row[above]], 1).int(),
        mask=pack_bits(seen),
        rows=torch.cat([top, row_of.gather(1, chosen)], 1).int(),
    )
    if out is None:
        return tree
    for given, computed in zip(out, tree):
        given.copy_(computed)
    return out
