"""tree_attention: N tree nodes attend to a KV cache that already holds their own keys and values."""

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
    shared_memory,
)
from ..launches import Launch, launched
from ..reference.tree_attention import tree_attention as reference

OP = register("tree_attention")

Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a tree of new tokens over the context and over their own ancestors.

    Node i sees all kv_lens[b] context tokens, and those nodes j whose bit is set in row i of the mask. The nodes'
    own keys and values are already in the cache, at positions kv_lens[b] .. kv_lens[b]+N-1.

    Args:
        q: [B,N,Hq,D] bf16, fp16 or fp32 (float64 in the torch tier), after RoPE.
        k, v: [B,S,Hkv,D] of q's dtype with any strides but a contiguous last dim, or pages [P,page_size,Hkv,D].
        kv_lens: int32 [B], context tokens per request, without the tree; read on the device.
        tree_mask: None for a causal chain (node i sees nodes j <= i), or int64 bit words [N,W] or [B,N,W],
            W = ceil(N/64): bit j%64 of word j//64 says whether node i sees node j.
        tree_lens: int32 [B], nodes per request; rows past it give 0 and lse -inf, and are seen by none.
        page_table: int32 [B,max_pages], for paged k and v; page sizes are powers of two.
        softmax_scale: factor of q.k, by default D**-0.5.
        return_lse: also return the natural log of the softmax's denominator.
        out: [B,N,Hq,D] of q's dtype, mutated; allocated when None.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        out [B,N,Hq,D], or (out, lse float32 [B,N,Hq]).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.tree_attention. Source: SpecVLM, section 3.3 (tree verification).
    """
    seen = (
        (q, k, v, kv_lens, tree_mask, tree_lens, page_table),
        (softmax_scale, return_lse, backend),
        () if out is None else (out,),
    )
    if outputs := OP.again(seen):
        return tuple(outputs) if return_lse else outputs[0]  # type: ignore[return-value]
    call = prepare(q, k, v, kv_lens, tree_mask, tree_lens=tree_lens, page_table=page_table, softmax_scale=softmax_scale)
    b, n, heads, d = q.shape
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        check.tensor("out", out, "B N Hq D", (q.dtype,), {"B": b, "N": n, "Hq": heads, "D": d}, q.device)
    lse = torch.empty((b, n, heads), dtype=_lse_dtype(q), device=q.device) if return_lse else None
    if q.numel():
        OP.run(call, (out, lse), backend, seen)
    return out if lse is None else (out, lse)


def prepare(
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
) -> Call:
    """The checked inputs as the tiers take them: the mask with its batch dim, the scale as a number."""
    sizes: check.Sizes = {}
    check.tensor("q", q, "B N Hq D", check.FLOATS, sizes)
    device = q.device
    capacity = check.cache("k", k, page_table, (q.dtype,), sizes, device)
    check.cache("v", v, page_table, (q.dtype,), sizes, device)
    check.heads(sizes)
    check.tensor("kv_lens", kv_lens, "B", check.INT32, sizes, device)
    n = sizes["N"]
    if n > capacity:
        raise ValueError(f"q: {n} nodes do not fit a cache of {capacity} tokens")
    if n and sizes.get("P") == 0:
        raise ValueError("k: expected at least one page, got an empty pool")
    if tree_mask is not None:
        if not isinstance(tree_mask, Tensor):
            raise TypeError(f"tree_mask: expected None or a torch.Tensor, got {type(tree_mask).__name__}")
        dims = "N W" if tree_mask.dim() == 2 else "B N W"
        check.tensor("tree_mask", tree_mask, dims, check.INT64, {**sizes, "W": (n + 63) // 64}, device)
        tree_mask = tree_mask.expand(sizes["B"], n, tree_mask.shape[-1])
    if tree_lens is not None:
        check.tensor("tree_lens", tree_lens, "B", check.INT32, sizes, device)
    scale = sizes["D"] ** -0.5 if softmax_scale is None else check.real("softmax_scale", softmax_scale, -1e30, 1e30)
    check.device_values("kv_lens", kv_lens, 0, capacity - n)
    check.device_values("tree_lens", tree_lens, 0, n)
    if page_table is not None:
        check.device_values("page_table", page_table, 0, k.shape[0] - 1)
    return q, k, v, kv_lens, tree_mask, tree_lens, page_table, scale


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    tree_mask: Tensor | None,
    tree_lens: Tensor | None,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
    backend: str | None,
) -> None:
    call = (q, k, v, kv_lens, tree_mask, tree_lens, page_table, softmax_scale)
    OP.pick(backend, call[0].device, call)(*call, out, lse)


torch.library.custom_op("specvlm::tree_attention", _run, mutates_args=("out", "lse")).register_fake(lambda *_: None)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    tree_mask: Tensor | None,
    tree_lens: Tensor | None,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _, reference_lse = reference(
        q,
        k,
        v,
        kv_lens,
        tree_mask,
        tree_lens=tree_lens,
        page_table=page_table,
        softmax_scale=softmax_scale,
        return_lse=True,
        out=out,
    )
    if lse is not None:
        lse.copy_(reference_lse)


def _triton(*call: Any) -> None:
    from ..triton.tree_attention import tree_attention as kernel

    kernel(*call)


def _triton_missing(q: Tensor, *_: object) -> str | None:
    return not_for_triton(q, head_dim=q.shape[-1])


@functools.cache
def _plan(*shape: int) -> Any:
    return extension()[0].tree_attention_plan(*shape)


def _cuda_missing(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    if q.dtype not in check.HALF:
        return f"the kernel takes bf16 and fp16, got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"D must be 64 or 128, got {q.shape[-1]}"
    return misaligned("q", q) or misaligned("k", k) or misaligned("v", v)


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    tree_mask: Tensor | None,
    tree_lens: Tensor | None,
    page_table: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> Launch:
    b, n, q_heads, d = q.shape
    pages, page_size, kv_heads = (0, 0, k.shape[2]) if page_table is None else k.shape[:3]
    max_pages = 0 if page_table is None else page_table.shape[1]
    capacity = k.shape[1] if page_table is None else max_pages * page_size
    index = q.device.index
    plan = _plan(
        b,
        n,
        q_heads,
        kv_heads,
        d,
        capacity,
        page_size,
        architecture(index),
        multiprocessors(index),
        shared_memory(index),
    )
    given = out
    if misaligned("out", out):  # rows are written 16 bytes at a time
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    prepared = extension()[0].TreeAttention(
        plan=plan,
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        mask_batch_stride=tree_mask.stride(0) if tree_mask is not None else 0,
        mask_node_stride=tree_mask.stride(1) if tree_mask is not None else 0,
        page_table_stride=page_table.stride(0) if page_table is not None else 0,
        mask_words=tree_mask.shape[2] if tree_mask is not None else 0,
        batch=b,
        nodes=n,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=d,
        capacity=capacity,
        page_size=page_size,
        pages=pages,
        max_pages=max_pages,
        scale=softmax_scale,
        bfloat16=q.dtype == torch.bfloat16,
    )
    tensors = (q, k, v, kv_lens, tree_mask, tree_lens, page_table, out, lse)
    launch = launched(prepared.launch, 4 * plan.workspace_floats, *tensors)
    if given is not out:
        given.copy_(out)
    return launch


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
