"""draft_topk: the ten most likely tokens of every row of a 152,064-token vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import DTYPES, Call, Case, Peer, Thunk, Work, rounding_problems
from .peers import compiled
from .shapes import VOCAB, rng


@dataclass(frozen=True, kw_only=True)
class DraftTopk(Case):
    """Rows of logits, k tokens each."""

    op = "draft_topk"

    rows: int
    k: int = 10
    vocab: int = VOCAB
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        dtype = "" if self.dtype == "bf16" else f" {self.dtype}"
        return f"rows {self.rows} vocab {self.vocab:,} k{self.k}{dtype}"

    def inputs(self, device: torch.device, seed: int) -> Call:
        shape = (self.rows, self.vocab)
        logits = 3 * torch.randn(shape, device=device, dtype=DTYPES[self.dtype], generator=rng(device, seed))
        return Call((logits, self.k))

    def work(self) -> Work:
        return Work(self.rows * (self.vocab * DTYPES[self.dtype].itemsize + 12 * self.k))

    def small(self) -> DraftTopk:
        return replace(self, vocab=min(self.vocab, 20_011))

    def check(self, device: torch.device, backend: str) -> list[str]:
        call = self.inputs(device, 0)
        log_probs, ids = self.run(call, backend)
        _, want_ids = self.reference(call)
        if not torch.equal(ids, want_ids):
            return [f"token_ids: {int((ids != want_ids).sum())} of {ids.numel()} differ from the reference"]
        logits = call.args[0]
        exact, plain = (torch.log_softmax(logits.to(t), -1).gather(-1, ids) for t in (torch.float64, torch.float32))
        return rounding_problems([("log_probs", log_probs, exact, plain)])

    def peers(self) -> list[Peer]:
        return PEERS


def _log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    values, ids = torch.topk(logits, k)
    return values.float() - torch.logsumexp(logits.float(), -1, keepdim=True), ids


def _torch(_case: DraftTopk, calls: list[Call]) -> list[Thunk]:
    """The ids are left out of the comparison: torch.topk breaks the many ties of bf16 logits as it likes."""
    return [lambda c=c: _log_probs(*c.args)[:1] for c in calls]


def _compiled(_case: DraftTopk, calls: list[Call]) -> list[Thunk]:
    function = compiled(_log_probs)
    return [lambda c=c: function(*c.args)[:1] for c in calls]


def _torch_topk(_case: DraftTopk, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: torch.topk(*c.args) for c in calls]


def _flashinfer_top_k(_case: DraftTopk, calls: list[Call]) -> list[Thunk]:
    import flashinfer

    return [lambda c=c: flashinfer.top_k(*c.args, sorted=True) for c in calls]


PEERS = [
    Peer("torch.topk + logsumexp", _torch),
    Peer("torch.compile", _compiled, slow=True),
    Peer("torch.topk alone", _torch_topk, whole=False),
    Peer("FlashInfer top_k alone", _flashinfer_top_k, whole=False, module="flashinfer"),
]


def _topk(rows: int, **fields: Any) -> DraftTopk:
    return DraftTopk(rows=rows, **fields)


CASES: list[Case] = [
    _topk(1, must=14, goal=7, quick=True),
    _topk(4, must=16, goal=8, quick=True),
    _topk(26, must=22, goal=10, quick=True),
    _topk(64),
    _topk(4, dtype="fp16"),
    _topk(4, dtype="fp32"),
]
TINY: list[Case] = [_topk(3, vocab=997, dtype="fp32")]
