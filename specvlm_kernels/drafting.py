"""How the draft proposes: from the last decided token to a token tree, on static tensors.

The loop knows of drafting what `Drafter` says. A drafter fills its proposal anew in every round, with the same
launches every time, so that one CUDA graph is every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .graphs import Step
from .ops.compact_kv import compact_kv
from .ops.draft_topk import draft_topk
from .reference.verify_greedy import Verdict
from .tree import TokenTree
from .workspace import Side


@dataclass
class Proposal:
    """A tree for the target to check: tokens int64 [1,N], parents int32 [N] or [1,N], mask int64 words [N,W], depths
    int64 [1,N]. The tensors stay; their contents may change every round."""

    tokens: Tensor
    parents: Tensor
    mask: Tensor
    depths: Tensor


class Drafter(Protocol):
    """What the loop needs of a way to draft."""

    proposal: Proposal
    passes: int  # of the draft model, per round

    @property
    def state(self) -> Sequence[Tensor]:
        """Tensors that a round advances."""

    def start(self, root: int) -> None:
        """A new request: its prompt is in the draft's cache, `root` is the first token decided."""

    def levels(self) -> Sequence[Step]:
        """Fills the proposal: launches only, the same ones every round."""

    def commit(self, verdict: Verdict) -> None:
        """Moves on past the accepted path and the target's next token: launches only."""


class TreeDrafter:
    """Drafts a static TokenTree: a pass for what the draft has not read, then one per level but the deepest.

    The deepest level is never read, so when a path reaches it its last token is still to be read in the next round,
    before the root. Both cases run the same pass of two rows; where only the root is new the second row is padding,
    whose cache slot the first level overwrites before anything sees it.
    """

    def __init__(self, side: Side, tree: TokenTree, shared_vocab: int):
        device = side.cache.kv_lens.device
        self._side, self._tree, self._shared_vocab = side, tree, shared_vocab
        self.passes = tree.max_depth
        self.proposal = Proposal(
            tokens=torch.zeros(1, tree.num_nodes, dtype=torch.int64, device=device),
            parents=tree.parents_tensor(device),
            mask=tree.mask_words(device),
            depths=torch.tensor([tree.depths], device=device),
        )
        self._sources = tree.level_sources(device)
        self._chain = torch.zeros(1, 2, dtype=torch.int64, device=device)  # tokens to read; the root is the last
        self._last = torch.zeros(1, dtype=torch.int64, device=device)  # where in the chain the root is
        self._ahead = torch.arange(2, device=device)

    @property
    def state(self) -> Sequence[Tensor]:
        return self._side.cache.kv_lens, self._chain, self._last

    def start(self, root: int) -> None:
        self._chain.fill_(root)
        self._last.zero_()

    def levels(self) -> Sequence[Step]:
        return [self._catch_up, *(partial(self._read_level, level) for level in range(1, self._tree.max_depth))]

    def _catch_up(self) -> None:
        side, tokens = self._side, self.proposal.tokens
        # a token past the draft's vocabulary is read as another one: only acceptance can suffer
        chain = self._chain.clamp(max=side.model.vocab_size - 1)
        logits = side.model.forward(side.cache, chain, side.next_position + self._ahead, rows=self._last)
        side.cache.kv_lens += self._last.int()
        tokens[:, :1] = self._chain.gather(1, self._last[:, None])
        self._fill_level(1, logits)

    def _read_level(self, level: int) -> None:
        side, nodes = self._side, self._tree.levels[level]
        new = self.proposal.tokens[:, nodes.start : nodes.stop]
        positions = (side.next_position + level).expand_as(new)
        words = self.proposal.mask[: nodes.stop, : (nodes.stop + 63) // 64]
        logits = side.model.forward(side.cache, new, positions, first=nodes.start, tree_mask=words)
        self._fill_level(level + 1, logits)

    def _fill_level(self, level: int, logits: Tensor) -> None:
        nodes = self._tree.levels[level]
        _, candidates = draft_topk(logits[..., : self._shared_vocab], self._tree.width)
        rows, ranks = self._sources[level - 1]
        self.proposal.tokens[0, nodes.start : nodes.stop] = candidates[0, rows, ranks]

    def commit(self, verdict: Verdict) -> None:
        depth, cache = self._tree.max_depth, self._side.cache
        compact_kv(cache.keys, cache.values, cache.kv_lens, verdict.path, verdict.length.clamp(max=depth - 1))
        unread = verdict.length == depth
        deepest = self.proposal.tokens.gather(1, verdict.path[:, depth - 1 : depth].long().clamp(min=0))
        self._chain[:, :1] = torch.where(unread, deepest[:, 0], verdict.next_token)
        self._chain[:, 1] = verdict.next_token
        self._last.copy_(unread)
