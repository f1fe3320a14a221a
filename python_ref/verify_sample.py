"""Lossless sampling from the target along a tree: what is emitted follows the target's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import nan_lowest
from .verify_greedy import Verdict


def target_distribution(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """float64 [...,vocab]: softmax after temperature, then the top_k highest, then the smallest prefix of them
    (by logit, ties to the lower id) whose renormalised mass reaches top_p."""
    x = nan_lowest(logits)
    p = torch.softmax(x.double() / temperature, -1)
    if top_k is None and top_p is None:
        return p
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    sorted_p = p.gather(-1, order)
    if top_k is not None:
        sorted_p[..., top_k:] = 0
    if top_p is not None:
        mass = sorted_p.cumsum(-1)
        sorted_p = torch.where(mass - sorted_p < top_p * mass[..., -1:], sorted_p, 0.0)
    sorted_p /= sorted_p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, sorted_p)


def verify_sample(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    draft_log_probs: Tensor | None = None,
) -> Verdict:
    b, n = tokens.shape
    vocab = logits.shape[-1]
    device = tokens.device
    parents = parents.long().expand(b, n)
    path = torch.full((b, n), -1, dtype=torch.int32, device=device)
    length = torch.zeros(b, dtype=torch.int64, device=device)
    node = torch.zeros(b, dtype=torch.int64, device=device)
    rows = torch.arange(b, device=device)
    in_vocab = (tokens >= 0) & (tokens < vocab)
    ids = tokens.clamp(0, vocab - 1)
    p = target_distribution(logits[:, 0], temperature, top_k, top_p)
    rest = p.clone()  # the target's distribution at the current node, less the children already refused
    below = torch.zeros(b, dtype=torch.float64, device=device)  # their mass: where the next child's interval starts
    for i in range(1, n):  # a child's index is above its parent's, so one ascending sweep is the whole walk
        child = (parents[:, i] == node) & in_vocab[:, i]
        share = torch.where(child, rest[rows, ids[:, i]], 0.0)  # 0 for the second of two equal siblings
        rest[rows, ids[:, i]] = torch.where(child, 0.0, rest[rows, ids[:, i]])
        below = below + share
        nothing_else = rest.sum(-1) == 0  # only rounding can put a coin past the last token that has mass
        accept = (share > 0) & ((coins[rows, node].double() < below) | nothing_else)
        path[rows, length] = torch.where(accept, i, path[rows, length]).int()
        length = length + accept
        node = torch.where(accept, i, node)
        below = torch.where(accept, 0.0, below)
        if bool(accept.any()):
            p = target_distribution(logits[rows, node], temperature, top_k, top_p)
            rest = torch.where(accept[:, None], p, rest)
    cdf = rest.cumsum(-1)
    beyond = cdf > (coins[:, n].double() * cdf[:, -1])[:, None]
    next_token = argmax_bool(beyond & (rest > 0))
    return Verdict(path, length.int(), next_token)


def argmax_bool(x: Tensor) -> Tensor:
    """int64 [...]: index of the first True of the last dim."""
    ids = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x, ids, x.shape[-1] - 1).amin(-1)
