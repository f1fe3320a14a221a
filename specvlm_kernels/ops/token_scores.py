"""token_scores: how much attention the text pays to each video token, without an attention matrix."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import (
    Tier,
    architecture,
    extension,
    misaligned,
    multiprocessors,
    not_for_triton,
    register,
)
from ..launches import Launch, launched
from ..reference.token_scores import token_scores as reference

OP = register("token_scores")

Call = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None, int, Tensor | None, float, Tensor | None, float]


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
    backend: str | None = None,
) -> Tensor:
    """Adds one layer's attention from the text queries to each token of a span of the cache.

    scores[b,j] += weight/(Hq*|Q|) * sum over heads h and queries i in Q of exp(scale * q_ih . k_j - lse_ih): the
    softmax runs over all keys and is not renormalised over the span, as in the paper's code. Called once for
    each of L layers with weight 1/L, one buffer gathers the mean over layers, heads and queries.

    Args:
        q: [B,T,Hq,D] bf16, fp16 or fp32, as attention used it (after RoPE); query i is at position kv_lens[b]+i
            and sees keys up to there.
        k: [B,S,Hkv,D] of q's dtype, or pages [P,page_size,Hkv,D].
        lse: float32 [B,T,Hq] from tree_attention(..., return_lse=True).
        kv_lens: int32 [B], tokens before the first query.
        span_start: first cache position of the span, an int or int32 [B] on the device.
        span_len: tokens in the span (host int).
        query_mask: bool [B,T], the queries in Q; None for all of them.
        weight: factor, usually 1/L.
        out: float32 [B,span_len], mutated: added to; a new buffer of zeros when None.
        page_table: int32 [B,max_pages], for paged k.
        softmax_scale: factor of q.k, by default D**-0.5.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        out, float32 [B,span_len].

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.token_scores. Source: SpecVLM, section 3.2 (verifier-guided pruning).
    """
    seen = None
    if out is not None:  # a new buffer would have to be filled with zeros first
        device_start = span_start if isinstance(span_start, Tensor) else None
        host_start = None if isinstance(span_start, Tensor) else span_start
        seen = (
            (q, k, lse, kv_lens, device_start, query_mask, page_table),
            (host_start, span_len, weight, softmax_scale, backend),
            (out,),
        )
        if OP.again(seen):
            return out
    call = prepare(
        q,
        k,
        lse,
        kv_lens,
        span_start,
        span_len,
        query_mask=query_mask,
        weight=weight,
        page_table=page_table,
        softmax_scale=softmax_scale,
    )
    dtype = lse.dtype
    if out is None:
        out = torch.zeros(q.shape[0], span_len, dtype=dtype, device=q.device)
    else:
        check.tensor("out", out, "B span_len", (dtype,), {"B": q.shape[0], "span_len": span_len}, q.device)
    if q.numel() and span_len:
        OP.run(call, (out,), backend, seen)
    return out


def prepare(
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
) -> Call:
    """The checked inputs as the tiers take them: the span's start split into a host number and a device tensor."""
    sizes: check.Sizes = {}
    check.tensor("q", q, "B T Hq D", check.FLOATS, sizes)
    device = q.device
    capacity = check.cache("k", k, page_table, (q.dtype,), sizes, device)
    check.heads(sizes)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    check.tensor("lse", lse, "B T Hq", (lse_dtype,), sizes, device)
    check.tensor("kv_lens", kv_lens, "B", check.INT32, sizes, device)
    check.integer("span_len", span_len, 0, capacity)
    start_tensor = None
    if isinstance(span_start, Tensor):
        start_tensor = check.tensor("span_start", span_start, "B", check.INT32, sizes, device)
        check.device_values("span_start", span_start, 0, capacity - span_len)
        span_start = 0
    else:
        check.integer("span_start", span_start, 0, capacity - span_len)
    if query_mask is not None:
        check.tensor("query_mask", query_mask, "B T", check.BOOL, sizes, device)
    check.real("weight", weight, -1e30, 1e30)
    scale = sizes["D"] ** -0.5 if softmax_scale is None else check.real("softmax_scale", softmax_scale, -1e30, 1e30)
    check.device_values("kv_lens", kv_lens, 0, capacity - sizes["T"])
    if page_table is not None:
        check.device_values("page_table", page_table, 0, k.shape[0] - 1)
    return (
        q,
        k,
        lse,
        kv_lens,
        span_start,
        start_tensor,
        span_len,
        query_mask,
        float(weight),
        page_table,
        scale,
    )


