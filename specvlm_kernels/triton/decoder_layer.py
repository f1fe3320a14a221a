"""What stands between the matrix products of a decoder layer, one launch each; definitions in passes/ops.py.

Row strides are specialised on: known to be multiples of 16, they give 16-byte loads instead of 2-byte ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import device_of


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, out, total_out, x_row, residual_row, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)  # here, not behind the reduction
    total = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    added = tl.load(residual + row * residual_row + column, mask=inside, other=0.0)
    total = (total.to(tl.float32) + added.to(tl.float32)).to(total_out.dtype.element_ty)
    tl.store(total_out + row * HIDDEN + column, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, 0) / HIDDEN + eps))
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * HIDDEN + column, (normed * factor).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    n, hidden = x.shape
    out = torch.empty(n, hidden, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    block = triton.next_power_of_2(hidden)
    with device_of(x):
        _add_rms_norm_kernel[(n,)](
            x,
            residual,
            weight,
            out,
            total,
            x.stride(0),
            residual.stride(0),
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),  # 16 elements a thread
        )
    return out, total


@triton.jit(do_not_specialize=["capacity"])
def _rope_to_cache_kernel(
    qkv,
    cos,
    sin,
    queries,
    keys,
    values,
    slots,
    qkv_row,
    angle_row,
    q_row,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    capacity,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    j = tl.arange(0, BLOCK)
    inside = j < HALF
    source = qkv + row * qkv_row + head * (2 * HALF) + j
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    if head < Q_HEADS + KV_HEADS:
        c = tl.load(cos + row * angle_row + j, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * angle_row + j, mask=inside, other=0.0).to(tl.float32)
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        low = (wide_low * c - wide_high * s).to(low.dtype)
        high = (wide_high * c + wide_low * s).to(high.dtype)
    if head < Q_HEADS:
        target = queries + row * q_row + head * q_head + j
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)
    else:
        slot = tl.load(slots + row)
        inside = inside & (slot >= 0) & (slot < capacity)
        if head < Q_HEADS + KV_HEADS:
            target = keys + slot * k_token + (head - Q_HEADS) * k_head + j
        else:
            target = values + slot * v_token + (head - Q_HEADS - KV_HEADS) * v_head + j
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)


def rope_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    n, q_heads, d = queries.shape
    capacity, kv_heads, _ = keys.shape
    with device_of(qkv):
        _rope_to_cache_kernel[(n, q_heads + 2 * kv_heads)](
            qkv,
            cos,
            sin,
            queries,
            keys,
            values,
            slots,
            qkv.stride(0),
            cos.stride(0),
            *queries.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            capacity,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            HALF=d // 2,
            BLOCK=triton.next_power_of_2(d // 2),
            num_warps=1,
        )


@triton.jit
def _silu_mul_kernel(gate_up, out, size, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    active = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (active * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, size, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    with device_of(gate_up):
        _silu_mul_kernel[(triton.cdiv(size, block), n)](gate_up, out, size, gate_up.stride(0), BLOCK=block, num_warps=4)
    return out
