"""verify_sample: acceptance with coins along the deepest path, plain and with top_k or top_p."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import Call, Case, Peer, Thunk, Work
from .shapes import VOCAB, deep_logits, parents_of, rng

LOGIT = 16.0  # with standard normal logits around it, a probability of about 0.97 in a vocabulary of 152,064
COIN = 0.5  # accepts a child of that probability


@dataclass(frozen=True, kw_only=True)
class VerifySample(Case):
    """A tree of N nodes per request; the coins accept the deepest path."""

    op = "verify_sample"

    nodes: int
    batch: int = 1
    top_k: int | None = None
    top_p: float | None = None
    vocab: int = VOCAB

    @property
    def label(self) -> str:
        limits = f" top_k {self.top_k}" if self.top_k else ""
        limits += f" top_p {self.top_p}" if self.top_p else ""
        return f"B{self.batch} n{self.nodes} vocab {self.vocab:,}{limits}"

    def inputs(self, device: torch.device, seed: int) -> Call:
        shape = (self.batch, self.nodes, self.vocab)
        logits, tokens = deep_logits(shape, LOGIT, device, rng(device, seed))
        parents = torch.tensor(parents_of(self.nodes), dtype=torch.int32, device=device)
        coins = torch.full((self.batch, self.nodes + 1), COIN, device=device)
        return Call((logits, tokens, parents, coins), {"temperature": 1.0, "top_k": self.top_k, "top_p": self.top_p})

    def work(self) -> Work:
        per_request = self.nodes * (2 * self.vocab + 8 + 4 + 4 + 4) + 4 + 4 + 8
        return Work(self.batch * per_request)

    def small(self) -> VerifySample:
        return replace(self, vocab=min(self.vocab, 20_011))

    def peers(self) -> list[Peer]:
        return PEERS


def _softmax(_case: VerifySample, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: torch.softmax(c.args[0], -1, dtype=torch.float32) for c in calls]


PEERS = [Peer("torch.softmax of every node alone", _softmax, whole=False)]


def _verify(nodes: int, **fields: Any) -> VerifySample:
    return VerifySample(nodes=nodes, **fields)


CASES: list[Case] = [
    _verify(26, quick=True),
    _verify(26, top_k=50, quick=True),
    _verify(26, top_p=0.9),
    _verify(26, top_k=50, top_p=0.9),
    _verify(64),
    _verify(26, batch=4),
    _verify(26, batch=16),
]
TINY: list[Case] = [_verify(26, batch=2, vocab=997), _verify(26, vocab=997, top_k=5, top_p=0.9)]
