"""token_scores: the text queries' attention to every video token, given the lse of the text pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specvlm_kernels import reference

from .bench_tree_attention import TreeAttention
from .cases import DTYPES, Call, Case, Peer, Thunk, Work, rounding_problems
from .peers import compiled, visible
from .shapes import (
    LLAVA_72B,
    QWEN_7B,
    QWEN_32B,
    UNEVEN_16,
    cache_label,
    contexts_label,
    lengths,
    random_cache,
    rng,
    small_contexts,
)

WEIGHT = 1 / 64
EXACT_LSE_BELOW = 1 << 26  # logits; larger shapes get the lse that random inputs have, to within noise


@dataclass(frozen=True, kw_only=True)
class TokenScores(TreeAttention):
    """T text queries (`nodes`, causal) rate the first max(contexts) cache positions: all of the video."""

    op = "token_scores"

    causal: bool = True
    span_tensor: bool = False

    @property
    def span(self) -> int:
        return max(self.contexts)

    @property
    def label(self) -> str:
        span = " start on the device" if self.span_tensor else ""
        heads = f"{self.model} Hq{self.q_heads} Hkv{self.kv_heads}"
        return f"{heads} T{self.nodes} {contexts_label(self.contexts)}{span}" + cache_label(
            self.page_size, self.head_dim, self.dtype
        )

    def inputs(self, device: torch.device, seed: int) -> Call:
        g, dtype = rng(device, seed), DTYPES[self.dtype]
        b, t = len(self.contexts), self.nodes
        q = torch.randn(b, t, self.q_heads, self.head_dim, device=device, dtype=dtype, generator=g)
        cache = random_cache(self.contexts, self.nodes, self.kv_heads, self.head_dim, dtype, self.page_size, device, g)
        k, table = cache.k, cache.page_table
        kv_lens = lengths(self.contexts, device)
        kwargs: dict[str, Any] = {"weight": WEIGHT, "out": torch.zeros(b, self.span, device=device)}
        if table is not None:
            kwargs["page_table"] = table
        lse = self._lse(q, k, kv_lens, table)
        start = torch.zeros(b, dtype=torch.int32, device=device) if self.span_tensor else 0
        return Call((q, k, lse, kv_lens, start, self.span), kwargs)

    def _lse(self, q: Tensor, k: Tensor, kv_lens: Tensor, table: Tensor | None) -> Tensor:
        if q.shape[:3].numel() * self.span < EXACT_LSE_BELOW:
            return reference.tree_attention(q, k, k, kv_lens, page_table=table, return_lse=True)[1].contiguous()
        lse = torch.log(kv_lens.float()) + 0.5  # log(S) + variance/2 for standard normal logits
        return lse[:, None, None].expand(q.shape[:3]).contiguous()

    def work(self) -> Work:
        t, b, item = self.nodes, len(self.contexts), DTYPES[self.dtype].itemsize
        tokens = sum(self.contexts)
        keys = tokens * self.kv_heads * self.head_dim * item
        queries = b * t * self.q_heads * (self.head_dim * item + 4)
        table = 4 * tokens // self.page_size if self.page_size else 0
        return Work(keys + queries + table + 2 * 4 * b * self.span, 2 * t * tokens * self.q_heads * self.head_dim)

    def small(self) -> TokenScores:
        return replace(self, contexts=small_contexts(self.contexts))

    def check(self, device: torch.device, backend: str) -> list[str]:
        call = self.inputs(device, 0)
        q, k, lse, *rest = call.args
        exact = Call((q.double(), k.double(), lse.double(), *rest), {**call.kwargs, "out": None})
        want = self.reference(exact)
        plain = self._plain(call)
        return rounding_problems([("scores", self.run(call, backend), want, plain)])

    def _plain(self, call: Call) -> Tensor:
        """What plain PyTorch computes in the inputs' dtype: a matrix product, exp and sums in float32."""
        q, k, lse, *_ = call.args
        shares = torch.exp(_logits(self, call, q, k).float() - lse.transpose(1, 2)[..., None])
        return WEIGHT * shares.masked_fill(~visible(self, call)[:, None], 0).mean((1, 2))[:, : self.span]

    def peers(self) -> list[Peer]:
        return PEERS


