"""draft_topk in Triton: one pass for each segment's maximum and each program's sum, then one program a row.

The k largest logits lie in the k segments with the largest maxima, so only those are read a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import device_of, id_of, key_value, key_with_id, order_key

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-0x8000000000000000)  # below every key_with_id


@triton.jit
def _exp_below(x, top, factor):
    """exp2((x - top) * factor), 1 where x is top, infinities included."""
    return tl.where(x == top, 1.0, tl.exp2((x - top) * factor))


@triton.jit(do_not_specialize=["segments"])
def _segments_kernel(
    logits,
    maxima,  # int64 [rows, segments]: key_with_id of each segment's maximum
    tops,  # float32 [rows, programs]: each program's maximum
    sums,  # float32 [rows, programs]: its sum of exp((x - maximum) / temperature)
    row_stride,
    vocab,
    segments,
    factor,
    SEGMENT: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    token = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    inside = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    key = order_key(x)
    high = tl.max(key, 1)
    first = tl.min(tl.where((key == high[:, None]) & inside, token, 0x7FFFFFFF), 1)
    tl.store(maxima + row * segments + segment, key_with_id(high, first), mask=segment < segments)
    top = key_value(tl.max(high, 0))
    terms = tl.where(inside, _exp_below(key_value(key), top, factor), 0.0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + place, top)
    tl.store(sums + place, tl.sum(tl.sum(terms, 1), 0))


@triton.jit(do_not_specialize=["segments", "programs", "k"])
def _merge_kernel(
    logits,
    maxima,
    tops,
    sums,
    log_probs,
    token_ids,
    row_stride,
    vocab,
    segments,
    programs,
    k,
    factor,
    inverse_temperature,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    program = tl.arange(0, PROGRAMS)
    top = tl.load(tops + row * programs + program, mask=program < programs, other=float("-inf"))
    part = tl.load(sums + row * programs + program, mask=program < programs, other=0.0)
    highest = tl.max(top, 0)
    total = tl.sum(part * _exp_below(top, highest, factor), 0)

    segment = tl.arange(0, SEGMENTS)
    best = tl.load(maxima + row * segments + segment, mask=segment < segments, other=LOWEST)
    rank = tl.arange(0, K)
    chosen = tl.full([K], 0, tl.int32)
    found = tl.minimum(k, segments)
    for j in range(found):
        high = tl.max(best, 0)
        chosen = tl.where(rank == j, (id_of(high) // SEGMENT).to(tl.int32), chosen)
        best = tl.where(best == high, LOWEST, best)

    token = chosen[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    inside = (token < vocab) & (rank < found)[:, None]
    x = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    key = tl.where(inside, key_with_id(order_key(x), token), LOWEST)
    winners = tl.full([K], LOWEST, tl.int64)
    for j in range(k):
        high = tl.max(tl.max(key, 1), 0)
        winners = tl.where(rank == j, high, winners)
        key = tl.where(key == high, LOWEST, key)
    value = key_value((winners >> 32).to(tl.int32))
    log_prob = (value - highest) * inverse_temperature - tl.log2(total) * LN2
    tl.store(log_probs + row * k + rank, log_prob, mask=rank < k)
    tl.store(token_ids + row * k + rank, id_of(winners), mask=rank < k)


def config(rows: int, vocab: int, k: int) -> dict[str, Any]:
    """Segment size and warps by shape alone; a tuning script may replace this function.

    Returns SEGMENT (tokens), PER_PROGRAM (segments a program reads at once), num_warps, merge_warps.
    """
    segment = max(256, triton.next_power_of_2(triton.cdiv(vocab, 4096)))  # the merge holds up to 4096 maxima
    per_program = max(1, 4096 // segment)
    merge_warps = 4 if triton.next_power_of_2(k) * segment <= 4096 else 8
    return {"SEGMENT": segment, "PER_PROGRAM": per_program, "num_warps": 4, "merge_warps": merge_warps}


def draft_topk(logits: Tensor, k: int, temperature: float, log_probs: Tensor, token_ids: Tensor) -> None:
    rows, vocab = logits.shape
    chosen = config(rows, vocab, k)
    segment, per_program = chosen["SEGMENT"], chosen["PER_PROGRAM"]
    segments = triton.cdiv(vocab, segment)
    programs = triton.cdiv(segments, per_program)
    maxima = torch.empty(rows, segments, dtype=torch.int64, device=logits.device)
    tops, sums = torch.empty(2, rows, programs, dtype=torch.float32, device=logits.device)
    factor = min(LOG2E / temperature, 1e30)  # float32's range
    with device_of(logits):
        _segments_kernel[(rows, programs)](
            logits,
            maxima,
            tops,
            sums,
            logits.stride(0),
            vocab,
            segments,
            factor,
            SEGMENT=segment,
            PER_PROGRAM=per_program,
            num_warps=chosen["num_warps"],
        )
        _merge_kernel[(rows,)](
            logits,
            maxima,
            tops,
            sums,
            log_probs,
            token_ids,
            logits.stride(0),
            vocab,
            segments,
            programs,
            k,
            factor,
            min(1 / temperature, 1e30),
            SEGMENT=segment,
            SEGMENTS=triton.next_power_of_2(segments),
            PROGRAMS=triton.next_power_of_2(programs),
            K=triton.next_power_of_2(k),
            num_warps=chosen["merge_warps"],
        )
