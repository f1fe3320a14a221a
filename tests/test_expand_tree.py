"""expand_tree against EAGLE-2's two steps written down candidate by candidate."""

import struct

import pytest
import torch
from kit import (
    Guarded,
    ancestor_mask,
    backends,
    bitwise_equal_reruns,
    gpu_backends,
    randint,
    randn,
    replayed,
    with_both_poisons,
    words_of,
)

import specvlm_kernels as sk
from specvlm_kernels.ops import expand_tree as module

INF, NAN = float("inf"), float("nan")


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def grown(log_probs: list, tokens: list, root: int, nodes: int | None) -> list[tuple[int, int, int, int]]:
    """(token, parent, depth, row) of every node: a walk over Python objects, one request."""
    k = len(log_probs[0])
    score, parent, depth = {-1: 0.0}, {}, {-1: 0}  # of candidates, the root being -1
    rows, level = [-1], [-1]
    while True:
        candidates = []
        for candidate in level:
            row = rows.index(candidate)
            for rank in range(k):
                gain = log_probs[row][rank]
                gain = -INF if gain != gain else min(gain, 0.0)
                child = row * k + rank
                score[child] = float32(score[candidate] + gain)
                parent[child], depth[child] = candidate, depth[candidate] + 1
                candidates.append(child)
        level = sorted(candidates, key=lambda c: (-score[c], c))[:k]
        if len(rows) + len(level) > len(log_probs):
            break
        rows += level
    every = [c for c in score if c >= 0]
    kept = rows[1:] + level if nodes is None else sorted(every, key=lambda c: (-score[c], c))[: nodes - 1]
    kept = [-1, *sorted(kept, key=lambda c: (depth[c], -score[c], c))]
    return [
        (
            root if c < 0 else tokens[c // k][c % k],
            -1 if c < 0 else kept.index(parent[c]),
            depth[c],
            rows.index(c) if c in rows else -1,
        )
        for c in kept
    ]


def problem(b, levels, k, seed=0, device="cpu"):
    """What draft_topk gives: descending log-probabilities, distinct tokens."""
    rows = 1 + (levels - 1) * k
    logits = 3 * randn(b, rows, k + 7, seed=seed)
    log_probs, ids = sk.reference.draft_topk(logits, k)
    return log_probs.to(device), ids.to(device), randint(0, 999, (b,), seed=seed).to(device)


def assert_as_defined(got, log_probs, tokens, root, nodes):
    dtypes = torch.int64, torch.int32, torch.int32, torch.int64, torch.int32
    assert tuple(x.dtype for x in got) == dtypes
    for r in range(len(root)):
        want = grown(log_probs[r].tolist(), tokens[r].tolist(), int(root[r]), nodes)
        columns = [column[r].tolist() for column in (got.tokens, got.parents, got.depths, got.rows)]
        assert list(zip(*columns)) == want
        parents = torch.tensor([parent for _, parent, _, _ in want])
        assert all(parent < i for i, parent in enumerate(parents.tolist()))
        assert torch.equal(got.mask[r].cpu(), words_of(ancestor_mask(parents)))


SHAPES = [
    *((1, 1, 1, 2), (2, 1, 4, 3), (2, 7, 1, 8), (3, 4, 3, 20), (2, 5, 10, 26), (1, 5, 10, 60), (1, 3, 16, 65)),
    *((2, 5, 10, 63), (2, 5, 10, 64), (1, 4, 10, 128), (1, 2, 37, 38), (2, 3, 4, 1), (1, 3, 5, 56)),
]


@backends("expand_tree")
@pytest.mark.parametrize("b,levels,k,nodes", SHAPES)
def test_the_best_candidates_become_a_tree(b, levels, k, nodes, backend, device):
    for seed in range(2):
        call = problem(b, levels, k, seed, device)
        for n in (nodes, None):
            got = sk.expand_tree(*call, n, backend=backend)
            assert_as_defined(got, *call, n)
            assert got.tokens.shape[1] == (call[0].shape[1] + k if n is None else n)


@backends("expand_tree")
def test_calls_for_more_rows_agree(backend, device):
    """What is read on a level is what the later calls call its rows."""
    log_probs, ids, root = problem(2, 5, 6, 3, device)
    whole = sk.expand_tree(log_probs, ids, root, backend=backend)
    for levels in range(1, 5):
        rows = 1 + (levels - 1) * 6
        part = sk.expand_tree(log_probs[:, :rows], ids[:, :rows], root, backend=backend)
        n = rows + 6
        for x, y in zip(part[:3], whole[:3]):
            assert torch.equal(x, y[:, :n])
        assert torch.equal(part.rows[:, :rows], torch.arange(rows, device=device).int().expand(2, -1))
        assert bool((part.rows[:, rows:] == -1).all())


@backends("expand_tree")
def test_equal_scores_go_to_the_lower_row_and_rank(backend, device):
    log_probs = torch.zeros(1, 9, 4, device=device)
    ids = torch.arange(36, device=device).view(1, 9, 4)
    root = torch.tensor([99], device=device)
    tree = sk.expand_tree(log_probs, ids, root, 12, backend=backend)
    assert tree.tokens[0].tolist() == [99, *range(11)]
    assert tree.parents[0].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    log_probs[:] = -1.0  # now shallow nodes are better
    log_probs[0, 2] = -2.0
    tree = sk.expand_tree(log_probs, ids, root, 10, backend=backend)
    assert tree.parents[0].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 3]


