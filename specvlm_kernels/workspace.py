"""The memory that requests run in: caches sized to the request and kept, with the programs recorded over them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model import KVCache, Model

MAX_KEPT = 4  # sides of earlier requests, with the graphs over them


@dataclass
class Side:
    """One model of the pair while it generates: its cache, and how positions follow from cache lengths."""

    model: Model
    cache: KVCache
    offset: Tensor  # int64 [1]: position of the next token, less kv_lens

    @property
    def next_position(self) -> Tensor:
        """int64 [1,1]: the position of the token that comes after the context."""
        return (self.cache.kv_lens + self.offset)[:, None]

    def begin(self, offset: int) -> None:
        """A new request."""
        self.cache.kv_lens.zero_()
        self.offset.fill_(offset)


def bucket(tokens: int) -> int:
    """A capacity that many requests share: rounded up to an eighth of the power of two below, at least 64."""
    step = max(64, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def free_bytes(device: torch.device) -> int | None:
    """Device memory that an allocation can still get, torch's own reserve included; None where nobody knows."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Workspaces:
    """Caches and programs by shape. Recorded graphs hold addresses, so a shape keeps both until memory is needed."""

    def __init__(self) -> None:
        self._sides: dict[tuple[str, int], Side] = {}
        self._programs: dict[Hashable, Any] = {}

    def reserve(self, requests: dict[str, tuple[Model, int]], working_bytes: int) -> dict[str, Side]:
        """A side for every (model, tokens), allocated now, before any pass.

        Raises:
            MemoryError: caches and working memory do not fit, also after releasing what earlier requests left.
        """
        keys = {name: (name, bucket(tokens)) for name, (_, tokens) in requests.items()}
        device = next(iter(requests.values()))[0].device

        def new() -> list[str]:
            return [name for name, key in keys.items() if key not in self._sides]

        def missing() -> int:
            free = free_bytes(device)
            caches = sum(requests[name][0].cache_bytes(keys[name][1]) for name in new())
            return 0 if free is None else caches + working_bytes - free

        if missing() > 0 or (new() and len(self._sides) >= MAX_KEPT):
            self.release()
        if (short := missing()) > 0:
            sizes = ", ".join(f"{tokens} cache tokens for the {name}" for name, (_, tokens) in requests.items())
            raise MemoryError(
                f"the request does not fit {device}: {sizes} and {working_bytes} bytes of working memory are "
                f"{short} bytes more than is free"
            )
        for name in new():
            model, capacity = requests[name][0], keys[name][1]
            offset = torch.zeros(1, dtype=torch.int64, device=device)
            self._sides[keys[name]] = Side(model, model.new_cache(capacity), offset)
        return {name: self._sides[key] for name, key in keys.items()}

    def program(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What build() once made for this key; it owns a `Program` and lives as long as the sides it runs on."""
        if key not in self._programs:
            self._programs[key] = build()
        return self._programs[key]

    def release(self) -> None:
        """Frees every cache and graph that no request is using."""
        self._sides.clear()
        self._programs.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
