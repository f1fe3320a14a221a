"""verify_greedy against a walk written from the definition."""

import pytest
import torch
from kit import (
    Guarded,
    backends,
    bitwise_equal_reruns,
    die,
    gpu_backends,
    hard_random_rows,
    many_rows,
    randint,
    randn,
    random_tree,
    replayed,
    with_both_poisons,
)

import specvlm_kernels as sk
from specvlm_kernels.ops import verify_greedy as module


def argmax(row: torch.Tensor) -> int:
    values = [float("-inf") if x != x else x for x in row.float().tolist()]
    return values.index(max(values))


def walk(logits, tokens, parents, live) -> tuple[list[int], int]:
    path, node = [], 0
    while True:
        best = argmax(logits[node])
        children = [i for i in range(node + 1, live) if parents[i] == node and tokens[i] == best]
        if not children:
            return path, best
        node = children[0]
        path.append(node)


def problem(b, n, vocab, device, seed=0, dtype=torch.float32):
    """Trees with several children per node and small vocabularies, so that paths are accepted often."""
    logits = randn(b, n, vocab, seed=seed, dtype=dtype, device=device)
    tokens = randint(0, vocab, (b, n), seed=seed + 1).to(device)
    parents = torch.stack([random_tree(n, seed + r) for r in range(b)]).to(device)
    return logits, tokens, parents


@backends("verify_greedy")
@pytest.mark.parametrize("b,n,vocab", [(1, 1, 5), (3, 26, 3), (2, 63, 2), (2, 65, 4), (1, 128, 199), (4, 5, 1)])
def test_the_walk(b, n, vocab, backend, device):
    longest = 0
    for seed in range(3):
        logits, tokens, parents = problem(b, n, vocab, device, seed)
        got = sk.verify_greedy(logits, tokens, parents, backend=backend)
        assert (got.path.dtype, got.length.dtype, got.next_token.dtype) == (torch.int32, torch.int32, torch.int64)
        for r in range(b):
            path, following = walk(logits[r], tokens[r].tolist(), parents[r].tolist(), n)
            assert got.path[r].tolist() == path + [-1] * (n - len(path))
            assert int(got.length[r]) == len(path) and int(got.next_token[r]) == following
            longest = max(longest, len(path))
    assert longest > 1 or vocab > 3 or n < 5


@backends("verify_greedy")
def test_ragged_trees_and_one_tree_for_all(backend, device):
    logits, tokens, parents = problem(3, 26, 3, device)
    lens = torch.tensor([26, 4, 1], dtype=torch.int32, device=device)
    got = sk.verify_greedy(logits, tokens, parents[0], tree_lens=lens, backend=backend)
    for r, live in enumerate([26, 4, 1]):
        path, following = walk(logits[r], tokens[r].tolist(), parents[0].tolist(), live)
        assert got.path[r, : len(path)].tolist() == path and int(got.next_token[r]) == following


@backends("verify_greedy")
def test_ties_go_to_the_lower_id_and_the_lower_node(backend, device):
    logits = torch.zeros(1, 4, 300, device=device, dtype=torch.bfloat16)
    logits[0, :, 150:] = 1
    logits[0, 0, 200] = float("nan")
    tokens = torch.tensor([[0, 151, 150, 150]], device=device)
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32, device=device)
    got = sk.verify_greedy(logits, tokens, parents, backend=backend)
    assert got.path.tolist() == [[2, -1, -1, -1]] and got.next_token.tolist() == [150]


@backends("verify_greedy")
def test_hostile_trees_have_a_defined_result(backend, device):
    logits = torch.zeros(1, 6, 7, device=device)
    tokens = torch.zeros(1, 6, dtype=torch.int64, device=device)
    for parents, path in [
        ([-1, 5, 2, 3, 4, 1], []),  # a cycle
        ([-5, 1, 0, 2, 4, 2**31 - 1], [2, 3]),
        ([0, 0, 1, 3, -1, 2], [1, 2, 5]),
    ]:
        given = torch.tensor(parents, dtype=torch.int32, device=device)
        got = sk.verify_greedy(logits, tokens, given, backend=backend)
        assert got.path[0].tolist() == path + [-1] * (6 - len(path))
    tokens = torch.tensor([[0, -1, 2**62, 7, 0, 0]], device=device)
    parents = torch.tensor([-1, 0, 0, 0, 0, 4], dtype=torch.int32, device=device)
    assert sk.verify_greedy(logits, tokens, parents, backend=backend).path[0, :3].tolist() == [4, 5, -1]


