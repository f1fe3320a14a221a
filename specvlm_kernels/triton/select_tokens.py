"""select_tokens in Triton: one program a row while a row fits its registers, else a search over many programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    SEARCH_BLOCK,
    SEARCH_WARPS,
    WAYS,
    device_of,
    load_keys,
    narrowed,
    row_extremes,
    score_mass,
    search,
    select_goal,
    ties_wanted,
)

FIELD = tl.constexpr(20)  # bits of each of three counts that are scanned as one int64
FIELDS = tl.constexpr(40)
FIELD_MASK = tl.constexpr(0xFFFFF)


@triton.jit
def _emit(
    indices, i, live, key, cut, ties, above_before, equal_before, live_before, count, m, keep, WIDE: tl.constexpr
):
    """Stores the chosen ones of entries i at their places in `indices`; `..._before` count what precedes the block."""
    above = live & (key > cut) & (m > 0)
    equal = live & (key == cut) & (m > 0)
    fields = above.to(tl.int64) | (equal.to(tl.int64) << FIELD) | (live.to(tl.int64) << FIELDS)
    scan = tl.cumsum(fields, 0) - fields
    above_before += scan & FIELD_MASK
    equal_before += (scan >> FIELD) & FIELD_MASK
    first = above | (equal & (equal_before < ties))
    first_before = above_before + tl.minimum(equal_before, ties)
    rank = live_before + (scan >> FIELDS) - first_before  # among the candidates that stage I leaves
    left = count - m
    wanted = tl.minimum(keep - m, left)
    if not WIDE:  # products stay below 2**30
        rank = rank.to(tl.int32)
        left = left.to(tl.int32)
        wanted = wanted.to(tl.int32)
    # rank floor(j*(left-1)/(wanted-1)) is taken for each j: ceil(rank*(wanted-1)/(left-1)) of them lie before `rank`
    last = tl.maximum(left - 1, 1)
    taken = (rank * (wanted - 1) + last - 1) // last
    second = taken * last < (rank + 1) * (wanted - 1)
    taken = tl.where(wanted == 1, tl.minimum(rank, 1), taken)
    second = live & (first == 0) & tl.where(wanted > 1, second, (wanted == 1) & (rank == 0))
    taken = tl.where(wanted > 0, tl.minimum(taken, wanted), 0)
    tl.store(indices + first_before + taken, i.to(tl.int64), mask=first | second)


@triton.jit
def _emit_range(scores, mask, indices, first, stop, size, cut, ties, above_before, equal_before, live_before, count, m,
                keep, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """_emit for entries first .. stop-1, and -1 in those places of `indices` that no candidate is left for."""
    for start in range(first, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key, live = load_keys(scores, mask, i, size)
        _emit(indices, i, live, key, cut, ties, above_before, equal_before, live_before, count, m, keep, WIDE)
        above_before += tl.sum((live & (key > cut)).to(tl.int64), 0)
        equal_before += tl.sum((live & (key == cut)).to(tl.int64), 0)
        live_before += tl.sum(live.to(tl.int64), 0)
        tl.store(indices + i, tl.full([BLOCK], -1, tl.int64), mask=(i >= tl.minimum(keep, count)) & (i < keep))


@triton.jit(do_not_specialize=["keep", "share"])
def _row_kernel(
    scores,
    mask,
    indices,
    num_attention,
    scratch,  # int32 [B, SHORT]
    s_b,
    mask_b,
    indices_b,
    size,
    keep,
    share,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row bisects the scores' interval: over the row first, then over the few keys that are left."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * s_b
    if mask is not None:
        mask += row * mask_b
    column = tl.arange(0, BLOCK)
    highs = tl.full([BLOCK], -0x7F800000, tl.int32)
    lows = tl.full([BLOCK], 0x7F800000, tl.int32)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        key, live = load_keys(scores, mask, start + column, size)
        highs = tl.maximum(highs, tl.where(live, key, -0x7F800000))
        lows = tl.minimum(lows, tl.where(live, key, 0x7F800000))
        counts += live.to(tl.int32)
    highest = tl.max(highs, 0)
    count = tl.sum(counts, 0).to(tl.int64)
    weights = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        key, live = load_keys(scores, mask, start + column, size)
        weights += tl.where(live, score_mass(key, highest), 0)
    goal, threshold = select_goal(count, tl.sum(weights, 0), keep, share)

    # entries at or above `low` reach the goal, those at or above `high` do not; done when one entry lies between
    low = tl.minimum(tl.min(lows, 0), highest).to(tl.int64)
    high = highest.to(tl.int64) + 1
    inside = count
    above_count = tl.full([], 0, tl.int64)
    above_mass = tl.full([], 0, tl.int64)
    while (high - low > 1) & (inside > SHORT):
        middle = (low + high) >> 1
        counts = tl.zeros([BLOCK], tl.int32)
        weights = tl.zeros([BLOCK], tl.int64)
        for start in range(0, size, BLOCK):
            key, live = load_keys(scores, mask, start + column, size)
            upper = live & (key >= middle.to(tl.int32)) & (key < high.to(tl.int32))
            counts += upper.to(tl.int32)
            weights += tl.where(upper, score_mass(key, highest), 0)
        upper_count = tl.sum(counts, 0).to(tl.int64)
        upper_mass = tl.sum(weights, 0)
        reached = (above_count + upper_count >= goal) | (above_mass + upper_mass >= threshold)
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        inside = tl.where(reached, upper_count, inside - upper_count)
        above_count += tl.where(reached, 0, upper_count)
        above_mass += tl.where(reached, 0, upper_mass)

    cut = low.to(tl.int32)
    if high - low > 1:
        scratch += row * SHORT
        stored = tl.full([], 0, tl.int32)
        for start in range(0, size, BLOCK):
            key, live = load_keys(scores, mask, start + column, size)
            held = (live & (key >= low.to(tl.int32)) & (key < high.to(tl.int32))).to(tl.int32)
            tl.store(scratch + stored + tl.cumsum(held, 0) - held, key, mask=held != 0)
            stored += tl.sum(held, 0)
        tl.debug_barrier()
        place = tl.arange(0, SHORT)
        key = tl.load(scratch + place, mask=place < stored, other=-0x7FFFFFFF)  # below every candidate
        weight = score_mass(key, highest)
        while (high - low > 1) & (inside > 1):
            middle = (low + high) >> 1
            upper = (key >= middle.to(tl.int32)) & (key < high.to(tl.int32))
            upper_count = tl.sum(upper.to(tl.int32), 0).to(tl.int64)
            upper_mass = tl.sum(tl.where(upper, weight, 0), 0)
            reached = (above_count + upper_count >= goal) | (above_mass + upper_mass >= threshold)
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
            inside = tl.where(reached, upper_count, inside - upper_count)
            above_count += tl.where(reached, 0, upper_count)
            above_mass += tl.where(reached, 0, upper_mass)
        cut = tl.max(tl.where(key < high.to(tl.int32), key, -0x7FFFFFFF), 0)
    ties = ties_wanted(goal, threshold, above_count, above_mass, score_mass(cut, highest))
    m = tl.where(goal > 0, above_count + ties, 0)
    zero = tl.full([], 0, tl.int64)
    _emit_range(scores, mask, indices + row * indices_b, 0, size, size, cut, ties, zero, zero, zero, count, m, keep,
                False, BLOCK)  # fmt: skip
    tl.store(num_attention + row, m.to(tl.int32))


@triton.jit(do_not_specialize=["programs", "steps", "keep", "share"])
def _emit_kernel(
    scores,
    mask,
    indices,
    num_attention,
    extremes,
    state,
    counts,
    masses,
    above,
    s_b,
    mask_b,
    indices_b,
    size,
    programs,
    steps,
    keep,
    share,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ends a search over many programs a row, then stores each program's part of the result."""
    row = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    low, _, above_count, above_mass, goal, threshold, kept, by_program = narrowed(
        row, programs, state, counts, masses, keep, share, None, None, False, False, PROGRAMS
    )
    before = state + row.to(tl.int64) * 8
    highest = tl.load(before + 6).to(tl.int32)
    count = tl.load(before + 7)
    cut = low.to(tl.int32)
    ties = ties_wanted(goal, threshold, above_count, above_mass, score_mass(cut, highest))
    m = tl.where(goal > 0, above_count + ties, 0)

    every = tl.arange(0, PROGRAMS)
    earlier = every < program
    way = tl.arange(0, WAYS)
    passed = tl.sum(tl.where((way == kept + 1)[None, :], by_program, 0), 1)
    equal = tl.sum(tl.where((way == kept)[None, :], by_program, 0), 1) - passed
    passed += tl.load(above + row.to(tl.int64) * programs + every, mask=earlier, other=0)
    live = tl.load(extremes + (row.to(tl.int64) * 3 + 2) * programs + every, mask=earlier, other=0)
    above_before = tl.sum(tl.where(earlier, passed, 0), 0)
    equal_before = tl.sum(tl.where(earlier, equal, 0), 0)
    live_before = tl.sum(tl.where(earlier, live, 0), 0)

    scores += row.to(tl.int64) * s_b
    if mask is not None:
        mask += row.to(tl.int64) * mask_b
    first = program * steps * BLOCK
    _emit_range(scores, mask, indices + row.to(tl.int64) * indices_b, first, first + steps * BLOCK, size, cut, ties,
                above_before, equal_before, live_before, count, m, keep, True, BLOCK)  # fmt: skip
    if program == 0:
        tl.store(num_attention + row, m.to(tl.int32))