def _logits(case: TokenScores, call: Call, q: Tensor, k: Tensor) -> Tensor:
    """[B,Hq,T,S] in q's dtype, with the keys repeated for every query head as transformers' eager attention does."""
    if "page_table" in call.kwargs:
        k = k[call.kwargs["page_table"].long()].flatten(1, 2)
    keys = k.repeat_interleave(case.q_heads // case.kv_heads, 2).transpose(1, 2)
    return q.transpose(1, 2) @ keys.transpose(2, 3) * case.head_dim**-0.5


def _published(case: TokenScores, calls: list[Call]) -> list[Thunk]:
    """As the published code does it: the whole attention matrix, softmax in float32, cast, then means."""
    bias = torch.where(visible(case, calls[0]), 0.0, -math.inf).to(calls[0].args[0].dtype)[:, None]

    def thunk(call: Call) -> Tensor:
        q, k, *_ = call.args
        shares = torch.softmax(_logits(case, call, q, k) + bias, -1, dtype=torch.float32).to(q.dtype)
        return WEIGHT * shares[..., : case.span].mean((1, 2)).float()

    return [lambda c=c: thunk(c) for c in calls]


def _compiled(case: TokenScores, calls: list[Call]) -> list[Thunk]:
    """torch.compile of the same sums from the lse, without the attention matrix in memory if Inductor can."""
    groups, tokens = case.q_heads // case.kv_heads, case.contexts[0]

    def scores(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        queries = q.unflatten(2, (case.kv_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        logits = queries @ k[:, :tokens].permute(0, 2, 3, 1) * case.head_dim**-0.5
        rows = lse.unflatten(2, (case.kv_heads, groups)).permute(0, 2, 3, 1).flatten(2, 3)
        return WEIGHT * torch.exp(logits.float() - rows[..., None]).mean((1, 2))

    function = compiled(scores)
    return [lambda c=c: function(*c.args[:3]) for c in calls]


def _one_contiguous(case: TokenScores) -> str | None:
    return "written for one request without pages" if case.page_size or len(case.contexts) > 1 else None


PEERS = [
    Peer("published code (materialised)", _published, fits=lambda case: "takes no pages" if case.page_size else None),
    Peer("torch.compile", _compiled, compiled=True, fits=_one_contiguous),
]


def _scores(model: str, tokens: int, *contexts: int, **fields: Any) -> TokenScores:
    return TokenScores(model=model, nodes=tokens, contexts=contexts, **fields)


CASES: list[Case] = [
    _scores(LLAVA_72B, 48, 12_544, must=28, goal=18, quick=True),
    _scores(QWEN_32B, 48, 25_088, must=35, goal=22, quick=True),
    _scores(LLAVA_72B, 32, 131_072, must=180, goal=120),
    _scores(QWEN_32B, 48, *[16_384] * 4),
    _scores(QWEN_32B, 48, *UNEVEN_16),
    _scores(QWEN_32B, 48, 25_088, page_size=16, quick=True),
    _scores(QWEN_32B, 48, 25_088, page_size=1),
    _scores(QWEN_32B, 48, 25_088, head_dim=64),
    _scores(QWEN_32B, 48, 25_088, dtype="fp16"),
    _scores(QWEN_32B, 48, 25_088, span_tensor=True),
    *(_scores(QWEN_32B, t, 25_088, sweep="nodes") for t in (1, 16, 128, 512)),
    *(_scores(QWEN_32B, 48, 1024 << i, sweep="context") for i in (2, 4, 6)),
]
TINY: list[Case] = [
    _scores(QWEN_7B, 5, 100, 37, dtype="fp32", head_dim=16),
    _scores(QWEN_7B, 5, 50, dtype="fp32", head_dim=16, page_size=16, span_tensor=True),
]