@backends("expand_tree")
def test_any_value_gives_a_connected_tree(backend, device):
    """NaN, infinities, positive and unsorted log-probabilities, denormals, sums that round."""
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-3, 3e38, -3e38, -1e-42, -1e-45, -16777216.0, -1.0])
    for seed, (levels, k, nodes) in enumerate([(4, 5, 30), (5, 10, 60), (6, 2, 19), (9, 1, 6), (3, 12, 100)]):
        rows = 1 + (levels - 1) * k
        log_probs = special[randint(0, len(special), (3, rows, k), seed=seed)].to(device)
        log_probs[1] = NAN
        log_probs[2] = torch.where(torch.isnan(log_probs[2]), -0.5, log_probs[2])
        ids = randint(-(2**62), 2**62, (3, rows, k), seed=seed).to(device)
        root = torch.tensor([-(2**63), 2**63 - 1, 0], device=device)
        for n in (nodes, None):
            got = sk.expand_tree(log_probs, ids, root, n, backend=backend)
            assert_as_defined(got, log_probs, ids, root, n)


@backends("expand_tree")
def test_every_output_is_written_and_reruns_are_equal(backend, device):
    log_probs, ids, root = problem(3, 5, 10, 1, device)
    for nodes in (None, 60, 65):
        bitwise_equal_reruns(lambda nodes=nodes: sk.expand_tree(log_probs, ids, root, nodes, backend=backend))

        def run(_, poison, nodes=nodes):
            shapes = module.empty_expansion(log_probs, nodes)
            outputs = [Guarded(tuple(x.shape), x.dtype, device, poison) for x in shapes]
            out = sk.Expansion(*(g.tensor for g in outputs))
            got = sk.expand_tree(log_probs, ids, root, nodes, out=out, backend=backend)
            assert all(x is y.tensor for x, y in zip(got, outputs))
            return outputs

        got = with_both_poisons(run)
        assert_as_defined(sk.Expansion(*got), log_probs, ids, root, nodes)


