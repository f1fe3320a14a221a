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
from .ops.expand_tree import empty_expansion, expand_tree
from .reference.expand_tree import Expansion
from .reference.verify_greedy import Verdict
from .tree import DynamicTree, TokenTree
from .workspace import Side


@dataclass
class Proposal:
    """A tree for the target to check: tokens int64 [1,N], parents int32 [N] or [1,N], mask int64 words [N,W] or
    [1,N,W], depths int32 or int64 [1,N]. The tensors stay; their contents may change every round."""

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


def make_drafter(side: Side, tree: TokenTree | DynamicTree, shared_vocab: int) -> Drafter:
    """What drafts trees of this kind; tokens from shared_vocab on are never proposed."""
    if isinstance(tree, DynamicTree):
        return DynamicDrafter(side, tree, shared_vocab)
    return TreeDrafter(side, tree, shared_vocab)


class Unread:
    """What is decided and the draft has not read: the root, and before it at most one token.

    Of an accepted path the draft has read every node with a child in the tree, so all but the last. Both cases run
    the same pass of two rows; where only the root is new the second row is padding, whose cache slot the first level
    overwrites before anything sees it.
    """

    def __init__(self, side: Side):
        device = side.cache.kv_lens.device
        self._side = side
        self._chain = torch.zeros(1, 2, dtype=torch.int64, device=device)  # the root is the last
        self._last = torch.zeros(1, dtype=torch.int64, device=device)  # where in the chain the root is
        self._ahead = torch.arange(2, device=device)
        self.state = [side.cache.kv_lens, self._chain, self._last]

    def start(self, root: int) -> None:
        self._chain.fill_(root)
        self._last.zero_()

    def read(self, root: Tensor) -> Tensor:
        """Reads the chain, up to where the root is the first token after the context; its token goes to root int64
        [1]. Returns logits [1,1,vocab] at the root."""
        side = self._side
        # a token past the draft's vocabulary is read as another one: only acceptance can suffer
        chain = self._chain.clamp(max=side.model.vocab_size - 1)
        logits = side.model.forward(side.cache, chain, side.next_position + self._ahead, rows=self._last)
        side.cache.kv_lens += self._last.int()
        root.copy_(self._chain[0].gather(0, self._last))
        return logits

    def follow(self, unread: Tensor, token: Tensor, root: Tensor) -> None:
        """What the next round reads: the new root, and where unread (bool [1]) the token before it."""
        self._chain[:, :1] = torch.where(unread, token, root)
        self._chain[:, 1] = root
        self._last.copy_(unread)


class TreeDrafter:
    """Drafts a static TokenTree: a pass for what the draft has not read, then one per level but the deepest.

    The deepest level is never read, so when a path reaches it its last token is still to be read in the next round.
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
        self._unread = Unread(side)

    @property
    def state(self) -> Sequence[Tensor]:
        return self._unread.state

    def start(self, root: int) -> None:
        self._unread.start(root)

    def levels(self) -> Sequence[Step]:
        return [self._catch_up, *(partial(self._read_level, level) for level in range(1, self._tree.max_depth))]

    def _catch_up(self) -> None:
        self._fill_level(1, self._unread.read(self.proposal.tokens[0, :1]))

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
        self._unread.follow(unread, deepest[:, 0], verdict.next_token)


class DynamicDrafter:
    """Drafts a DynamicTree: a pass for what the draft has not read, then one per level for its likeliest nodes.

    The draft's cache holds the nodes it reads level by level after the context, at the slots of their rows (see
    expand_tree). Of an accepted path these are moved together; its last node may be one that was not read.
    """

    def __init__(self, side: Side, tree: DynamicTree, shared_vocab: int):
        device = side.cache.kv_lens.device
        self._side, self._tree, self._shared_vocab = side, tree, shared_vocab
        self.passes = tree.depth
        shape = (1, tree.draft_nodes, tree.width)
        self._log_probs = torch.zeros(shape, device=device)
        self._token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._root = torch.zeros(1, dtype=torch.int64, device=device)
        self._kept: Expansion = empty_expansion(self._log_probs, tree.nodes)
        for tensor in self._kept:
            tensor.zero_()
        self.proposal = Proposal(self._kept.tokens, self._kept.parents, self._kept.mask, self._kept.depths)
        # rows may lie above N; compact_kv takes entries below the path's own size
        self._read_path = torch.full((1, max(tree.nodes, tree.draft_nodes)), -1, dtype=torch.int32, device=device)
        self._unread = Unread(side)

    @property
    def state(self) -> Sequence[Tensor]:
        return self._unread.state

    def start(self, root: int) -> None:
        self._unread.start(root)

    def levels(self) -> Sequence[Step]:
        return [self._catch_up, *(partial(self._read_level, level) for level in range(1, self._tree.depth)), self._keep]

    def _catch_up(self) -> None:
        self._propose(slice(0, 1), self._unread.read(self._root))

    def _read_level(self, level: int) -> None:
        side, width = self._side, self._tree.width
        start = 1 + (level - 1) * width
        grown = expand_tree(self._log_probs[:, :start], self._token_ids[:, :start], self._root)
        new = grown.tokens[:, start:]
        positions = (side.next_position + level).expand_as(new)
        logits = side.model.forward(side.cache, new, positions, first=start, tree_mask=grown.mask)
        self._propose(slice(start, start + width), logits)

    def _propose(self, rows: slice, logits: Tensor) -> None:
        candidates = draft_topk(logits[..., : self._shared_vocab], self._tree.width)
        self._log_probs[:, rows], self._token_ids[:, rows] = candidates

    def _keep(self) -> None:
        expand_tree(self._log_probs, self._token_ids, self._root, self._tree.nodes, out=self._kept)

    def commit(self, verdict: Verdict) -> None:
        cache, path, length = self._side.cache, verdict.path.long().clamp(min=0), verdict.length
        rows = self._kept.rows.gather(1, path)  # past the path these are the root's
        last = (length.long() - 1).clamp(min=0)[:, None]
        unread = rows.gather(1, last)[:, 0] < 0
        self._read_path[:, : self._tree.nodes] = rows
        compact_kv(cache.keys, cache.values, cache.kv_lens, self._read_path, length - unread.int())
        token = self._kept.tokens.gather(1, path.gather(1, last))[:, 0]
        self._unread.follow(unread, token, verdict.next_token)
