"""A decoding pass that walks a transformers text model's own weights, in ten launches a layer.

transformers' modules launch about 30 kernels a layer. Here a layer is four matrix products, attention, and a kernel
before or after each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..model import KVCache
from ..ops.tree_attention import tree_attention
from .ops import PASSES, LayerOps, layer_ops

KNOWN = ("Qwen2Model", "Qwen2_5_VLTextModel")
RECOMPILE_LIMIT = 64  # models times widths of passes; a layer is compiled for each, and dynamo gives up at 8


class LayerWeights(NamedTuple):
    """Of one decoder layer: norms [H]; qkv [(Hq+2Hkv)D,H] and bias; out [H,HqD]; gate_up [2I,H]; down [H,I]."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LeanText:
    """Decode and verification passes of a Qwen2 or Qwen2.5-VL text model.

    q_proj, k_proj and v_proj of every layer become rows of one tensor, as do gate_proj and up_proj: their parameters
    are replaced by views of it, layer by layer, so that the memory is there once and the modules keep working. Do not
    move or re-type the model afterwards.

    Args:
        text: transformers' Qwen2Model or Qwen2_5_VLTextModel.
        lm_head: its output projection.
        passes: "compile", "fused" or "fused-gemm".

    Raises:
        ValueError: another architecture, or one that was changed (quantised, with adapters, with another RoPE).
    """

    def __init__(self, text: Any, lm_head: Any, passes: str):
        if passes not in PASSES[1:]:
            raise ValueError(f"passes: expected one of {', '.join(PASSES)}, got {passes!r}")
        _check_architecture(text, lm_head)
        attention = text.layers[0].self_attn
        self._embed, self._lm_head = text.embed_tokens.weight, lm_head.weight
        self._norm, self._eps = text.norm.weight, text.norm.variance_epsilon
        self._inv_freq = text.rotary_emb.inv_freq.float()
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._q_heads = text.config.num_attention_heads
        self.layers = [_weights(layer) for layer in text.layers]
        self._ops = layer_ops(passes, self._embed.device)
        self._layer = _decoder_layer
        if passes == "compile":
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            self._layer = torch.compile(_decoder_layer, fullgraph=True, dynamic=False)

    def forward(
        self,
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        *,
        first: int = 0,
        tree_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`Model.forward` for int64 tokens [1,n] at positions int64 [1,n] that all axes of M-RoPE share."""
        n, device = tokens.shape[1], tokens.device
        slots = cache.kv_lens.long() + torch.arange(first, first + n, device=device)
        angles = positions[0, :, None].float() * self._inv_freq
        dtype = self._embed.dtype
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        # nodes of earlier levels are in the cache already: their rows only keep the mask's numbering
        queries = torch.zeros(1, first + n, self._q_heads, self._head_dim, dtype=dtype, device=device)
        residual = embedding(tokens[0], self._embed)
        x = torch.zeros_like(residual)  # the first layer adds nothing, and is then compiled as all others
        for weights, keys, values in zip(self.layers, cache.keys[:, 0], cache.values[:, 0]):
            x, residual = self._layer(
                self._ops, weights, self._eps, self._scaling, first,
                x, residual, cos, sin, slots, queries, keys, values, cache.kv_lens, tree_mask,
            )  # fmt: skip
        x, _ = self._ops.add_rms_norm(x, residual, self._norm, self._eps)
        return self._ops.linear(x if rows is None else x[rows], self._lm_head)[None]


def _decoder_layer(
    ops: LayerOps,
    weights: LayerWeights,
    eps: float,
    scaling: float,
    first: int,
    x: Tensor,
    residual: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_lens: Tensor,
    tree_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x is what the last layer adds to the residual stream; returns the same of this one.

    keys, values [S,Hkv,D]: as they are, because Inductor copies a whole cache to write through a view of it.
    """
    x, residual = ops.add_rms_norm(x, residual, weights.input_norm, eps)
    qkv = ops.linear(x, weights.qkv, weights.qkv_bias)
    ops.rope_to_cache(qkv, cos, sin, queries[0, first:], keys, values, slots)
    attended = tree_attention(queries, keys[None], values[None], kv_lens, tree_mask, softmax_scale=scaling)
    assert isinstance(attended, Tensor)
    x = ops.linear(attended[0, first:].flatten(1), weights.out)
    x, residual = ops.add_rms_norm(x, residual, weights.post_norm, eps)
    x = ops.linear(ops.silu_mul(ops.linear(x, weights.gate_up)), weights.down)
    return x, residual


def _check_architecture(text: Any, lm_head: Any) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f'passes: {what}; use passes="eager", which runs transformers\' own modules')

    if type(text).__name__ not in KNOWN:
        refuse(f"expected a text model of type {' or '.join(KNOWN)}, got {type(text).__name__}")
    config = text.config
    if config.hidden_act != "silu":
        refuse(f"expected hidden_act silu, got {config.hidden_act}")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default" or text.rotary_emb.attention_scaling != 1:
        refuse(f"expected the default RoPE without scaling, got {rope}")
    products = {"lm_head": (lm_head, False)}
    for i, layer in enumerate(text.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            products[f"layers.{i}.{name}"] = getattr(layer.self_attn, name), True
        products[f"layers.{i}.o_proj"] = layer.self_attn.o_proj, False
        for name in ("gate_proj", "up_proj", "down_proj"):
            products[f"layers.{i}.{name}"] = getattr(layer.mlp, name), False
    for name, (module, bias) in products.items():
        if type(module) is not torch.nn.Linear or (module.bias is not None) != bias:
            refuse(f"expected {name} to be a torch.nn.Linear {'with' if bias else 'without'} bias, got {module}")


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=merge(qkv, "weight"),
        qkv_bias=merge(qkv, "bias"),
        out=attention.o_proj.weight,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=merge((mlp.gate_proj, mlp.up_proj), "weight"),
        down=mlp.down_proj.weight,
    )


def merge(modules: tuple[Any, ...], name: str) -> Tensor:
    """One tensor of the parameters below each other, of which the modules' own become views; as it is, if they are."""
    parts = [getattr(module, name).detach() for module in modules]
    first, rows = parts[0], sum(len(part) for part in parts)
    places = [part.storage_offset() - first.storage_offset() for part in parts]
    same = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    if same and places == [sum(p.numel() for p in parts[:i]) for i in range(len(parts))]:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    merged = torch.cat(parts)
    for module, part in zip(modules, merged.split([len(part) for part in parts])):
        setattr(module, name, torch.nn.Parameter(part, requires_grad=False))
    return merged
