"""compact_kv: the paper's deepest path, five nodes, moved into place in all layers at once.

Every call advances its kv_lens by six. They are put back before each replay, outside of the timed region, and a
replay uses each set of caches once; so every timed call moves the same rows, and none comes near the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cases import Call, Case, Peer, Thunk, Work
from .shapes import Cache, deepest_path, lengths, random_cache, rng

NODES, HEAD_DIM = 26, 128
CONTEXT = 480  # short caches: what is moved does not depend on the length, and 49 sets must fit


@dataclass(frozen=True, kw_only=True)
class CompactKV(Case):
    """Caches of several layers, stacked or as a list, contiguous or (page_size > 0) in pages."""

    op = "compact_kv"

    layers: int
    kv_heads: int = 8
    batch: int = 1
    page_size: int = 0
    stacked: bool = True

    @property
    def label(self) -> str:
        page = f" page {self.page_size}" if self.page_size else ""
        batch = f" B{self.batch}" if self.batch > 1 else ""
        return f"{self.layers} layers {'stacked' if self.stacked else 'list'} Hkv{self.kv_heads}{batch}{page} path 5"

    @property
    def contexts(self) -> tuple[int, ...]:
        return (CONTEXT,) * self.batch

    def inputs(self, device: torch.device, seed: int) -> Call:
        g = rng(device, seed)
        layers = [self._layer(device, g) for _ in range(self.layers)]
        k_caches, v_caches = [c.k for c in layers], [c.v for c in layers]
        path = torch.full((self.batch, NODES), -1, dtype=torch.int32, device=device)
        nodes = torch.tensor(deepest_path(NODES), dtype=torch.int32, device=device)
        path[:, : len(nodes)] = nodes
        length = torch.full((self.batch,), len(nodes), dtype=torch.int32, device=device)
        kv_lens = lengths(self.contexts, device)
        caches = (torch.stack(k_caches), torch.stack(v_caches)) if self.stacked else (k_caches, v_caches)
        return Call((*caches, kv_lens, path, length), {"page_table": layers[0].page_table}, moving=[kv_lens])

    def _layer(self, device: torch.device, g: torch.Generator) -> Cache:
        return random_cache(self.contexts, NODES, self.kv_heads, HEAD_DIM, torch.bfloat16, self.page_size, device, g)

    def work(self) -> Work:
        """K and V of every row that moves, read and written; a node that already lies at its place does not move."""
        row = self.kv_heads * HEAD_DIM * torch.bfloat16.itemsize
        return Work(4 * self.layers * self.batch * len(_moves()) * row)

    def small(self) -> CompactKV:
        return replace(self, layers=min(self.layers, 5))

    def outputs(self, call: Call, returned: Any) -> list[Tensor]:
        k_caches, v_caches, kv_lens, *_ = call.args
        return [*k_caches, *v_caches, kv_lens]

    def peers(self) -> list[Peer]:
        return PEERS


def _moves() -> list[tuple[int, int]]:
    """(from, to), relative to kv_lens, of the rows that move."""
    return [(node, 1 + i) for i, node in enumerate(deepest_path(NODES)) if node != 1 + i]


def _torch_layers(case: CompactKV, calls: list[Call]) -> list[Thunk]:
    """A gather and an index_copy for K and V of every layer; the host knows the indices, so they cost nothing."""
    device = calls[0].args[3].device
    source, target = (torch.tensor([CONTEXT + move[i] for move in _moves()], device=device) for i in range(2))
    table = calls[0].kwargs["page_table"]
    if table is not None:
        source, target = (
            table.long()[0, x // case.page_size] * case.page_size + x % case.page_size for x in (source, target)
        )

    def thunk(call: Call) -> None:
        k_caches, v_caches, kv_lens, *_ = call.args
        for cache in (*k_caches, *v_caches):
            rows, dim = (cache.flatten(0, 1), 0) if case.page_size else (cache, 1)
            rows.index_copy_(dim, target, rows.index_select(dim, source))
        kv_lens.add_(1 + len(deepest_path(NODES)))

    return [lambda c=c: thunk(c) for c in calls]


def _torch_stacked(_case: CompactKV, calls: list[Call]) -> list[Thunk]:
    """The same for a stacked cache: one gather and one index_copy for all keys, one each for all values."""
    device = calls[0].args[3].device
    source, target = (torch.tensor([CONTEXT + move[i] for move in _moves()], device=device) for i in range(2))

    def thunk(call: Call) -> None:
        k_caches, v_caches, kv_lens, *_ = call.args
        for cache in (k_caches, v_caches):
            cache.index_copy_(2, target, cache.index_select(2, source))
        kv_lens.add_(1 + len(deepest_path(NODES)))

    return [lambda c=c: thunk(c) for c in calls]


def _stacked_only(case: CompactKV) -> str | None:
    return None if case.stacked and not case.page_size else "needs a stacked cache without pages"


def _one_page_table(case: CompactKV) -> str | None:
    return "written for one request with pages" if case.page_size and case.batch > 1 else None


PEERS = [
    Peer("torch per layer", _torch_layers, fits=_one_page_table),
    Peer("torch, layers stacked", _torch_stacked, fits=_stacked_only),
]


def _compact(layers: int, **fields: Any) -> CompactKV:
    return CompactKV(layers=layers, **fields)


CASES: list[Case] = [
    _compact(64, must=8, goal=4, quick=True),
    _compact(64, page_size=16, quick=True),
    _compact(80, stacked=False),
    _compact(64, batch=8),
    _compact(28, kv_heads=4),
]
TINY: list[Case] = [_compact(3), _compact(2, page_size=16), _compact(2, batch=2, stacked=False)]
