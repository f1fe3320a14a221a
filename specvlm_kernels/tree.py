"""TokenTree: the shape of a token tree, without its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import _checks as check
from .reference._common import pack_bits


@dataclass(frozen=True)
class TokenTree:
    """A static tree of candidate tokens. Node 0 is the root: the last token already decided.

    Args:
        parents: parents[0] = -1; parents[i] < i for every other node, levels in order.
        ranks: which of its parent's candidates a node is, 0 the most likely; ranks[0] is unused.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1 or len(self.ranks) != len(self.parents):
            raise ValueError("parents: expected parents[0] = -1 and one rank for every node")
        if any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise ValueError(f"parents: expected 0 <= parents[i] < i for i >= 1, got {self.parents}")
        if len({(p, r) for p, r in zip(self.parents, self.ranks)}) != len(self.parents):
            raise ValueError("ranks: expected distinct ranks among siblings")
        if any(a > b for a, b in zip(self.depths, self.depths[1:])):
            raise ValueError("parents: expected the nodes level by level")

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> TokenTree:
        """A tree from the ranks on the way to each node: [(0,), (1,), (0, 0)] has two children of the root, and
        one grandchild under the first. Every prefix of a path must be a path too."""
        ordered = sorted({tuple(int(r) for r in path) for path in paths}, key=lambda path: (len(path), path))
        if any(not path or min(path) < 0 for path in ordered):
            raise ValueError("paths: expected non-empty sequences of ranks >= 0")
        index = {(): 0} | {path: i for i, path in enumerate(ordered, 1)}
        for path in ordered:
            if path[:-1] not in index:
                raise ValueError(f"paths: {path} is there, but its parent {path[:-1]} is not")
        return cls((-1, *(index[path[:-1]] for path in ordered)), (0, *(path[-1] for path in ordered)))

    @classmethod
    def chain(cls, n: int) -> TokenTree:
        """n candidates one after the other: n+1 nodes with the root."""
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        return cls.from_paths([(0,) * i for i in range(1, n + 1)])

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def max_depth(self) -> int:
        return self.depths[-1]

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """The nodes of each depth, from the root's."""
        starts = [self.depths.index(d) for d in range(self.max_depth + 1)] + [self.num_nodes]
        return tuple(range(a, b) for a, b in zip(starts, starts[1:]))

    @property
    def draft_nodes(self) -> int:
        """Nodes that the draft's cache has to hold, with the root."""
        return self.num_nodes

    @property
    def width(self) -> int:
        """Candidates needed per node: one more than the largest rank."""
        return max(self.ranks) + 1

    def ancestor_mask(self) -> Tensor:
        """bool [N,N]: node i sees itself and its ancestors."""
        mask = torch.eye(self.num_nodes, dtype=torch.bool)
        for i, parent in enumerate(self.parents[1:], 1):
            mask[i] |= mask[parent]
        return mask

    def mask_words(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [N,ceil(N/64)]: the ancestor mask as tree_attention takes it."""
        return pack_mask(self.ancestor_mask()).to(device)

    def level_sources(self, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """For every depth from 1 on, int64 [nodes of it] each: the parents, counted in their own level, and ranks."""
        pairs = zip(self.levels, self.levels[1:])
        return [
            (
                torch.tensor([self.parents[i] - above.start for i in nodes], device=device),
                torch.tensor([self.ranks[i] for i in nodes], device=device),
            )
            for above, nodes in pairs
        ]

    def parents_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 [N]: parents as verify_greedy and verify_sample take them."""
        return torch.tensor(self.parents, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class DynamicTree:
    """A tree that the draft shapes anew in every round, in the style of EAGLE-2 (arXiv 2406.16858).

    Level by level the draft reads the `width` likeliest nodes and proposes `width` children of each; of all that it
    proposed the likeliest are kept. How likely a node is: the sum of the log-probabilities on the way to it.

    Args:
        depth: levels below the root, and passes of the draft in a round.
        width: nodes that the draft reads on a level, and children it proposes for each.
        nodes: nodes that the target checks, with the root.
    """

    depth: int
    width: int
    nodes: int

    def __post_init__(self) -> None:
        check.integer("depth", self.depth, 1)
        check.integer("width", self.width, 1)
        check.integer("nodes", self.nodes, 2, 1 + self.draft_nodes * self.width)

    @property
    def num_nodes(self) -> int:
        """Nodes that the target checks, with the root."""
        return self.nodes

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def draft_nodes(self) -> int:
        """Nodes that the draft reads, with the root."""
        return 1 + (self.depth - 1) * self.width


def pack_mask(mask: Tensor) -> Tensor:
    """int64 bit words [...,N,ceil(N/64)] from a bool mask [...,N,N]: bit j%64 of word j//64 is mask[..., j]."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    return pack_bits(mask)


def _paper_paths() -> list[tuple[int, ...]]:
    """25 paths, 4/8/8/3/2 nodes per depth: the tree of EAGLE-1, which SpecVLM's code uses."""
    under = {(): 4, (0,): 3, (1,): 2, (2,): 2, (3,): 1}
    under |= {(0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1, (0, 0, 0): 3, (0, 0, 0, 0): 2}
    return [(*parent, rank) for parent, children in under.items() for rank in range(children)]


SPECVLM_TREE = TokenTree.from_paths(_paper_paths())
"""The paper's static tree: 26 nodes with the root, depth 5."""
