"""The small operations between the matrix products of a decoder layer, and the product itself, in every variant.

Each has one torch definition, which rounds where transformers' modules round; "compile" hands it to Inductor,
"fused" runs a Triton kernel of the same name on the GPU and the definition itself on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual) * weight, x + residual); x, residual [n,H], weight [H]."""
    total = x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype), total


def rope_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """Rotates the queries and keys of a merged projection, and puts keys and values in the cache.

    Args:
        qkv: [n, (Hq + 2 Hkv) D].
        cos, sin: [n, D/2], in qkv's dtype.
        queries: [n,Hq,D], mutated: the rotated queries.
        keys, values: [S,Hkv,D], mutated at slots.
        slots: int64 [n], cache positions.
    """
    _, q_heads, d = queries.shape
    kv_heads = keys.shape[1]
    q, k, v = qkv.view(len(qkv), -1, d).split([q_heads, kv_heads, kv_heads], 1)
    queries.copy_(_rotate(q, cos, sin))
    keys.index_copy_(0, slots, _rotate(k, cos, sin))
    values.index_copy_(0, slots, v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [n, 2I], gate first."""
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


@dataclass(frozen=True)
class LayerOps:
    """What a decoder layer is made of beside attention."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope_to_cache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    silu_mul: Callable[[Tensor], Tensor]
    linear: Callable[..., Tensor]


DEFINITIONS = LayerOps(add_rms_norm, rope_to_cache, silu_mul, linear)
PASSES = ("eager", "compile", "fused", "fused-gemm")
"""eager: transformers' own modules. The others walk the same weights: with the definitions above under torch.compile,
with Triton kernels, and with Triton's skinny matrix product too, instead of cuBLAS."""


def layer_ops(passes: str, device: torch.device) -> LayerOps:
    """The operations of a variant on a device."""
    if passes == "compile" or device.type == "cpu":
        return DEFINITIONS
    from ..triton import decoder_layer, skinny_gemm

    product = skinny_gemm.linear if passes == "fused-gemm" else linear
    return LayerOps(decoder_layer.add_rms_norm, decoder_layer.rope_to_cache, decoder_layer.silu_mul, product)
