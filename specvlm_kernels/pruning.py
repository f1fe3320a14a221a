"""Which visual tokens the draft reads."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ._checks import integer, real
from .ops.select_tokens import select_tokens
from .reference.select_tokens import Selection

Method = Literal["specvlm", "uniform", "random", "none"]
METHODS: tuple[Method, ...] = ("specvlm", "uniform", "random", "none")


def keep_count(num_tokens: int, ratio: float) -> int:
    """The exact floor of num_tokens * (1 - ratio), with ratio taken as the decimal it prints as.

    Args:
        num_tokens: visual tokens, at least 0.
        ratio: share to prune, in [0,1).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """
    integer("num_tokens", num_tokens, 0)
    real("ratio", ratio, 0, 1)
    if ratio == 1:
        raise ValueError("ratio: expected a share below 1, got 1")
    return int(num_tokens * (1 - Fraction(repr(float(ratio)))))


@dataclass(frozen=True)
class Pruning:
    """How the draft's visual tokens are chosen (SpecVLM, section 3.2; 90% and 0.4 are the paper's).

    Args:
        method: "specvlm" (the target's attention, then uniform), "uniform", "random", or "none" (keep all).
        ratio: share of the visual tokens to prune, in [0,1).
        top_p: share of the attention mass for stage I, in [0,1]; "specvlm" only.
        seed: for "random".
    """

    method: Method = "specvlm"
    ratio: float = 0.9
    top_p: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        keep_count(0, self.ratio)
        real("top_p", self.top_p, 0, 1)
        integer("seed", self.seed, 0)

    @property
    def needs_scores(self) -> bool:
        return self.method == "specvlm"

    def keep(self, num_tokens: int) -> int:
        return num_tokens if self.method == "none" else keep_count(num_tokens, self.ratio)

    def select(self, scores: Tensor, candidates: Tensor, keep: int, backend: str | None = None) -> Selection:
        """Selection of `keep` of the candidates.

        Args:
            scores: float32 [B,V], the target's attention to each token of the span; any values unless needs_scores.
            candidates: bool [B,V], which tokens of the span are visual.
            keep: from self.keep(number of candidates).
        """
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(scores.shape, generator=generator).to(scores.device)
            return select_tokens(scores, keep, 1.0, mask=candidates, backend=backend)
        top_p = self.top_p if self.method == "specvlm" else 0.0
        return select_tokens(scores, keep, top_p, mask=candidates, backend=backend)
