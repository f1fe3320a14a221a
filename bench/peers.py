"""The attention peers: other people's kernels for the same inputs, each in one small function.

Every function takes (case, calls) and returns one thunk per call. Masks, packed masks and plans are made once,
outside of the thunks: a server makes them once per tree, or once per round for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specvlm_kernels.reference._common import visible_positions

from .cases import Call, Peer, Thunk
from .shapes import ancestor_mask, capacity

FLASHINFER_WORKSPACE = 512 << 20


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape; compiled in this process, as daemons cannot start Inductor's pool of processes."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.compile_threads = 1
    return torch.compile(function, dynamic=False)


def visible(case: Any, call: Call) -> Tensor:
    """bool [B,N,S]: which cache positions each node may attend to."""
    kv_lens, words = call.args[3], call.kwargs.get("tree_mask")
    return visible_positions(kv_lens, case.nodes, capacity(case.contexts, case.nodes), words)


def answer(case: Any, out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """out [B,N,Hq,D] from whatever leading dims the peer has; its lse, if any, may have another base or layout."""
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(len(case.contexts), case.nodes, case.q_heads, case.head_dim)


def sdpa(case: Any, calls: list[Call]) -> list[Thunk]:
    """torch.nn.functional.scaled_dot_product_attention with a dense bool mask."""
    mask = visible(case, calls[0])[:, None]

    def thunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        return answer(case, out.transpose(1, 2))

    return [lambda c=c: thunk(*c.args[:3]) for c in calls]


def flex_attention(case: Any, calls: list[Call]) -> list[Thunk]:
    """FlexAttention, compiled, with a block mask for the tree."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as eager

    device = calls[0].args[0].device
    context, n = case.contexts[0], case.nodes
    tree = (torch.ones(n, n, dtype=torch.bool).tril() if case.causal else ancestor_mask(n)).to(device)

    def visible_at(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        node = j - context
        return (node < 0) | ((node < n) & tree[i, node.clamp(0, n - 1)])

    mask = create_block_mask(visible_at, None, None, n, capacity(case.contexts, n), device=device)
    flex = compiled(eager)

    def thunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return answer(case, flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2))

    return [lambda c=c: thunk(*c.args[:3]) for c in calls]


def flashinfer_single(case: Any, calls: list[Call]) -> list[Thunk]:
    """FlashInfer's single-request prefill: causal for a text pass, else a packed custom mask."""
    import flashinfer

    tokens = case.contexts[0] + case.nodes
    if case.causal:
        options: dict[str, Any] = {"causal": True, "return_lse": case.return_lse}
    else:
        mask = visible(case, calls[0])[0, :, :tokens]
        options = {"packed_custom_mask": flashinfer.packbits(mask.reshape(-1), bitorder="little")}

    def thunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flashinfer.single_prefill_with_kv_cache(q[0], k[0, :tokens], v[0, :tokens], backend="fa2", **options)
        return answer(case, out)

    return [lambda c=c: thunk(*c.args[:3]) for c in calls]


def flashinfer_paged(case: Any, calls: list[Call]) -> list[Thunk]:
    """FlashInfer's batch prefill over pages: a contiguous cache is seen as pages of 16. One plan for all calls."""
    import flashinfer

    first = calls[0]
    q, k = first.args[:2]
    device, page = q.device, case.page_size or 16
    b, n, heads = len(case.contexts), case.nodes, (case.q_heads, case.kv_heads)
    table = first.kwargs.get("page_table")
    if table is None:
        table = torch.arange(b * k.shape[1] // page, dtype=torch.int32, device=device).view(b, -1)
    used = [context + n for context in case.contexts]
    pages = [-(-tokens // page) for tokens in used]
    starts = torch.tensor([sum(pages[:i]) for i in range(b + 1)], dtype=torch.int32, device=device)
    indices = torch.cat([table[i, :count] for i, count in enumerate(pages)])
    last = torch.tensor([(tokens - 1) % page + 1 for tokens in used], dtype=torch.int32, device=device)
    rows = torch.arange(b + 1, dtype=torch.int32, device=device) * n
    options: dict[str, Any] = {"causal": True}
    if not case.causal:
        mask = visible(case, first)
        options = {"custom_mask": torch.cat([mask[i, :, :tokens].reshape(-1) for i, tokens in enumerate(used)])}
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    wrapper.plan(
        rows, starts, indices, last, *heads, case.head_dim, page, q_data_type=q.dtype, kv_data_type=q.dtype, **options
    )

    def thunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages_of = (-1, page, *k.shape[2:])
        cache = (k.view(pages_of), v.view(pages_of))
        return answer(case, wrapper.run(q.flatten(0, 1), cache, return_lse=case.return_lse))

    return [lambda c=c: thunk(*c.args[:3]) for c in calls]


def flash_attention_3(case: Any, calls: list[Call]) -> list[Thunk]:
    """FlashAttention-3 over the whole cache, causal at its end: exactly the text pass, or a plain decode step."""
    return _flash_attention_3(case, calls, [context + case.nodes for context in case.contexts], causal=True)


def flash_attention_3_context(case: Any, calls: list[Call]) -> list[Thunk]:
    """FlashAttention-3 over the context only: it takes no tree mask, so the tree's own tokens are left out."""
    return _flash_attention_3(case, calls, list(case.contexts), causal=False)


def _flash_attention_3(case: Any, calls: list[Call], lens: list[int], causal: bool) -> list[Thunk]:
    from flash_attn_interface import flash_attn_with_kvcache

    seen = torch.tensor(lens, dtype=torch.int32, device=calls[0].args[0].device)

    def thunk(call: Call) -> Any:
        q, k, v, _ = call.args
        table = call.kwargs.get("page_table")
        return answer(case, flash_attn_with_kvcache(q, k, v, cache_seqlens=seen, page_table=table, causal=causal))

    return [lambda c=c: thunk(c) for c in calls]


def _contiguous(case: Any) -> str | None:
    return "takes no pages" if case.page_size else None


def _one_contiguous(case: Any) -> str | None:
    return "takes one request" if len(case.contexts) > 1 else _contiguous(case)


def _only_causal(case: Any) -> str | None:
    return None if case.causal else "takes no tree mask"


def _only_trees(case: Any) -> str | None:
    return "does all of a causal case" if case.causal else None


def _flashinfer(case: Any) -> str | None:
    return None if (case.head_dim, case.dtype) == (128, "bf16") else "compiled for bf16 and D 128 only, to save minutes"


def _one_flashinfer(case: Any) -> str | None:
    return _one_contiguous(case) or _flashinfer(case)


ATTENTION = [
    Peer("SDPA + mask", sdpa, fits=_contiguous),
    Peer("FlexAttention", flex_attention, slow=True, fits=_one_contiguous),
    Peer("FlashInfer single", flashinfer_single, module="flashinfer", fits=_one_flashinfer),
    Peer("FlashInfer paged", flashinfer_paged, module="flashinfer", curve=True, fits=_flashinfer),
    Peer("FA3", flash_attention_3, module="flash_attn_interface", curve=True, fits=_only_causal),
    Peer(
        "FA3 without mask, context only",
        flash_attention_3_context,
        whole=False,
        module="flash_attn_interface",
        curve=True,
        fits=_only_trees,
    ),
]
