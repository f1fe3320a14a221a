"""TokenTree: shapes, masks, bad input."""

import pytest
import torch
from kit import ancestor_mask, randint, random_tree, words_of

import specvlm_kernels as sk
from specvlm_kernels.tree import pack_mask


def test_the_papers_tree():
    tree = sk.SPECVLM_TREE
    assert tree.num_nodes == 26 and tree.max_depth == 5 and tree.width == 4
    assert [len(level) for level in tree.levels] == [1, 4, 8, 8, 3, 2]


def test_from_paths_puts_parents_first_and_keeps_ranks():
    tree = sk.TokenTree.from_paths([(1,), (0, 2), (0,), (0, 0), (1, 5)])
    assert tree.parents == (-1, 0, 0, 1, 1, 2)
    assert tree.ranks == (0, 0, 1, 0, 2, 5)
    assert tree.depths == (0, 1, 1, 2, 2, 2)
    assert tree.width == 6


def test_level_sources_lead_from_each_level_to_the_next():
    tree = sk.TokenTree.from_paths([(1,), (0, 2), (0,), (0, 0), (1, 5)])
    assert [(rows.tolist(), ranks.tolist()) for rows, ranks in tree.level_sources()] == [
        ([0, 0], [0, 1]),
        ([0, 0, 1], [0, 2, 5]),
    ]


def test_chain():
    tree = sk.TokenTree.chain(3)
    assert tree.parents == (-1, 0, 1, 2)
    assert torch.equal(tree.ancestor_mask(), torch.ones(4, 4, dtype=torch.bool).tril())


@pytest.mark.parametrize("n", [1, 26, 63, 64, 65, 128])
def test_masks(n):
    parents = random_tree(n, n)
    mask = ancestor_mask(parents)
    assert torch.equal(pack_mask(mask), words_of(mask))
    noise = randint(0, 2, (3, n, n), seed=n).bool()
    assert torch.equal(pack_mask(noise), words_of(noise))
    assert torch.equal(ancestor_mask(sk.SPECVLM_TREE.parents_tensor()), sk.SPECVLM_TREE.ancestor_mask())
    assert torch.equal(sk.SPECVLM_TREE.mask_words(), words_of(sk.SPECVLM_TREE.ancestor_mask()))


@pytest.mark.parametrize("paths", [[(0, 0)], [()], [(-1,)], [(0,), (1, 0, 0)]])
def test_bad_paths(paths):
    with pytest.raises(ValueError, match="paths"):
        sk.TokenTree.from_paths(paths)


@pytest.mark.parametrize("parents,ranks", [((), ()), ((0,), (0,)), ((-1, 1), (0, 0)), ((-1, 0, 0), (0, 0, 0)),
                                           ((-1, 0, 1, 0), (0, 0, 0, 1)), ((-1, 0), (0,))])  # fmt: skip
def test_bad_trees(parents, ranks):
    with pytest.raises(ValueError):
        sk.TokenTree(parents, ranks)


def test_dynamic_trees():
    tree = sk.DynamicTree(depth=5, width=10, nodes=60)
    assert (tree.num_nodes, tree.max_depth, tree.draft_nodes) == (60, 5, 41)
    assert sk.DynamicTree(1, 4, 5).draft_nodes == 1
    for name, values in [("depth", (0, 1, 2)), ("width", (1, 0, 2)), ("nodes", (1, 4, 6)), ("nodes", (5, 10, 1))]:
        with pytest.raises(ValueError, match=name):
            sk.DynamicTree(*values)
    with pytest.raises(TypeError, match="depth"):
        sk.DynamicTree(2.0, 4, 6)


def test_bad_chain():
    with pytest.raises(ValueError, match="n: "):
        sk.TokenTree.chain(0)
