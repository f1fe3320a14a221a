"""What the decoding loop asks of a model: a prompt, a cache, and a forward pass over tree nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .stats import Clock


@dataclass
class KVCache:
    """A model's keys and values: [L,B,S,Hkv,D] each, and kv_lens int32 [B], how much of it is context."""

    keys: Tensor
    values: Tensor
    kv_lens: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass
class Prompt:
    """A prompt after the vision tower.

    embeds [1,S,hidden]; positions int64 [axes,1,S] (3 axes for M-RoPE, else 1); visual bool [S];
    next_position: the first generated token's position.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    next_position: int

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    def take(self, index: Tensor) -> Prompt:
        """The prompt with only these tokens, each at its own position."""
        return Prompt(self.embeds[:, index], self.positions[..., index], self.visual[index], self.next_position)


@dataclass
class Rating:
    """Gathers the attention that the text pays to cache positions start .. start+V-1 into scores [1,V]."""

    scores: Tensor
    start: int
    clock: Clock


class Model(Protocol):
    """What the loop needs of a causal language model whose prompt may hold visual tokens."""

    vocab_size: int
    stop_tokens: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where its weights, caches and outputs are."""

    def embed(self, inputs: Mapping[str, Any]) -> Prompt:
        """Runs the vision tower and embeds the prompt."""

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one request."""

    def cache_bytes(self, capacity: int) -> int:
        """What new_cache(capacity) takes."""

    def prefill_bytes(self, tokens: int) -> int:
        """About what a pass over a prompt of so many tokens takes beside weights and cache."""

    def forward(
        self,
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        *,
        first: int = 0,
        tree_mask: Tensor | None = None,
        fresh: bool = False,
        rating: Rating | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits [1,n,vocab] of n new tokens (int64 [1,n], or embeddings [1,n,hidden]), written to the cache at
        kv_lens+first onwards without advancing kv_lens. They are nodes first .. first+n-1 of a tree of first+n
        nodes with this mask (None: a causal chain). fresh: the cache is empty and the chain starts the prompt.
        rating: also rate the visual tokens. rows int64 [r]: logits [1,r,vocab] of these tokens only.

        With int64 tokens it must not wait for the device: a CUDA graph may be recording it."""
