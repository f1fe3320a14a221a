"""token_scores in Triton: S = K Q^T, so that a tile of keys stays and the sum over queries is a sum over columns."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cache_rows, device_of, dot, dot_precision, page_layout

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shares(
    keys,
    r,
    rows,
    head,
    q,
    q_t,
    q_h,
    lse,
    lse_t,
    query_mask,
    mask_t,
    scale,  # times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(scale * q.k - lse) [positions, rows] of packed rows r; 0 for rows that do not count, which may hold NaN."""
    d = tl.arange(0, BLOCK_D)
    inside = r < rows
    query = (r // GROUP).to(tl.int64)
    q_head = (head * GROUP + r % GROUP).to(tl.int64)
    q_row = q + query * q_t + q_head * q_h
    queries = tl.load(q_row[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    row_lse = tl.load(lse + query * lse_t + q_head, mask=inside, other=float("inf"))
    counted = tl.abs(row_lse) != float("inf")
    if query_mask is not None:
        counted = counted & (tl.load(query_mask + query * mask_t, mask=inside, other=0) != 0)
    minus_lse = tl.where(counted, row_lse * -LOG2E, float("-inf"))[None, :]
    s = dot(keys, tl.trans(queries), None, PRECISION)
    return tl.where(minus_lse > float("-inf"), tl.exp2(s * scale + minus_lse), 0.0)


@triton.jit(do_not_specialize=["queries", "capacity", "pages", "tiles", "span_start", "span_len"])
def _scores_kernel(
    q,
    k,
    lse,
    kv_lens,
    span_starts,
    query_mask,
    page_table,
    partial,  # float32 [Hkv, B, span_len]
    q_b,
    q_t,
    q_h,
    k_outer,
    k_token,
    k_head,
    lse_b,
    lse_t,
    mask_b,
    mask_t,
    table_stride,
    queries,
    kv_heads,
    capacity,
    pages,
    tiles,
    span_start,
    span_len,
    batch,
    scale,  # times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % kv_heads
    request = pid // tiles // kv_heads
    context = tl.minimum(tl.maximum(tl.load(kv_lens + request), 0), capacity)
    start = span_start
    if span_starts is not None:
        start = tl.load(span_starts + request)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pos = start + column
    # keys that no query sees may hold anything
    seen = (column < span_len) & (pos >= 0) & (pos < capacity) & (pos - context < queries)
    row = cache_rows(tl.where(seen, pos, 0), k_outer, k_token, request, page_table, table_stride, pages, PAGE_BITS)
    d = tl.arange(0, BLOCK_D)
    keys = k + head.to(tl.int64) * k_head + row[:, None] + d[None, :]
    keys = tl.load(keys, mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # one sum over the rows, at the end
    rows = queries * GROUP
    q += request.to(tl.int64) * q_b
    lse += request.to(tl.int64) * lse_b
    if query_mask is not None:
        query_mask += request.to(tl.int64) * mask_b
    # rows below `middle` may not see the whole tile, the others do; far before the text there are none of the first
    hidden = tl.max(tl.where(seen, pos, 0), 0) - context
    middle = tl.minimum(tl.cdiv(tl.maximum(hidden, 0) * GROUP, BLOCK_M) * BLOCK_M, rows)
    for first in tl.range(0, middle, BLOCK_M, num_stages=1):
        r = first + tl.arange(0, BLOCK_M)
        shares = _shares(
            keys, r, rows, head, q, q_t, q_h, lse, lse_t, query_mask, mask_t, scale, HEAD_DIM, BLOCK_D, GROUP, PRECISION
        )
        acc += tl.where(pos[:, None] <= (context + r // GROUP)[None, :], shares, 0.0)
    for first in tl.range(middle, rows, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        acc += _shares(
            keys, r, rows, head, q, q_t, q_h, lse, lse_t, query_mask, mask_t, scale, HEAD_DIM, BLOCK_D, GROUP, PRECISION
        )
    part = partial + (head.to(tl.int64) * batch + request) * span_len + column
    tl.store(part, tl.where(seen, tl.sum(acc, 1), 0.0), mask=column < span_len)


@triton.jit(do_not_specialize=["queries", "span_len"])
def _add_kernel(
    partial,
    query_mask,
    out,
    mask_b,
    mask_t,
    out_b,
    queries,
    span_len,
    batch,
    kv_heads,
    factor,  # weight / Hq
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):
    request = tl.program_id(1).to(tl.int64)
    counted = queries
    if query_mask is not None:
        counted = 0
        for first in range(0, queries, QUERIES):
            i = first + tl.arange(0, QUERIES)
            in_q = tl.load(query_mask + request * mask_b + i.to(tl.int64) * mask_t, mask=i < queries, other=0)
            counted += tl.sum((in_q != 0).to(tl.int32), 0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    part = partial + ((head.to(tl.int64) * batch + request) * span_len)[:, None] + column[None, :]
    inside = column < span_len
    shares = tl.sum(tl.load(part, mask=(head < kv_heads)[:, None] & inside[None, :], other=0.0), 0)
    place = out + request * out_b + column
    total = tl.load(place, mask=inside, other=0.0) + shares * (factor / tl.maximum(counted, 1).to(tl.float32))
    tl.store(place, total, mask=inside)


def config(rows: int, head_dim: int, item: int) -> dict[str, Any]:
    """Block sizes, warps and stages by shape alone; a tuning script may replace this function.

    Returns BLOCK_M (queries times heads of a group), BLOCK_N (cache positions), num_warps, num_stages.
    """
    block_d = triton.next_power_of_2(head_dim)
    block_m = min(32, max(16, triton.next_power_of_2(rows)))
    if item == 4:  # no tensor cores: operands live in registers
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if block_d > 128:
        return {"BLOCK_M": block_m, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": block_m, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}


def token_scores(
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
    b, t, q_heads, d = q.shape
    kv_heads = k.shape[2]
    capacity, pages, page_bits, table_stride = page_layout(k, page_table)
    if not capacity:
        return
    chosen = config(t * q_heads // kv_heads, d, q.element_size())
    tiles = triton.cdiv(span_len, chosen["BLOCK_N"])
    mask_strides = query_mask.stride() if query_mask is not None else (0, 0)
    partial = torch.empty(kv_heads, b, span_len, dtype=torch.float32, device=q.device)
    with device_of(q):
        _scores_kernel[(b * kv_heads * tiles,)](
            q,
            k,
            lse,
            kv_lens,
            span_start_tensor,
            query_mask,
            page_table,
            partial,
            *q.stride()[:3],
            *k.stride()[:3],
            *lse.stride()[:2],
            *mask_strides,
            table_stride,
            t,
            kv_heads,
            capacity,
            pages,
            tiles,
            span_start,
            span_len,
            b,
            softmax_scale * LOG2E.value,
            HEAD_DIM=d,
            BLOCK_D=triton.next_power_of_2(d),
            GROUP=q_heads // kv_heads,
            PAGE_BITS=page_bits,
            PRECISION=dot_precision(q),
            **chosen,
        )
        block = 256
        _add_kernel[(triton.cdiv(span_len, block), b)](
            partial,
            query_mask,
            out,
            *mask_strides,
            out.stride(0),
            t,
            span_len,
            b,
            kv_heads,
            weight / q_heads,
            HEADS=triton.next_power_of_2(kv_heads),
            BLOCK=block,
            QUERIES=128,
            num_warps=4,
        )
