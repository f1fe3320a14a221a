"""expand_tree: the tree to verify from all that the draft proposed, and the nodes to read next on a level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from specvlm_kernels import reference

from .cases import Call, Case, Peer, Thunk, Work
from .shapes import VOCAB, rng


@dataclass(frozen=True, kw_only=True)
class ExpandTree(Case):
    """Candidates of so many levels, width of each row; nodes None is what the draft reads next."""

    op = "expand_tree"

    levels: int
    width: int = 10
    nodes: int | None = None
    batch: int = 1

    @property
    def rows(self) -> int:
        return 1 + (self.levels - 1) * self.width

    @property
    def label(self) -> str:
        kept = "next" if self.nodes is None else f"n{self.nodes}"
        return f"B{self.batch} levels {self.levels} width {self.width} {kept}"

    def inputs(self, device: torch.device, seed: int) -> Call:
        g = rng(device, seed)
        shape = (self.batch, self.rows, self.width)
        logits = 3 * torch.randn(self.batch, self.rows, 4 * self.width, device=device, generator=g)
        log_probs = torch.log_softmax(logits, -1).topk(self.width).values.contiguous()
        ids = torch.randint(0, VOCAB, shape, device=device, generator=g)
        root = torch.randint(0, VOCAB, (self.batch,), device=device, generator=g)
        return Call((log_probs, ids, root, self.nodes))

    def work(self) -> Work:
        n = self.rows + self.width if self.nodes is None else self.nodes
        return Work(self.batch * (4 * self.rows * self.width + 8 + n * (8 + 8 + 3 * 4 + 8 * ((n + 63) // 64))))

    def small(self) -> ExpandTree:
        return replace(self, batch=min(self.batch, 3))

    def peers(self) -> list[Peer]:
        return PEERS


def _torch(_case: ExpandTree, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: list(reference.expand_tree(*c.args)) for c in calls]


def _scores(log_probs: torch.Tensor, token_ids: torch.Tensor, root: torch.Tensor, nodes: int | None) -> Any:
    """EAGLE's steps as far as they are torch.topk: cumulative sums level by level, then the best of all."""
    k = log_probs.shape[2]
    total, scores = log_probs[:, :1], [log_probs[:, 0]]
    for start in range(1, log_probs.shape[1], k):
        best = torch.topk(total.flatten(1), k).values
        total = best[..., None] + log_probs[:, start : start + k]
        scores.append(total.flatten(1))
    return torch.topk(total.flatten(1), k) if nodes is None else torch.topk(torch.cat(scores, 1), nodes - 1)


def _torch_topk(_case: ExpandTree, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: _scores(*c.args) for c in calls]


PEERS = [
    Peer("torch, no host sync", _torch),
    Peer("torch.topk of the scores alone", _torch_topk, whole=False),
]

CASES: list[Case] = [
    ExpandTree(levels=5, nodes=26, quick=True),
    ExpandTree(levels=5, nodes=60, quick=True),
    ExpandTree(levels=1, quick=True),
    ExpandTree(levels=4, quick=True),
    ExpandTree(levels=8, nodes=60),
    ExpandTree(levels=5, nodes=60, batch=16),
    ExpandTree(levels=5, width=32, nodes=255),
]
TINY: list[Case] = [ExpandTree(levels=3, width=4, nodes=12, batch=2), ExpandTree(levels=2, width=3)]
