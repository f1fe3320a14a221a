"""Shapes and inputs that several ops share: models, KV caches, trees, rows of logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm_kernels import SPECVLM_TREE
from specvlm_kernels.tree import pack_mask

LLAVA_72B, QWEN_32B, QWEN_7B = "LLaVA-OV-72B", "Qwen2.5-VL-32B", "Qwen2.5-VL-7B"
HEADS = {LLAVA_72B: (64, 8), QWEN_32B: (40, 8), QWEN_7B: (28, 4)}
"""Query heads and KV heads; D is 128 unless a case says otherwise."""

VOCAB = 152_064
UNEVEN_16 = tuple(1024 + 31744 * i // 15 for i in range(16))
"""16 requests of 1k to 32k tokens."""


def rng(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def parents_of(nodes: int) -> tuple[int, ...]:
    """The paper's tree for 26 nodes, a fixed random one for other counts."""
    if nodes == SPECVLM_TREE.num_nodes:
        return SPECVLM_TREE.parents
    choose = random.Random(nodes)
    return (-1, *(choose.randrange(i) for i in range(1, nodes)))


def ancestor_mask(nodes: int) -> Tensor:
    """bool [N,N]: every node of parents_of(nodes) sees itself and its ancestors."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for i, parent in enumerate(parents_of(nodes)[1:], 1):
        mask[i] |= mask[parent]
    return mask


def mask_words(nodes: int, device: torch.device) -> Tensor:
    """int64 [N,W], as tree_attention takes it."""
    return pack_mask(ancestor_mask(nodes)).to(device)


def deepest_path(nodes: int) -> list[int]:
    """The nodes from below the root to the last node, which is one of the deepest in the paper's tree."""
    parents, path, node = parents_of(nodes), [], nodes - 1
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@dataclass(frozen=True)
class Cache:
    """K and V as an op takes them, with the page table, or None when contiguous."""

    k: Tensor
    v: Tensor
    page_table: Tensor | None


def capacity(contexts: Sequence[int], nodes: int) -> int:
    """Tokens per request: room for the longest, rounded up so that pages of 16 fit."""
    return (max(contexts) + nodes + 15) // 16 * 16


def random_cache(
    contexts: Sequence[int],
    nodes: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int,
    device: torch.device,
    g: torch.Generator,
) -> Cache:
    """Random K and V; pages (page_size > 0) lie in a random order that is the same for every seed."""
    b, tokens = len(contexts), capacity(contexts, nodes)
    shape = (b, tokens) if page_size == 0 else (b * tokens // page_size, page_size)
    k, v = (torch.randn(*shape, kv_heads, head_dim, device=device, dtype=dtype, generator=g) for _ in range(2))
    table = None
    if page_size:
        order = torch.randperm(shape[0], generator=rng(torch.device("cpu"), 0))
        table = order.int().view(b, tokens // page_size).to(device)
    return Cache(k, v, table)


def lengths(contexts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(contexts, dtype=torch.int32, device=device)


def cache_label(page_size: int, head_dim: int, dtype: str) -> str:
    """What differs from contiguous bf16 with D 128, to go at a label's end."""
    parts = [f" page {page_size}"] if page_size else []
    parts += [f" D{head_dim}"] if head_dim != 128 else []
    parts += [f" {dtype}"] if dtype != "bf16" else []
    return "".join(parts)


def contexts_label(contexts: Sequence[int]) -> str:
    if len(contexts) == 1:
        return f"S{contexts[0]:,}"
    if min(contexts) == max(contexts):
        return f"B{len(contexts)} S{contexts[0]:,}"
    return f"B{len(contexts)} S{min(contexts):,}-{max(contexts):,}"


def small_contexts(contexts: Sequence[int]) -> tuple[int, ...]:
    """As many requests, uneven, and short enough for the dense reference."""
    return tuple(min(c, 307 + 29 * i) for i, c in enumerate(contexts))


def deep_logits(
    shape: tuple[int, int, int], bump: float, device: torch.device, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """bf16 logits [B,N,vocab] and int64 tokens [B,N] where the target favours the deepest path of the tree.

    At every node on the way the wanted child's token has a logit of `bump`; the other logits are standard normal.
    """
    b, n, vocab = shape
    logits = torch.randn(b, n, vocab, device=device, dtype=torch.bfloat16, generator=g)
    tokens = torch.stack([torch.randperm(vocab, device=device, generator=g)[:n] for _ in range(b)])
    path = [0, *deepest_path(n)]
    for node, child in zip(path, path[1:]):
        logits[:, node].scatter_(1, tokens[:, child, None], bump)
    return logits, tokens
