"""What a generation returns and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

PREFILL_PHASES = ("target_prefill", "rating", "select", "draft_prefill", "capture")
ROUND_PHASES = ("draft", "verify", "accept", "commit")
PHASES = (*PREFILL_PHASES, *ROUND_PHASES, "host")


@dataclass
class Stats:
    """What a generation did.

    tau: mean draft tokens accepted per round, without the target's own token; tokens_per_round = tau + 1.
    seconds: by phase. The phases of a round are timed on the device; "host" is what the rounds took beyond that, the
    device waiting for the host to read a result and to start the next round. The other phases are wall time, with
    the device synchronised at each boundary; "capture" warms up and records CUDA graphs, once per shape.
    graphs_captured: shapes that were recorded for this request; peak_bytes: of device memory, 0 on the CPU.
    """

    prompt_tokens: int = 0
    visual_tokens: int = 0
    kept_tokens: int = 0
    stage1_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    accepted: int = 0
    target_passes: int = 0
    draft_passes: int = 0
    graphs_captured: int = 0
    peak_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def tau(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.tau + 1 if self.rounds else 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "tau": self.tau,
            "tokens_per_round": self.tokens_per_round,
            "total_seconds": self.total_seconds,
        }
        return asdict(self) | derived


@dataclass
class Generation:
    """tokens (stop token included), text (None without a tokenizer), stats, and what the draft read.

    kept int64 [keep]: prompt indices of the visual tokens the draft read (None without pruning); scores float32
    [V]: the target's attention to the prompt tokens from scores_start on; margins: the target's best logit less
    its second, for every token of generate_autoregressive.
    """

    tokens: list[int]
    text: str | None
    stats: Stats
    kept: Tensor | None = None
    scores: Tensor | None = None
    scores_start: int = 0
    margins: list[float] | None = None


class Clock:
    """Adds up wall time per phase; phases nest, and inner time is not counted twice."""

    def __init__(self, device: torch.device, seconds: dict[str, float]):
        self.seconds = seconds
        self._device = device
        self._running: list[list] = []  # [phase, when it last started to count]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        now = self._now()
        if self._running:
            self._add(self._running[-1], now)
        self._running.append([phase, now])
        try:
            yield
        finally:
            now = self._now()
            self._add(self._running.pop(), now)
            if self._running:
                self._running[-1][1] = now

    def _add(self, entry: list, now: float) -> None:
        self.seconds[entry[0]] = self.seconds.get(entry[0], 0.0) + now - entry[1]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
