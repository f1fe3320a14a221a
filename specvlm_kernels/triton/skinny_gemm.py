"""x @ weight.T for at most 32 rows of x: the weights are streamed once, the few rows stay in cache.

Operands are swapped, so the weights fill the 64-row side of the tensor cores and the rows of x the narrow side. K
is split where the tiles alone do not fill the device; the last split to arrive at a tile adds up all parts in the
order of the splits, so the result is the same on every run.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import device_of, dot, dot_precision, multiprocessors

MAX_ROWS = 32
MAX_TILES = 16_384  # 1M outputs in tiles of 64
MAX_SPLITS = 8
START_BLOCKS = 3  # what starting a program costs, in the time of a block of K


@triton.jit(do_not_specialize=["rows", "blocks_per_split"])
def _skinny_kernel(
    x,
    weight,
    bias,
    out,
    parts,  # float32 [tiles, splits, BLOCK_N, ROWS]
    counters,  # int32 [tiles], 0 before and after
    rows,
    columns,
    depth,
    x_row,
    weight_row,
    blocks_per_split,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # whole blocks only, in N and K
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(n, columns - 1).to(tl.int64)[:, None] * weight_row + k[None, :]
    inputs = x + tl.minimum(m, rows - 1)[:, None] * x_row + k[None, :]  # rows past the last repeat it, unstored
    start = split * blocks_per_split * BLOCK_K
    stop = tl.minimum(start + blocks_per_split * BLOCK_K, depth)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for at in tl.range(start, stop, BLOCK_K):
        if EVEN:
            w = tl.load(weights + at, eviction_policy="evict_first")
            v = tl.load(inputs + at, eviction_policy="evict_last")
        else:
            inside = (at + k < stop)[None, :]
            w = tl.load(weights + at, mask=inside, other=0.0)
            v = tl.load(inputs + at, mask=inside, other=0.0)
        acc = dot(w, tl.trans(v), acc, PRECISION)

    stored = (n < columns)[:, None] & (m < rows)[None, :]
    target = out + m[None, :].to(tl.int64) * columns + n[:, None]
    if SPLITS == 1:
        if bias is not None:
            acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
        tl.store(target, acc.to(out.dtype.element_ty), mask=stored)
    else:
        within = tl.arange(0, BLOCK_N)[:, None] * ROWS + m[None, :]
        first_part = parts + tile.to(tl.int64) * (SPLITS * BLOCK_N * ROWS) + within
        tl.store(first_part + split * (BLOCK_N * ROWS), acc)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(first_part + s * (BLOCK_N * ROWS), cache_modifier=".cg")
            if bias is not None:
                total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
            tl.store(target, total.to(out.dtype.element_ty), mask=stored)
            tl.store(counters + tile, 0)


def config(rows: int, columns: int, depth: int, item: int, sms: int) -> dict[str, Any]:
    """Block sizes, warps, stages and splits by shape alone; a tuning script may replace this function."""
    block_n, block_k = (64, 128) if item == 2 else (64, 32)
    resident = 2  # programs per multiprocessor: 4 stages of 64 x 128 weights and 32 x 128 inputs are 96 KiB each
    tiles, blocks = triton.cdiv(columns, block_n), triton.cdiv(depth, block_k)

    def cost(splits: int) -> float:
        waves = math.ceil(tiles * splits / (resident * sms))
        return waves * (math.ceil(blocks / splits) + START_BLOCKS) + (splits if splits > 1 else 0)

    return {
        "ROWS": 16 if rows <= 16 else 32,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": min(range(1, min(MAX_SPLITS, blocks) + 1), key=cost),
        "num_warps": 4,
        "num_stages": 4,
    }


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Shared by all calls on a device, which leave it as they found it: in one stream they run one by one."""
    with torch.inference_mode(False):
        return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for x [rows,K] with at most 32 rows; more go to cuBLAS.

    Args:
        x: [rows,K] bf16, fp16 or fp32; the last dim contiguous.
        weight: [N,K] of x's dtype; the last dim contiguous.
        bias: [N] of x's dtype, or None.

    Returns:
        [rows,N]. One stream of a device at a time may run it.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    chosen = config(rows, columns, depth, x.element_size(), multiprocessors(x))
    tiles = triton.cdiv(columns, chosen["BLOCK_N"])
    if rows > MAX_ROWS or tiles > MAX_TILES:
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    splits, block = chosen["SPLITS"], chosen["BLOCK_K"]
    parts = counters = None
    if splits > 1:
        parts = torch.empty(tiles, splits, chosen["BLOCK_N"], chosen["ROWS"], dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    with device_of(x):
        _skinny_kernel[(tiles, splits)](
            x,
            weight,
            bias,
            out,
            parts,
            counters,
            rows,
            columns,
            depth,
            x.stride(0),
            weight.stride(0),
            triton.cdiv(triton.cdiv(depth, block), splits),
            EVEN=depth % block == 0,
            PRECISION=dot_precision(x),
            **chosen,
        )
    return out
