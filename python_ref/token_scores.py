"""Mean attention that text queries pay to each token of a span, from q, k and the softmax's lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, contiguous_cache


def token_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor,
    span_start: int | Tensor,
    span_len: int,
    *,
    query_mask: Tensor | None = None,
    weight: float = 1.0,
    out: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    b, t, hq, d = q.shape
    acc = accumulate_dtype(q)
    k = contiguous_cache(k, page_table)
    s, hkv = k.shape[1], k.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    if out is None:
        out = torch.zeros(b, span_len, dtype=acc, device=q.device)
    if b == 0 or t == 0 or span_len == 0:
        return out

    start = torch.as_tensor(span_start, device=q.device).long().expand(b)
    position = start[:, None] + torch.arange(span_len, device=q.device)  # [b,span]
    keys = torch.gather(k, 1, position.clamp(0, max(s - 1, 0))[:, :, None, None].expand(b, span_len, hkv, d)).to(acc)
    context = kv_lens.long().clamp(0, s)
    last = context[:, None] + torch.arange(t, device=q.device)  # [b,t]: the last position each query sees
    seen = (position[:, None, :] <= last[:, :, None]) & (position >= 0)[:, None, :] & (position < s)[:, None, :]
    keys = torch.where(seen.any(1)[:, :, None, None], keys, 0.0)
    queries = torch.ones(b, t, dtype=torch.bool, device=q.device) if query_mask is None else query_mask

    qf = q.to(acc).reshape(b, t, hkv, hq // hkv, d)
    logits = torch.einsum("bthgd,bjhd->bthgj", qf * scale, keys).reshape(b, t, hq, span_len)
    counted = seen[:, :, None] & queries[:, :, None, None] & ~torch.isinf(lse)[..., None]
    shares = torch.where(counted, torch.exp(logits - lse.to(acc)[..., None]), 0.0)
    out += weight / (hq * queries.sum(1).clamp(min=1).to(acc))[:, None] * shares.sum((1, 2))
    return out
