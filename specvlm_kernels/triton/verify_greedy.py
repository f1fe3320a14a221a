"""verify_greedy in Triton: the argmax of every node in chunks of the vocabulary, then the walk in one program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import device_of, id_of, key_with_id, order_key

MAX_PARTS = 32  # chunks per node that the walk reduces
MAX_WALK = 16384  # nodes times chunks it holds in registers


@triton.jit(do_not_specialize=["nodes", "steps"])
def _argmax_kernel(logits, parts, l_b, l_n, nodes, vocab, steps, BLOCK: tl.constexpr):
    """parts int64 [B*N, chunks]: each chunk's largest key_with_id; a chunk is `steps` blocks."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    base = logits + (row // nodes).to(tl.int64) * l_b + (row % nodes).to(tl.int64) * l_n
    best = tl.full([], -0x8000000000000000, tl.int64)
    for step in range(steps):
        token = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab
        key = order_key(tl.load(base + token, mask=inside, other=float("-inf")).to(tl.float32))
        top = tl.max(key, 0)
        first = tl.min(tl.where((key == top) & inside, token, 0x7FFFFFFF), 0)
        best = tl.maximum(best, key_with_id(top, first))
    tl.store(parts + row.to(tl.int64) * tl.num_programs(1) + chunk, best)


@triton.jit(do_not_specialize=["nodes", "chunks"])
def _walk_kernel(
    parts,
    tokens,
    parents,
    tree_lens,
    path,
    length,
    next_token,
    t_b,
    p_b,
    p_n,
    path_b,
    nodes,
    chunks,
    NODES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    live = nodes
    if tree_lens is not None:
        live = tl.minimum(tl.load(tree_lens + request), nodes)
    i = tl.arange(0, NODES)
    chunk = tl.arange(0, CHUNKS)
    part = parts + (request * nodes + i)[:, None] * chunks + chunk[None, :]
    lowest = -0x8000000000000000
    part = tl.load(part, mask=(i < nodes)[:, None] & (chunk < chunks)[None, :], other=lowest)
    best = id_of(tl.max(part, 1))
    token = tl.load(tokens + request * t_b + i, mask=i < live, other=-1)
    parent = tl.load(parents + request * p_b + i * p_n, mask=i < live, other=-1)
    accepted = tl.full([NODES], -1, tl.int32)
    count = 0
    node = 0
    walking = True
    while walking:
        wanted = tl.sum(tl.where(i == node, best, 0), 0)
        child = (parent == node) & (token == wanted) & (i > node) & (i < live)
        first = tl.min(tl.where(child, i, NODES), 0)
        walking = first < NODES
        accepted = tl.where((i == count) & walking, first, accepted)
        count += walking.to(tl.int32)
        node = tl.where(walking, first, node)
    tl.store(path + request * path_b + i, accepted, mask=i < nodes)
    tl.store(length + request, count)
    tl.store(next_token + request, tl.sum(tl.where(i == node, best, 0), 0))


def config(rows: int, nodes: int, vocab: int) -> dict[str, Any]:
    """Block size, warps and chunks by shape alone; a tuning script may replace this function.

    Returns BLOCK (tokens a program loads at once), num_warps, chunks (programs per node), walk_warps.
    """
    padded = triton.next_power_of_2(nodes)
    block = 8192 if vocab > 4096 else 1024
    chunks = max(1, min(triton.cdiv(vocab, block), MAX_PARTS, MAX_WALK // padded))
    held = padded * triton.next_power_of_2(chunks)
    return {"BLOCK": block, "num_warps": block // 1024, "chunks": chunks, "walk_warps": max(1, min(8, held // 1024))}


def verify_greedy(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    tree_lens: Tensor | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> None:
    b, n, vocab = logits.shape
    chosen = config(b * n, n, vocab)
    steps = triton.cdiv(triton.cdiv(vocab, chosen["BLOCK"]), chosen["chunks"])
    chunks = triton.cdiv(vocab, chosen["BLOCK"] * steps)
    parts = torch.empty(b * n, chunks, dtype=torch.int64, device=logits.device)
    with device_of(logits):
        _argmax_kernel[(b * n, chunks)](
            logits,
            parts,
            logits.stride(0),
            logits.stride(1),
            n,
            vocab,
            steps,
            BLOCK=chosen["BLOCK"],
            num_warps=chosen["num_warps"],
        )
        _walk_kernel[(b,)](
            parts,
            tokens,
            parents,
            tree_lens,
            path,
            length,
            next_token,
            tokens.stride(0),
            parents.stride(0),
            parents.stride(1),
            path.stride(0),
            n,
            chunks,
            NODES=triton.next_power_of_2(n),
            CHUNKS=triton.next_power_of_2(chunks),
            num_warps=chosen["walk_warps"],
        )