@backends("expand_tree")
def test_strides(backend, device):
    log_probs, ids, root = problem(2, 4, 5, 2, device)
    held = torch.full((3, 40, 9), NAN, device=device)
    held[::2, 3:35:2, 2:7] = log_probs
    held_ids = torch.full((3, 40, 9), -1, dtype=torch.int64, device=device)
    held_ids[::2, 3:35:2, 2:7] = ids
    got = sk.expand_tree(held[::2, 3:35:2, 2:7], held_ids[::2, 3:35:2, 2:7], root, 17, backend=backend)
    for x, y in zip(got, sk.reference.expand_tree(log_probs, ids, root, 17)):
        assert torch.equal(x, y)


@gpu_backends("expand_tree")
@pytest.mark.parametrize("levels,k,nodes", [(5, 10, 60), (8, 10, 128), (3, 60, 512), (8, 32, 255), (16, 16, 60),
                                            (2, 64, 129), (128, 1, 90), (4, 48, 500), (511, 1, 512)])  # fmt: skip
def test_real_sizes_in_a_graph(levels, k, nodes, backend):
    b = 5
    call = problem(b, levels, k, 0, "cuda")
    for n in (None, nodes) if call[0].shape[1] + k <= 512 else (nodes,):
        graph, got = replayed(lambda n=n: sk.expand_tree(*call, n, backend=backend))
        for seed in range(4):
            for old, new in zip(call, problem(b, levels, k, seed, "cuda")):
                old.copy_(new)
            if seed == 2:
                call[0].copy_((call[0] * 2).round() / 2)  # many equal scores
            if seed == 3:
                call[0].fill_(-0.25)
            graph.replay()
            for x, y in zip(got, sk.reference.expand_tree(*call, n)):
                assert torch.equal(x, y)


def test_bad_arguments():
    ok = dict(log_probs=torch.zeros(2, 7, 3), token_ids=torch.zeros(2, 7, 3, dtype=torch.int64),
              root=torch.zeros(2, dtype=torch.int64), nodes=22)  # fmt: skip
    sk.expand_tree(**ok)
    for name, value, kind in [
        ("log_probs", torch.zeros(2, 6, 3), ValueError),
        ("log_probs", torch.zeros(2, 7, 0), ValueError),
        ("log_probs", torch.zeros(2, 0, 3), ValueError),
        ("log_probs", torch.zeros(2, 7, 3, dtype=torch.bfloat16), TypeError),
        ("token_ids", torch.zeros(2, 7, 3), TypeError),
        ("token_ids", torch.zeros(1, 7, 3, dtype=torch.int64), ValueError),
        ("root", torch.zeros(3, dtype=torch.int64), ValueError),
        ("nodes", 0, ValueError),
        ("nodes", 23, ValueError),
        ("nodes", 4.0, TypeError),
        ("out", torch.zeros(2, 22), TypeError),
        ("out", module.empty_expansion(ok["log_probs"], 21), ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.expand_tree(**{**ok, name: value})
    out = module.empty_expansion(ok["log_probs"], 22)
    apart = torch.zeros(2, 30, dtype=torch.int32)[:, :22]
    with pytest.raises(ValueError, match=r"out\.parents: expected a contiguous tensor"):
        sk.expand_tree(**ok, out=out._replace(parents=apart))
    empty = sk.expand_tree(torch.zeros(0, 7, 3), torch.zeros(0, 7, 3, dtype=torch.int64), ok["root"][:0], 5)
    assert empty.mask.shape == (0, 5, 1)


def test_the_kernels_say_what_is_too_large():
    for levels, k, nodes, reason in [
        (513, 1, None, "at most 512 rows and nodes, got 513 rows and 514 nodes"),
        (513, 1, 5, "at most 512 rows and nodes, got 513 rows and 5 nodes"),
        (512, 1, None, "at most 512 rows and nodes, got 512 rows and 513 nodes"),
        (4, 64, 9, "at most 8192 candidates, got 193 rows of 64"),
        (511, 1, None, None),
        (4, 52, 512, None),
    ]:
        call = module.prepare(*problem(1, levels, k), nodes)
        assert [module.OP.tiers[tier].missing(*call) for tier in ("cuda", "triton", "torch")] == [reason, reason, None]
