"""SpecVLM's two-stage choice of video tokens, in exact integer arithmetic (paper section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import nan_lowest

MASS_BITS = 40  # a weight is an integer below 2**40, so 2**22 of them sum without overflow
P_BITS = 24  # top_p is a multiple of 2**-24


class Selection(NamedTuple):
    """indices int64 [B,keep], ascending (-1 last where fewer candidates than keep); num_attention int32 [B]."""

    indices: Tensor
    num_attention: Tensor


def integer_mass(scores: Tensor) -> Tensor:
    """int64 [B,V]: floor(max(score,0) * 2**(40-e)), 2**e the smallest power of two above the row's maximum."""
    s = scores.double().clamp(min=0, max=torch.finfo(torch.float32).max)
    exponent = torch.frexp(s.amax(-1, keepdim=True)).exponent
    # the power of two is put together from its bits: pow(2, x) need not be exact on every device
    power = ((1023 + MASS_BITS - exponent.long()) << 52).view(torch.float64)
    return (s * power).floor().long()


def select_tokens(scores: Tensor, keep: int, top_p: float = 0.4, *, mask: Tensor | None = None) -> Selection:
    b, v = scores.shape
    device = scores.device
    if keep == 0 or b == 0:
        empty = torch.empty(b, keep, dtype=torch.int64, device=device)
        return Selection(empty, torch.zeros(b, dtype=torch.int32, device=device))
    candidate = torch.ones(b, v, dtype=torch.bool, device=device) if mask is None else mask
    x = torch.where(candidate, nan_lowest(scores.float()), float("-inf"))

    # candidates first, then by score; both sorts are stable, so ties stay in index order
    by_score = torch.sort(x, dim=-1, descending=True, stable=True).indices
    by_score = by_score.gather(1, torch.sort((~candidate).gather(1, by_score), dim=-1, stable=True).indices)
    mass = torch.where(candidate, integer_mass(x), 0).gather(1, by_score).cumsum(-1)
    total = mass[:, -1:]
    p = round(top_p * 2**P_BITS)
    high, low = total >> P_BITS, total & (2**P_BITS - 1)
    threshold = p * high + ((p * low + 2**P_BITS - 1) >> P_BITS)  # smallest sum with sum * 2**24 >= p * total
    if top_p == 0 or top_p == 1:
        m = torch.full((b,), keep if top_p == 1 else 0, device=device)
    else:
        m = (mass < threshold).sum(-1) + (threshold[:, 0] > 0)
        m = torch.where(total[:, 0] == 0, 1, m)
    count = candidate.sum(-1)
    m = torch.minimum(m.clamp(max=keep), count)

    chosen = torch.zeros(b, v, dtype=torch.bool, device=device)
    chosen.scatter_(1, by_score, torch.arange(v, device=device) < m[:, None])
    left = candidate & ~chosen
    rank = left.cumsum(-1) - 1  # rank of each remaining candidate, in index order
    r, u = count - m, torch.minimum(keep - m, count - m)
    j = torch.arange(keep, device=device)
    ranks = torch.where(j < u[:, None], j * (r - 1)[:, None] // (u - 1).clamp(min=1)[:, None], v)
    wanted = torch.zeros(b, v + 1, dtype=torch.bool, device=device).scatter_(1, ranks, True)
    chosen |= left & wanted.gather(1, rank.clamp(min=0))

    positions = torch.where(chosen, torch.arange(v, device=device), v).sort(-1).values[:, :keep]
    return Selection(torch.where(positions < v, positions, -1), m.int())