def config(rows: int, size: int) -> dict[str, Any]:
    """How rows are split, by shape alone; a tuning script may replace this function.

    Returns one_program (whether one program takes a whole row; at most 32,768 entries), BLOCK (entries it reads at
    once), SHORT (when so few keys are left, they fit its registers), num_warps; programs (most programs a row
    otherwise).
    """
    block = min(4096, max(256, triton.next_power_of_2(size)))
    return {
        "one_program": size <= 32768,
        "BLOCK": block,
        "SHORT": 1024,
        "num_warps": 16 if block > 1024 else 4,
        "programs": 128,
    }


def select_tokens(
    scores: Tensor, keep: int, top_p: float, mask: Tensor | None, indices: Tensor, num_attention: Tensor
) -> None:
    b, v = scores.shape
    chosen = config(b, v)
    share = {0.0: -2, 1.0: -1}.get(top_p, round(top_p * 2**24))
    mask_stride = mask.stride(0) if mask is not None else 0
    with device_of(scores):
        if chosen["one_program"]:
            _row_kernel[(b,)](
                scores,
                mask,
                indices,
                num_attention,
                torch.empty(b, chosen["SHORT"], dtype=torch.int32, device=scores.device),
                scores.stride(0),
                mask_stride,
                indices.stride(0),
                v,
                keep,
                share,
                SHORT=chosen["SHORT"],
                BLOCK=chosen["BLOCK"],
                num_warps=chosen["num_warps"],
            )
            return
        strides = (scores.stride(0), 0)
        split = row_extremes(scores, b, 1, strides, mask, chosen["programs"])
        found = search(scores, b, 1, strides, mask, split, (keep, share, None, None))
        _emit_kernel[(b * found.programs,)](
            scores,
            mask,
            indices,
            num_attention,
            found.extremes,
            found.state,
            found.counts,
            found.masses,
            found.above,
            scores.stride(0),
            mask_stride,
            indices.stride(0),
            v,
            found.programs,
            found.steps,
            keep,
            share,
            PROGRAMS=triton.next_power_of_2(found.programs),
            BLOCK=SEARCH_BLOCK,
            num_warps=SEARCH_WARPS,
        )
