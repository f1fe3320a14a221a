"""The longest path of the tree that the target's argmax agrees with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import argmax_first


class Verdict(NamedTuple):
    """path int32 [B,N] (accepted nodes without the root, then -1), length int32 [B], next_token int64 [B]."""

    path: Tensor
    length: Tensor
    next_token: Tensor


def verify_greedy(logits: Tensor, tokens: Tensor, parents: Tensor, *, tree_lens: Tensor | None = None) -> Verdict:
    b, n = tokens.shape
    device = tokens.device
    best = argmax_first(logits)  # [b,n]
    parents = parents.long().expand(b, n)
    live = torch.full((b,), n, device=device) if tree_lens is None else tree_lens.long()
    path = torch.full((b, n), -1, dtype=torch.int32, device=device)
    length = torch.zeros(b, dtype=torch.int64, device=device)
    node = torch.zeros(b, dtype=torch.int64, device=device)
    rows = torch.arange(b, device=device)
    for i in range(1, n):  # a child's index is above its parent's, so one ascending sweep is the whole walk
        accept = (parents[:, i] == node) & (tokens[:, i] == best[rows, node]) & (i < live)
        path[rows, length] = torch.where(accept, i, path[rows, length]).int()
        length = length + accept
        node = torch.where(accept, i, node)
    return Verdict(path, length.int(), best[rows, node])