def _run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor,
    span_start: int,
    span_start_tensor: Tensor | None,
    span_len: int,
    query_mask: Tensor | None,
    weight: float,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    backend: str | None,
) -> None:
    call = (
        q,
        k,
        lse,
        kv_lens,
        span_start,
        span_start_tensor,
        span_len,
        query_mask,
        weight,
        page_table,
        softmax_scale,
    )
    OP.pick(backend, call[0].device, call)(*call, out)


torch.library.custom_op("specvlm::token_scores", _run, mutates_args=("out",)).register_fake(lambda *_: None)


def _torch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor,
    span_start: int,
    span_start_tensor: Tensor | None,
    span_len: int,
    query_mask: Tensor | None,
    weight: float,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
) -> None:
    reference(
        q,
        k,
        lse,
        kv_lens,
        span_start if span_start_tensor is None else span_start_tensor,
        span_len,
        query_mask=query_mask,
        weight=weight,
        out=out,
        page_table=page_table,
        softmax_scale=softmax_scale,
    )


def _triton(*call: Any) -> None:
    from ..triton.token_scores import token_scores as kernel

    kernel(*call)


def _triton_missing(q: Tensor, *_: object) -> str | None:
    return not_for_triton(q, head_dim=q.shape[-1])


@functools.cache
def _plan(*shape: int) -> Any:
    return extension()[0].token_scores_plan(*shape)


def _cuda_missing(q: Tensor, k: Tensor, *_: object) -> str | None:
    b, t, q_heads, d = q.shape
    if q.dtype not in check.HALF:
        return f"the kernel takes bf16 and fp16, got {q.dtype}"
    if d not in (64, 128):
        return f"D must be 64 or 128, got {d}"
    if b > 65535 or t * q_heads // k.shape[2] > 1 << 20:
        return f"the kernel takes at most 65,535 requests and 2**20 queries times heads of a group, got {list(q.shape)}"
    return misaligned("q", q) or misaligned("k", k)


def _cuda(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor,
    span_start: int,
    span_start_tensor: Tensor | None,
    span_len: int,
    query_mask: Tensor | None,
    weight: float,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
) -> Launch:
    b, t, q_heads, d = q.shape
    pages, page_size, kv_heads = (0, 0, k.shape[2]) if page_table is None else k.shape[:3]
    max_pages = 0 if page_table is None else page_table.shape[1]
    capacity = k.shape[1] if page_table is None else max_pages * page_size
    index = q.device.index
    plan = _plan(b, t, q_heads, kv_heads, d, span_len, page_size, architecture(index), multiprocessors(index))
    prepared = extension()[0].TokenScores(
        plan=plan,
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        lse_batch_stride=lse.stride(0),
        lse_token_stride=lse.stride(1),
        mask_batch_stride=query_mask.stride(0) if query_mask is not None else 0,
        page_table_stride=page_table.stride(0) if page_table is not None else 0,
        out_batch_stride=out.stride(0),
        batch=b,
        queries=t,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=d,
        capacity=capacity,
        page_size=page_size,
        pages=pages,
        max_pages=max_pages,
        span_start=span_start,
        span_len=span_len,
        scale=softmax_scale,
        weight=weight,
        bfloat16=q.dtype == torch.bfloat16,
    )
    tensors = (q, k, lse, kv_lens, span_start_tensor, query_mask, page_table, out)
    return launched(prepared.launch, 4 * plan.workspace_floats, *tensors)


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
