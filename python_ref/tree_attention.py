"""Attention of N tree nodes over a KV cache that already holds their own keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, contiguous_cache, visible_positions


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    tree_lens: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    b, n, hq, d = q.shape
    acc = accumulate_dtype(q)
    k, v = contiguous_cache(k, page_table), contiguous_cache(v, page_table)
    s, hkv = k.shape[1], k.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    if out is None:
        out = torch.empty_like(q)
    if q.numel() == 0:
        return (out, torch.empty(b, n, hq, dtype=acc, device=q.device)) if return_lse else out

    visible = visible_positions(kv_lens, n, s, tree_mask, tree_lens)  # [b,n,s]
    used = visible.any(1)[:, :, None, None]  # a position no node sees may hold anything, NaN included
    kf, vf = torch.where(used, k.to(acc), 0.0), torch.where(used, v.to(acc), 0.0)
    qf = q.to(acc).reshape(b, n, hkv, hq // hkv, d)
    logits = torch.einsum("bnhgd,bshd->bhgns", qf * scale, kf)
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - torch.where(torch.isinf(lse), 0.0, lse)[..., None])
    out.copy_(torch.einsum("bhgns,bshd->bnhgd", p, vf).reshape(b, n, hq, d))
    lse = lse.permute(0, 3, 1, 2).reshape(b, n, hq).contiguous()
    return (out, lse) if return_lse else out