@backends("verify_greedy")
def test_every_output_is_written_and_reruns_are_equal(backend, device):
    logits, tokens, parents = problem(3, 26, 3, device)
    bitwise_equal_reruns(lambda: sk.verify_greedy(logits, tokens, parents, backend=backend))

    def run(_, poison):
        outputs = [
            Guarded((3, 26), torch.int32, device, poison),
            Guarded((3,), torch.int32, device, poison),
            Guarded((3,), torch.int64, device, poison),
        ]
        module._run(logits, tokens, parents, None, *(g.tensor for g in outputs), backend)
        return outputs

    with_both_poisons(run)


@backends("verify_greedy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_a_plain_maximum(dtype, backend, device):
    """Equal, infinite, NaN and signed-zero logits, in rows that start between 16-byte boundaries."""
    vocab, nan, inf = 2051, float("nan"), float("inf")
    rows = torch.zeros(9, vocab)
    rows[1, 1777:] = 1e-39 if dtype != torch.float16 else 6e-8
    rows[2, :] = nan
    rows[3, :] = -inf
    rows[3, :5] = nan
    rows[4, 1500:] = -0.0
    rows[4, :1500] = -1
    rows[4, 1600] = 0.0
    rows[5, [600, 2050]] = inf
    rows[6] = torch.linspace(-5, 5, vocab)
    rows[7] = torch.linspace(5, -5, vocab)
    rows[8, ::2] = nan
    held = torch.zeros(1, 9, vocab + 5, dtype=dtype, device=device)
    logits = held[..., 5:]
    logits.copy_(rows)
    want = [argmax(row) for row in logits[0]]
    assert want[:6] == [0, 1777, 0, 0, 1500, 600] and want[7:] == [0, 1]
    tokens = torch.tensor([[0, *want[:-1]]], device=device)
    parents = torch.arange(-1, 8, dtype=torch.int32, device=device)
    got = sk.verify_greedy(logits, tokens, parents, backend=backend)
    assert got.path.tolist() == [[*range(1, 9), -1]] and got.next_token.tolist() == want[-1:]


@gpu_backends("verify_greedy")
@pytest.mark.parametrize("n", [1, 26, 64, 128, 256])
def test_hostile_trees_of_real_sizes(n, backend):
    """Any parents, tokens and lengths, against the reference; reruns and other streams change nothing."""
    b, vocab = 3, 20011
    logits = randn(b, n, vocab, dtype=torch.bfloat16, device="cuda")
    best = logits.float().argmax(-1)
    for seed in range(4):
        parents = torch.stack([random_tree(n, seed + r) for r in range(b)])
        tokens = torch.gather(best.cpu(), 1, parents.long().clamp(min=0))
        wild = randn(b, n, seed=seed) > 1
        parents = torch.where(wild, randint(-5, n + 5, (b, n), seed=seed, dtype=torch.int32), parents)
        parents[wild & (randn(b, n, seed=seed + 9) > 1)] = 2**31 - 1
        tokens[randn(b, n, seed=seed + 5) > 1.5] = 2**62
        lens = randint(-1, n + 3, (b,), seed=seed, dtype=torch.int32).cuda() if seed % 2 else None
        call = (logits, tokens.cuda(), parents.cuda())
        want = sk.reference.verify_greedy(*call, tree_lens=lens)
        for _ in range(10):
            got = sk.verify_greedy(*call, tree_lens=lens, backend=backend)
            for x, y in zip(got, want):
                assert torch.equal(x, y)


@gpu_backends("verify_greedy")
def test_streams_do_not_disturb_each_other(backend):
    """Launches in flight together count their CTAs' arrivals apart."""
    streams = [torch.cuda.Stream() for _ in range(6)]
    problems = [problem(2, 12, 20011, "cuda", seed, torch.bfloat16) for seed in range(6)]
    want = [sk.reference.verify_greedy(*call) for call in problems]
    torch.cuda.synchronize()
    for _ in range(30):
        got = []
        for stream, call in zip(streams, problems):
            with torch.cuda.stream(stream):
                got.append(sk.verify_greedy(*call, backend=backend))
        torch.cuda.synchronize()
        for a, b in zip(got, want):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_bad_arguments():
    ok = dict(logits=torch.zeros(2, 3, 9), tokens=torch.zeros(2, 3, dtype=torch.int64),
              parents=torch.tensor([-1, 0, 0], dtype=torch.int32))  # fmt: skip
    sk.verify_greedy(**ok)
    for name, value, kind in [
        ("logits", torch.zeros(2, 4, 9), ValueError),
        ("logits", torch.zeros(2, 3, 0), ValueError),
        ("tokens", torch.zeros(2, 3), TypeError),
        ("parents", torch.zeros(2, dtype=torch.int32), ValueError),
        ("parents", torch.zeros(3, dtype=torch.int64), TypeError),
        ("parents", [0, 1], TypeError),
        ("tree_lens", torch.zeros(1, dtype=torch.int32), ValueError),
    ]:
        with pytest.raises(kind, match=name if name != "logits" else "logits|tokens"):
            sk.verify_greedy(**{**ok, name: value})
    empty = sk.verify_greedy(torch.zeros(0, 3, 9), torch.zeros(0, 3, dtype=torch.int64), ok["parents"])
    assert empty.path.shape == (0, 3)


@gpu_backends("verify_greedy")
def test_real_sizes_in_a_graph(backend):
    logits, tokens, parents = problem(2, 26, 152064, "cuda", dtype=torch.bfloat16)

    def plant(seed):
        logits.copy_(randn(2, 26, 152064, seed=seed))
        best = logits.float().argmax(-1)
        tokens.copy_(torch.gather(best, 1, parents.long().clamp(min=0)))

    plant(0)
    graph, got = replayed(lambda: sk.verify_greedy(logits, tokens, parents, backend=backend))
    for seed in (0, 1):
        plant(seed)
        graph.replay()
        want = sk.reference.verify_greedy(logits, tokens, parents)
        assert int(want.length.min()) > 0
        for a, b in zip(got, want):
            assert torch.equal(a, b)


def compare_random_trees(wanted: int, backend: str, device: str) -> int:
    """Verdicts over so many rows of many kinds, equal to the reference's; returns how many nodes were accepted."""
    done, turn, accepted, g, number = 0, 0, 0, torch.Generator(device).manual_seed(6), die(6)

    while done < wanted:
        n = number(1, 40)
        b, vocab = [(4096 // n, number(1, 300)), (4096 // n, number(1, 6)), (1, number(8193, 150_000))][turn % 3]
        turn += 1
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number(0, 2)]
        logits = hard_random_rows(b * n, vocab, g).to(dtype).view(b, n, vocab)
        parents = (torch.rand(b, n, generator=g, device=device) * torch.arange(n, device=device)).int()
        parents[:, 0] = -1
        best = logits.float().nan_to_num(float("-inf"), float("inf"), float("-inf")).argmax(-1)
        guess = torch.randint(0, vocab, (b, n), generator=g, device=device)
        right = torch.rand(b, n, generator=g, device=device) < 0.7
        tokens = torch.where(right, best.gather(1, parents.clamp(min=0).long()), guess)
        got = sk.verify_greedy(logits, tokens, parents, backend=backend)
        want = sk.reference.verify_greedy(logits, tokens, parents)
        assert all(map(torch.equal, got, want)), f"b={b}, n={n}, vocab={vocab}, {dtype}, turn={turn}"
        done, accepted = done + b * n, accepted + int(got.length.sum())
    return accepted


@pytest.mark.slow
@gpu_backends("verify_greedy")
def test_many_random_trees(backend):
    """SPECVLM_TEST_ROWS=1000000 compares that many with the reference; about 20,000 unless it is set."""
    compare_random_trees(many_rows(), backend, "cuda")


def test_the_comparison_of_random_trees():
    assert compare_random_trees(20_000, "torch", "cpu") > 1000
