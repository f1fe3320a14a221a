"""tree_attention in Triton: packed GQA rows, split KV, and a combine kernel where there is more than one split."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cache_rows, device_of, dot, dot_precision, multiprocessors, page_layout

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634

MAX_SPLITS = 64
# what splitting costs, in the time of a tile: once for starting and for the combine kernel, and per partial result
SPLIT_COST = 4
PART_COST = 1 / 8


@triton.jit
def _window(mask_rows, node, valid, first, count, words):
    """int32 [rows]: bit c < min(count, 32) says whether a row sees tree node first+c (context where negative)."""
    if mask_rows is None:
        last = tl.minimum(tl.maximum(node - first, -1), 31)
        seen = (tl.full([1], 2, tl.int64) << last.to(tl.int64)) - 1
        seen = tl.where(last < 0, 0, seen)
    else:
        index = first >> 5  # 32-bit halves of the words; those before the tree are context, seen by all
        low = tl.load(mask_rows + index, mask=valid & (index >= 0) & (index < words), other=0)
        high = tl.load(mask_rows + index + 1, mask=valid & (index >= -1) & (index + 1 < words), other=0)
        low = tl.where(index < 0, -1, low)
        high = tl.where(index < -1, -1, high)
        seen = ((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)) >> (first & 31).to(tl.int64)
    limit = tl.minimum(tl.maximum(count, 0), 32).to(tl.int64)
    return tl.where(valid, seen & ((tl.full([1], 1, tl.int64) << limit) - 1), 0).to(tl.int32)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _softmax_step(s, l, m, acc, scale):  # noqa: E741
    """Scores [rows, columns] into probabilities; returns what the running sum, maximum and result become."""
    top = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
    p = tl.exp2(s * scale - shift[:, None])
    decay = tl.exp2(m - shift)
    return p, l * decay + tl.sum(p, 1), top, acc * decay[:, None]


@triton.jit(do_not_specialize=["nodes", "words", "capacity", "pages", "row_blocks", "splits", "rows"])
def _attention_kernel(
    q,
    k,
    v,
    kv_lens,
    tree_mask,
    tree_lens,
    page_table,
    out,
    lse,
    part_out,  # float32 [splits, rows, HEAD_DIM]; rows are (request, node, query head)
    part_lse,  # float32 [splits, rows], log2
    q_b,
    q_n,
    q_h,
    k_outer,
    k_token,
    k_head,
    v_outer,
    v_token,
    v_head,
    mask_b,
    mask_n,
    table_stride,
    o_b,
    o_n,
    o_h,
    nodes,
    words,  # int32 words in a row of the mask
    kv_heads,
    capacity,
    pages,
    row_blocks,
    splits,
    rows,
    scale,  # times log2(e), not negative
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    SIGN: tl.constexpr,  # of the caller's scale: -1, 0, 1
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # neighbours in launch order read the same keys; a causal chain's longest row blocks start first
    pid = tl.program_id(0)
    row_block = row_blocks - 1 - pid % row_blocks
    split = (pid // row_blocks) % splits
    head = (pid // row_blocks // splits) % kv_heads
    request = pid // row_blocks // splits // kv_heads

    context = tl.minimum(tl.maximum(tl.load(kv_lens + request), 0), capacity)
    live = nodes
    if tree_lens is not None:
        live = tl.minimum(tl.maximum(tl.load(tree_lens + request), 0), nodes)
    r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    node = r // GROUP
    q_head = head * GROUP + r % GROUP
    valid = node < live
    first_node = row_block * BLOCK_M // GROUP
    # positions below `unmasked` are seen by all rows of this block, positions from `end` on by none
    if tree_mask is None:
        unmasked = tl.minimum(context + tl.minimum(first_node + 1, live), capacity)
        end = tl.minimum(context + tl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP + 1, live), capacity)
    else:
        unmasked = context
        end = tl.minimum(context + live, capacity)
    end = tl.where(first_node < live, end, 0)
    per_split = tl.cdiv(tl.cdiv(end, BLOCK_N), splits) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(end, start + per_split)
    middle = tl.maximum(start, tl.minimum(stop, unmasked // BLOCK_N * BLOCK_N))

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    q_row = request.to(tl.int64) * q_b + node.to(tl.int64) * q_n + q_head.to(tl.int64) * q_h
    queries = tl.load(q + q_row[:, None] + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
    if SIGN != 1:
        queries = (queries.to(tl.float32) * SIGN).to(queries.dtype)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, middle, BLOCK_N):
        pos = tile + column
        row = cache_rows(pos, k_outer, k_token, request, page_table, table_stride, pages, PAGE_BITS)
        if BLOCK_D == HEAD_DIM:
            keys = tl.load(k + row[:, None] + d[None, :])
        else:
            keys = tl.load(k + row[:, None] + d[None, :], mask=in_head[None, :], other=0.0)
        s = dot(queries, tl.trans(keys), None, PRECISION)
        p, l, m, acc = _softmax_step(s, l, m, acc, scale)  # noqa: E741
        row = cache_rows(pos, v_outer, v_token, request, page_table, table_stride, pages, PAGE_BITS)
        if BLOCK_D == HEAD_DIM:
            values = tl.load(v + row[:, None] + d[None, :])
        else:
            values = tl.load(v + row[:, None] + d[None, :], mask=in_head[None, :], other=0.0)
        acc = dot(p, values, acc, PRECISION)

    mask_rows = None
    if tree_mask is not None:
        mask_rows = tree_mask + request.to(tl.int64) * mask_b + node.to(tl.int64) * mask_n
        mask_rows = mask_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    for tile in tl.range(middle, stop, BLOCK_N, num_stages=1):
        pos = tile + column
        inside = pos < end
        readable = tl.minimum(pos, end - 1)
        row = cache_rows(readable, k_outer, k_token, request, page_table, table_stride, pages, PAGE_BITS)
        keys = tl.load(k + row[:, None] + d[None, :], mask=inside[:, None] & in_head[None, :], other=0.0)
        s = dot(queries, tl.trans(keys), None, PRECISION)
        visible = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        used = tl.zeros([BLOCK_N], tl.int32)
        for part in tl.static_range((BLOCK_N + 31) // 32):
            first = tile + part * 32
            window = _window(mask_rows, node, valid, first - context, end - first, words)
            here = column >> 5 == part
            visible = tl.where(here[None, :], window[:, None] >> (column & 31)[None, :], visible)
            used = tl.where(here, tl.reduce(window, 0, _or) >> (column & 31), used)
        s = tl.where((visible & 1) != 0, s, float("-inf"))
        p, l, m, acc = _softmax_step(s, l, m, acc, scale)  # noqa: E741
        # a row that no node sees may hold NaN, and 0 * NaN would spread
        row = cache_rows(readable, v_outer, v_token, request, page_table, table_stride, pages, PAGE_BITS)
        values = tl.load(v + row[:, None] + d[None, :], mask=((used & 1) != 0)[:, None] & in_head[None, :], other=0.0)
        acc = dot(p, values, acc, PRECISION)

    l = tl.where(valid, l, 0.0)  # noqa: E741
    acc = tl.where(valid[:, None], acc, 0.0) / tl.where(l == 0, 1.0, l)[:, None]
    row_lse = tl.where(l == 0, float("-inf"), m + tl.log2(l))
    stored = node < nodes
    flat_row = (request * nodes + node).to(tl.int64) * (kv_heads * GROUP) + q_head
    if SPLIT:
        flat_row += split.to(tl.int64) * rows
        tl.store(part_lse + flat_row, row_lse, mask=stored)
        part = part_out + flat_row[:, None] * HEAD_DIM + d[None, :]
        tl.store(part, acc, mask=(stored & (l != 0))[:, None] & in_head[None, :])
    else:
        o_row = request.to(tl.int64) * o_b + node.to(tl.int64) * o_n + q_head.to(tl.int64) * o_h
        result = acc.to(out.dtype.element_ty)
        tl.store(out + o_row[:, None] + d[None, :], result, mask=stored[:, None] & in_head[None, :])
        if lse is not None:
            tl.store(lse + flat_row, row_lse * LN2, mask=stored)


@triton.jit(do_not_specialize=["nodes", "rows", "splits"])
def _combine_kernel(
    part_out,
    part_lse,
    out,
    lse,
    o_b,
    o_n,
    o_h,
    nodes,
    q_heads,
    rows,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    weight = tl.load(part_lse + split.to(tl.int64) * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(weight, 0)
    filled = weight != float("-inf")  # an empty split wrote no result
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    d = tl.arange(0, BLOCK_D)
    part = part_out + (split.to(tl.int64) * rows + row)[:, None] * HEAD_DIM + d[None, :]
    parts = tl.load(part, mask=filled[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    o_row = row // q_heads // nodes * o_b + row // q_heads % nodes * o_n + row % q_heads * o_h
    tl.store(out + o_row + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    if lse is not None:
        tl.store(lse + row, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2))


def config(
    batch: int, nodes: int, group: int, kv_heads: int, capacity: int, head_dim: int, item: int, sms: int
) -> dict[str, Any]:
    """Block sizes, warps, stages and splits by shape alone; a tuning script may replace this function.

    Returns BLOCK_M (packed rows), BLOCK_N (cache positions), num_warps, num_stages, splits, combine_warps.
    """
    rows = nodes * group
    block_d = triton.next_power_of_2(head_dim)
    block_m = 16 if rows <= 16 else 64 if rows <= 64 else 128  # wgmma starts at 64 rows
    if item == 4:  # no tensor cores: operands live in registers
        block_m, block_n, warps, stages, resident = 16, 32, 4, 1, 2
    elif block_d > 128:
        block_m, block_n, warps, stages, resident = min(block_m, 64), 32, 4, 2, 1
    elif block_m == 128:
        block_n, warps, stages, resident = 64, 8, 3, 1
    else:
        block_n, warps, stages, resident = 64, 4, 3, 2
    tiles = triton.cdiv(capacity, block_n)
    base = batch * kv_heads * triton.cdiv(rows, block_m)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": stages,
        "splits": best_splits(base, tiles, sms * resident),
        "combine_warps": 4,
    }


def best_splits(base: int, tiles: int, slots: int) -> int:
    """The number of splits with the shortest run: waves of programs times the tiles of the longest one."""

    def cost(splits: int) -> float:
        waves = -(-base * splits // slots)
        return waves * -(-tiles // splits) + (SPLIT_COST * waves + PART_COST * splits if splits > 1 else 0)

    return min(range(1, max(1, min(MAX_SPLITS, tiles)) + 1), key=cost)


def tree_attention(
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
    b, n, q_heads, d = q.shape
    kv_heads = k.shape[2]
    group = q_heads // kv_heads
    capacity, pages, page_bits, table_stride = page_layout(k, page_table)
    chosen = config(b, n, group, kv_heads, capacity, d, q.element_size(), multiprocessors(q))
    splits, combine_warps = chosen.pop("splits"), chosen.pop("combine_warps")
    row_blocks = triton.cdiv(n * group, chosen["BLOCK_M"])
    rows = b * n * q_heads
    part_out = part_lse = None
    if splits > 1:
        part_out = torch.empty(splits, rows, d, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(d)
    with device_of(q):
        _attention_kernel[(b * kv_heads * splits * row_blocks,)](
            q,
            k,
            v,
            kv_lens,
            tree_mask,
            tree_lens,
            page_table,
            out,
            lse,
            part_out,
            part_lse,
            *q.stride()[:3],
            *(k.stride(0), k.stride(1), k.stride(2)),
            *(v.stride(0), v.stride(1), v.stride(2)),
            *(tree_mask.stride()[:2] if tree_mask is not None else (0, 0)),
            table_stride,
            *out.stride()[:3],
            n,
            2 * tree_mask.shape[2] if tree_mask is not None else 0,
            kv_heads,
            capacity,
            pages,
            row_blocks,
            splits,
            rows,
            # a negative scale turns the queries' sign, and 0 turns them to 0: both exact
            abs(softmax_scale) * LOG2E if softmax_scale else LOG2E,
            HEAD_DIM=d,
            BLOCK_D=block_d,
            GROUP=group,
            PAGE_BITS=page_bits,
            SIGN=(softmax_scale > 0) - (softmax_scale < 0),
            SPLIT=splits > 1,
            PRECISION=dot_precision(q),
            **chosen,
        )
        if splits > 1:
            _combine_kernel[(rows,)](
                part_out,
                part_lse,
                out,
                lse,
                *out.stride()[:3],
                n,
                q_heads,
                rows,
                splits,
                HEAD_DIM=d,
                BLOCK_D=block_d,
                SPLITS=triton.next_power_of_2(splits),
                num_warps=combine_warps,
            )
