"""verify_greedy: the target's argmax at every node and the walk along the deepest path, which is accepted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from specvlm_kernels import reference

from .cases import Call, Case, Peer, Thunk, Work
from .shapes import VOCAB, deep_logits, parents_of, rng

LOGIT = 20.0  # above every other logit of a row: the deepest path is the argmax


@dataclass(frozen=True, kw_only=True)
class VerifyGreedy(Case):
    """A tree of N nodes per request; every token of the deepest path is the target's argmax."""

    op = "verify_greedy"

    nodes: int
    batch: int = 1
    vocab: int = VOCAB

    @property
    def label(self) -> str:
        return f"B{self.batch} n{self.nodes} vocab {self.vocab:,}"

    def inputs(self, device: torch.device, seed: int) -> Call:
        shape = (self.batch, self.nodes, self.vocab)
        logits, tokens = deep_logits(shape, LOGIT, device, rng(device, seed))
        return Call((logits, tokens, torch.tensor(parents_of(self.nodes), dtype=torch.int32, device=device)))

    def work(self) -> Work:
        per_request = self.nodes * (2 * self.vocab + 8 + 4 + 4) + 4 + 8
        return Work(self.batch * per_request)

    def small(self) -> VerifyGreedy:
        return replace(self, vocab=min(self.vocab, 20_011))

    def peers(self) -> list[Peer]:
        return PEERS


def _torch(_case: VerifyGreedy, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: reference.verify_greedy(*c.args) for c in calls]


def _argmax(_case: VerifyGreedy, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: torch.argmax(c.args[0], -1) for c in calls]


PEERS = [
    Peer("torch, no host sync", _torch),
    Peer("torch.argmax alone", _argmax, whole=False),
]


def _verify(nodes: int, **fields: Any) -> VerifyGreedy:
    return VerifyGreedy(nodes=nodes, **fields)


CASES: list[Case] = [
    _verify(26, must=16, goal=8, quick=True),
    _verify(64),
    _verify(26, batch=4),
    _verify(26, batch=16),
]
TINY: list[Case] = [_verify(26, batch=2, vocab=997), _verify(1, vocab=100)]
