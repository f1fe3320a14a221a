"""tree_attention: trees over long contexts, plain decode, batches, pages, and the causal text pass with its lse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import peers
from .cases import DTYPES, Call, Case, Peer, Work, rounding_problems
from .shapes import (
    HEADS,
    LLAVA_72B,
    QWEN_7B,
    QWEN_32B,
    UNEVEN_16,
    ancestor_mask,
    cache_label,
    contexts_label,
    lengths,
    mask_words,
    random_cache,
    rng,
    small_contexts,
)


@dataclass(frozen=True, kw_only=True)
class TreeAttention(Case):
    """N nodes of a tree, or (causal) the last N tokens of a text, over one context per request."""

    op = "tree_attention"

    model: str
    nodes: int
    contexts: tuple[int, ...]
    causal: bool = False
    page_size: int = 0
    head_dim: int = 128
    dtype: str = "bf16"

    @property
    def q_heads(self) -> int:
        return HEADS[self.model][0]

    @property
    def kv_heads(self) -> int:
        return HEADS[self.model][1]

    @property
    def return_lse(self) -> bool:
        """A text pass hands its lse to token_scores; a decode step of one token does not."""
        return self.causal and self.nodes > 1

    @property
    def label(self) -> str:
        kind = f"text T{self.nodes} + lse" if self.return_lse else f"n{self.nodes}"
        heads = f"{self.model} Hq{self.q_heads} Hkv{self.kv_heads}"
        return f"{heads} {kind} {contexts_label(self.contexts)}" + cache_label(
            self.page_size, self.head_dim, self.dtype
        )

    @property
    def x_values(self) -> dict[str, int]:
        return {"context": self.contexts[0], "nodes": self.nodes}

    def inputs(self, device: torch.device, seed: int) -> Call:
        g, dtype = rng(device, seed), DTYPES[self.dtype]
        shape = (len(self.contexts), self.nodes, self.q_heads, self.head_dim)
        q = torch.randn(shape, device=device, dtype=dtype, generator=g)
        cache = random_cache(self.contexts, self.nodes, self.kv_heads, self.head_dim, dtype, self.page_size, device, g)
        kwargs: dict[str, Any] = {"out": torch.full_like(q, float("nan")), "return_lse": self.return_lse}
        if not self.causal:
            kwargs["tree_mask"] = mask_words(self.nodes, device)
        if cache.page_table is not None:
            kwargs["page_table"] = cache.page_table
        return Call((q, cache.k, cache.v, lengths(self.contexts, device)), kwargs)

    def work(self) -> Work:
        n, b, item = self.nodes, len(self.contexts), DTYPES[self.dtype].itemsize
        tokens = sum(self.contexts) + b * n
        cache = 2 * tokens * self.kv_heads * self.head_dim * item
        q_and_out = 2 * b * n * self.q_heads * self.head_dim * item
        extra = 4 * b * n * self.q_heads if self.return_lse else 0
        extra += 0 if self.causal else 8 * n * -(-n // 64)
        extra += 4 * tokens // self.page_size if self.page_size else 0
        seen_nodes = n * (n + 1) // 2 if self.causal else int(ancestor_mask(n).sum())
        pairs = n * sum(self.contexts) + b * seen_nodes
        return Work(cache + q_and_out + extra, 4 * pairs * self.q_heads * self.head_dim)

    def small(self) -> TreeAttention:
        return replace(self, contexts=small_contexts(self.contexts))

    def check(self, device: torch.device, backend: str) -> list[str]:
        call = self.inputs(device, 0)
        got = self.outputs(call, self.run(call, backend))
        q, k, v, kv_lens = call.args
        exact = Call((q.double(), k.double(), v.double(), kv_lens), {**call.kwargs, "out": None})
        want = self.outputs(exact, self.reference(exact))
        plain = self._plain(call)
        return rounding_problems(zip(("out", "lse"), got, want, plain))

    def _plain(self, call: Call) -> tuple[Tensor, Tensor]:
        """What plain PyTorch computes in the inputs' dtype: two matrix products and a softmax."""
        q, k, v, _ = call.args
        if "page_table" in call.kwargs:
            k, v = (x[call.kwargs["page_table"].long()].flatten(1, 2) for x in (k, v))
        groups = self.q_heads // self.kv_heads
        k, v = (x.repeat_interleave(groups, 2).permute(0, 2, 1, 3) for x in (k, v))
        logits = q.transpose(1, 2) @ k.transpose(2, 3) * self.head_dim**-0.5
        logits = logits.masked_fill(~peers.visible(self, call)[:, None], float("-inf"))
        out = torch.softmax(logits, -1) @ v
        return out.transpose(1, 2), torch.logsumexp(logits.float(), -1).transpose(1, 2)

    def peers(self) -> list[Peer]:
        return peers.ATTENTION


def _tree(model: str, nodes: int, *contexts: int, **fields: Any) -> TreeAttention:
    return TreeAttention(model=model, nodes=nodes, contexts=contexts, causal=nodes == 1, **fields)


def _text(model: str, tokens: int, *contexts: int, **fields: Any) -> TreeAttention:
    return TreeAttention(model=model, nodes=tokens, contexts=contexts, causal=True, **fields)


CASES: list[Case] = [
    _tree(LLAVA_72B, 26, 12_544, must=29, goal=21, quick=True),
    _tree(QWEN_32B, 26, 16_384, must=34, goal=24, quick=True),
    _tree(QWEN_32B, 64, 32_768, must=85, goal=70),
    _tree(QWEN_7B, 4, 2_560, must=8, goal=5, quick=True),
    _tree(QWEN_7B, 26, 25_088, must=30, goal=20),
    _tree(LLAVA_72B, 26, 131_072, must=207, goal=170),
    _tree(QWEN_32B, 1, 16_384, must=27, goal=20),
    _tree(QWEN_32B, 26, *[16_384] * 4),
    _tree(QWEN_32B, 26, *UNEVEN_16),
    _tree(QWEN_32B, 26, 16_384, page_size=16, quick=True),
    _tree(QWEN_32B, 26, 16_384, page_size=1),
    _tree(QWEN_32B, 26, *UNEVEN_16, page_size=16),
    _tree(QWEN_32B, 26, 16_384, head_dim=64),
    _tree(QWEN_32B, 26, 16_384, dtype="fp16"),
    _text(LLAVA_72B, 48, 12_544, must=43.5, quick=True),
    _text(QWEN_32B, 48, 25_088, must=51.8),
    _text(LLAVA_72B, 32, 131_072, must=216),
    *(_tree(QWEN_7B, 26, 1024 << i, sweep="context") for i in (0, 2, 4, 6)),
    *(_tree(QWEN_32B, n, 16_384, sweep="nodes") for n in (8, 64, 128)),
]
TINY: list[Case] = [
    _tree(QWEN_7B, 26, 100, 37, dtype="fp32", head_dim=16),
    _tree(QWEN_7B, 5, 100, 37, dtype="fp32", head_dim=16, page_size=16),
    _text(QWEN_7B, 7, 50, dtype="fp32", head_dim=16),
]
