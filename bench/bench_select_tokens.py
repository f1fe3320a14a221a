"""select_tokens: keep 10% of the video tokens, top_p 0.4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from specvlm_kernels import keep_count, reference

from .cases import Call, Case, Peer, Thunk, Work
from .peers import compiled
from .shapes import rng


@dataclass(frozen=True, kw_only=True)
class SelectTokens(Case):
    """Rows of V scores with a heavy tail, as attention has; masked: every fifth token is text, not a candidate."""

    op = "select_tokens"

    tokens: int
    batch: int = 1
    masked: bool = False

    @property
    def keep(self) -> int:
        return keep_count(self.tokens - (self.tokens // 5 if self.masked else 0), 0.9)

    @property
    def label(self) -> str:
        batch = f"B{self.batch} " if self.batch > 1 else ""
        return f"{batch}V{self.tokens:,}" + (" with mask" if self.masked else "")

    def inputs(self, device: torch.device, seed: int) -> Call:
        shape = (self.batch, self.tokens)
        scores = torch.exp(1.5 * torch.randn(shape, device=device, generator=rng(device, seed))) / self.tokens
        mask = (torch.arange(self.tokens, device=device) % 5 != 4).expand(shape).contiguous() if self.masked else None
        return Call((scores, self.keep, 0.4), {"mask": mask})

    def work(self) -> Work:
        per_row = self.tokens * (5 if self.masked else 4) + 8 * self.keep + 4
        return Work(self.batch * per_row)

    def small(self) -> SelectTokens:
        return replace(self, tokens=min(self.tokens, 33_000 if self.tokens > 32_768 else 3001))

    def peers(self) -> list[Peer]:
        return PEERS


def _torch(_case: SelectTokens, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: reference.select_tokens(*c.args, **c.kwargs) for c in calls]


def _compiled(_case: SelectTokens, calls: list[Call]) -> list[Thunk]:
    function = compiled(reference.select_tokens)
    return [lambda c=c: function(*c.args, **c.kwargs) for c in calls]


def _torch_topk(case: SelectTokens, calls: list[Call]) -> list[Thunk]:
    return [lambda c=c: torch.topk(c.args[0], case.keep) for c in calls]


def _flashinfer_top_k(case: SelectTokens, calls: list[Call]) -> list[Thunk]:
    import flashinfer

    return [lambda c=c: flashinfer.top_k(c.args[0], case.keep) for c in calls]


PEERS = [
    Peer("torch, no host sync", _torch),
    Peer("torch.compile", _compiled, compiled=True),
    Peer("torch.topk alone", _torch_topk, whole=False),
    Peer("FlashInfer top_k alone", _flashinfer_top_k, whole=False, module="flashinfer"),
]


def _select(tokens: int, **fields: Any) -> SelectTokens:
    return SelectTokens(tokens=tokens, **fields)


CASES: list[Case] = [
    _select(12_544, must=12, goal=7, quick=True),
    _select(25_088, must=14, goal=8, quick=True),
    _select(131_072, must=25, goal=12, quick=True),
    _select(1_048_576, must=45, goal=20),
    _select(25_088, batch=4),
    _select(25_088, batch=16),
    _select(25_088, masked=True),
]
TINY: list[Case] = [_select(199), _select(1000, batch=2, masked=True)]
