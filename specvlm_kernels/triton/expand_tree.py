"""expand_tree in Triton: the rows level by level, then the nodes one after the other, a program a request in both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import device_of, id_of, key_value, key_with_id, order_key

LOWEST = tl.constexpr(-0x8000000000000000)  # below every key_with_id
NO_CANDIDATE = tl.constexpr(0x7FFFFFFF)  # above every candidate's number


@triton.jit(do_not_specialize=["rows", "k"])
def _rows_kernel(
    log_probs,
    entries,  # int64 [B, R*k]: key_with_id of every candidate's score
    row_candidates,  # int32 [B, R+k]: which candidate a row is, -1 for the root
    l_b,
    l_r,
    rows,
    k,
    K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    log_probs += request * l_b
    entries += request * rows * k
    row_candidates += request * (rows + k)
    place = tl.arange(0, K)
    tl.store(row_candidates + place, -1, mask=place < 1)
    scores = tl.where(place < 1, 0.0, float("-inf"))  # of the level's rows
    start = 0
    count = 1
    while start < rows:
        candidate = (start + place)[:, None] * k + place[None, :]
        live = (place < count)[:, None] & (place < k)[None, :]
        gain = tl.load(log_probs + (start + place)[:, None].to(tl.int64) * l_r + place[None, :], mask=live, other=0.0)
        gain = tl.where(gain <= 0, gain, tl.where(gain > 0, 0.0, float("-inf")))  # NaN as -inf
        key = order_key(scores[:, None] + gain)
        entry = tl.where(live, key_with_id(key, candidate), LOWEST)
        tl.store(entries + candidate, entry, mask=live)
        start += count
        best = tl.full([K], LOWEST, tl.int64)
        for i in range(k):
            top = tl.max(tl.max(entry, 1), 0)
            best = tl.where(place == i, top, best)
            entry = tl.where(entry == top, LOWEST, entry)
        tl.store(row_candidates + start + place, id_of(best).to(tl.int32), mask=place < k)
        scores = tl.where(place < k, key_value((best >> 32).to(tl.int32)), float("-inf"))
        count = k


@triton.jit(do_not_specialize=["rows", "k", "nodes"])
def _nodes_kernel(
    entries,
    row_candidates,
    token_ids,
    root,
    tokens,
    parents,
    depths,
    mask,
    node_rows,
    t_b,
    t_r,
    rows,
    k,
    nodes,
    WHOLE: tl.constexpr,  # nodes=None: the rows and the next ones
    POOL: tl.constexpr,
    NODES: tl.constexpr,
    WORDS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    words = (nodes + 63) // 64
    token_ids += request * t_b
    row_candidates += request * (rows + k)
    tokens += request * nodes
    parents += request * nodes
    depths += request * nodes
    mask += request * nodes * words
    node_rows += request * nodes

    number = tl.arange(0, POOL)
    inside = number < rows * k
    order = tl.full([POOL], LOWEST, tl.int64)  # of what is left: the lowest level first, then the better
    if not WHOLE:
        entry = tl.load(entries + request * rows * k + number, mask=inside, other=LOWEST)
        # the highest bound that nodes-1 entries reach, bit by bit
        not_negative = tl.sum(((entry >= 0) & inside).to(tl.int32), 0)
        bound = tl.where(not_negative >= nodes - 1, 0, tl.full([], LOWEST, tl.int64))
        for bit in range(63):
            higher = bound + (tl.full([], 1, tl.int64) << (62 - bit))
            enough = tl.sum(((entry >= higher) & inside).to(tl.int32), 0) >= nodes - 1
            bound = tl.where(enough, higher, bound)
        level = (number // k + k - 1) // k
        # |key| < 2**31 and |number| < 2**13: levels of 2**46 apart do not touch
        compact = (entry >> 32) * 8192 + (8191 - number)
        order = tl.where((entry >= bound) & inside, compact - level.to(tl.int64) * (1 << 46), LOWEST)

    node = tl.arange(0, NODES)
    word = tl.arange(0, WORDS)
    row = tl.arange(0, NODES)
    row_candidate = tl.load(row_candidates + row, mask=row < rows, other=-2)
    chosen = tl.where(node < 1, -1, NO_CANDIDATE)
    seen = tl.where((node < 1)[:, None] & (word < 1)[None, :], 1, 0).to(tl.int64)
    tl.store(tokens, tl.load(root + request))
    tl.store(parents, -1)
    tl.store(depths, 0)
    tl.store(node_rows, 0)
    for i in range(1, nodes):
        if WHOLE:
            candidate = tl.load(row_candidates + i)
        else:
            top = tl.max(order, 0)
            candidate = tl.min(tl.where(order == top, number, NO_CANDIDATE), 0)
            order = tl.where(order == top, LOWEST, order)
        above = candidate // k
        parent = tl.min(tl.where(chosen == tl.load(row_candidates + above), node, NODES), 0)
        chosen = tl.where(node == i, candidate, chosen)
        own = tl.sum(tl.where((node == parent)[:, None], seen, 0), 0)
        own |= tl.where(word == i // 64, tl.full([], 1, tl.int64) << (i % 64), 0)
        seen = tl.where((node == i)[:, None], own[None, :], seen)
        read = tl.min(tl.where(row_candidate == candidate, row, NODES), 0)
        tl.store(tokens + i, tl.load(token_ids + above.to(tl.int64) * t_r + candidate % k))
        tl.store(parents + i, parent)
        tl.store(depths + i, (above + k - 1) // k + 1)
        tl.store(node_rows + i, tl.where(read < rows, read, -1))
    tl.store(mask + node[:, None] * words + word[None, :], seen, mask=(node < nodes)[:, None] & (word < words)[None, :])


def expand_tree(
    log_probs: Tensor,
    token_ids: Tensor,
    root: Tensor,
    nodes: int | None,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    mask: Tensor,
    node_rows: Tensor,
) -> None:
    b, rows, k = log_probs.shape
    n = tokens.shape[1]
    entries = torch.empty(b, rows * k, dtype=torch.int64, device=log_probs.device)
    row_candidates = torch.empty(b, rows + k, dtype=torch.int32, device=log_probs.device)
    pool = triton.next_power_of_2(rows * k)
    nodes_padded = triton.next_power_of_2(max(n, rows))
    with device_of(log_probs):
        _rows_kernel[(b,)](
            log_probs,
            entries,
            row_candidates,
            log_probs.stride(0),
            log_probs.stride(1),
            rows,
            k,
            K=triton.next_power_of_2(k),
            num_warps=1 if k <= 16 else 4,
        )
        _nodes_kernel[(b,)](
            entries,
            row_candidates,
            token_ids,
            root,
            tokens,
            parents,
            depths,
            mask,
            node_rows,
            token_ids.stride(0),
            token_ids.stride(1),
            rows,
            k,
            n,
            WHOLE=nodes is None,
            POOL=1 if nodes is None else pool,
            NODES=nodes_padded,
            WORDS=triton.next_power_of_2((n + 63) // 64),
            num_warps=1 if max(pool, nodes_padded) <= 512 else 4,
        )
