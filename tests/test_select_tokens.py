"""select_tokens against a slow second implementation of the definition, in Python integers."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    Guarded,
    backends,
    bitwise_equal_reruns,
    die,
    gpu_backends,
    hard_random_rows,
    many_rows,
    replayed,
    rng,
    with_both_poisons,
)

import specvlm_kernels as sk
from specvlm_kernels.ops import select_tokens as module

FLT_MAX = 3.4028234663852886e38


def slow(scores: list[float], keep: int, top_p: float, mask: list[bool] | None = None) -> tuple[list[int], int]:
    candidates = [i for i in range(len(scores)) if mask is None or mask[i]]
    value = {i: -math.inf if math.isnan(scores[i]) else scores[i] for i in candidates}
    order = sorted(candidates, key=lambda i: (-value[i], i))
    positive = {i: min(max(value[i], 0.0), FLT_MAX) for i in candidates}
    biggest = max(positive.values(), default=0.0)
    exponent = math.frexp(biggest)[1]  # 2**exponent > biggest >= 2**(exponent-1)
    weight = {i: math.floor(Fraction(positive[i]) * Fraction(2) ** (40 - exponent)) for i in candidates}
    total = sum(weight.values())
    share = round(top_p * 2**24)
    if top_p == 0:
        m = 0
    elif top_p == 1:
        m = keep
    elif total == 0:
        m = min(1, keep)
    else:
        m, mass = 0, 0
        while mass * 2**24 < share * total:
            mass += weight[order[m]]
            m += 1
        m = min(m, keep)
    chosen = set(order[:m])
    rest = [i for i in candidates if i not in chosen]
    u = keep - m
    chosen |= {rest[j * (len(rest) - 1) // (u - 1) if u > 1 else 0] for j in range(u)}
    return sorted(chosen), m


def check(scores, keep, top_p, mask=None, backend=None):
    got = sk.select_tokens(scores, keep, top_p, mask=mask, backend=backend)
    assert got.indices.dtype == torch.int64 and got.num_attention.dtype == torch.int32
    for r in range(scores.shape[0]):
        row_mask = None if mask is None else mask[r].tolist()
        indices, m = slow(scores[r].tolist(), keep, top_p, row_mask)
        assert got.indices[r].tolist() == indices, (r, keep, top_p)
        assert int(got.num_attention[r]) == m, (r, keep, top_p)


def rows(kind: str, v: int) -> torch.Tensor:
    g = rng(v)
    if kind == "softmax":
        return torch.softmax(torch.randn(v, generator=g) * 3, -1)
    if kind == "ties":
        return torch.randint(0, 3, (v,), generator=g).float()
    if kind == "zeros":
        return torch.zeros(v)
    if kind == "negative":
        return -torch.rand(v, generator=g)
    if kind == "one giant":
        return torch.full((v,), 1e-20).index_fill(0, torch.tensor([v // 2]), 1e30)
    if kind == "subnormal":
        return torch.rand(v, generator=g) * 1e-42
    if kind == "nan and infinity":
        x = torch.randn(v, generator=g)
        x[::3], x[1::7], x[2::11] = float("nan"), float("inf"), float("-inf")
        return x
    if kind == "all equal":
        return torch.full((v,), 0.1)
    if kind == "one above zeros":
        return torch.zeros(v).index_fill(0, torch.tensor([v // 3]), 5.0)
    if kind == "any bits":
        return torch.randint(-(1 << 31), 1 << 31, (v,), generator=g).to(torch.int32).view(torch.float32)
    if kind == "all octaves":  # some of them far below the highest, where weights lose bits or all of them
        return torch.exp2(torch.rand(v, generator=g) * 60 - 50) * (torch.rand(v, generator=g) < 0.9)
    if kind == "far below one":  # most of the mass is 16 octaves below the highest score
        x = torch.exp2(-15.5 - torch.rand(v, generator=g))
        x[v // 2] = 1.5
        return x
    if kind == "largest":
        return torch.full((v,), FLT_MAX)
    if kind == "below everything":
        return torch.where(torch.rand(v, generator=g) < 0.5, float("-inf"), -3e38)
    if kind == "signed zeros":
        return torch.tensor([-0.0, 0.0, 1.0, -0.0]).repeat(v // 4 + 1)[:v]
    return torch.arange(v).float() if kind == "ascending" else torch.arange(v).flip(0).float()


KINDS = ["softmax", "ties", "zeros", "negative", "one giant", "subnormal", "nan and infinity", "all equal",
         "one above zeros", "any bits", "all octaves", "far below one", "largest", "below everything", "signed zeros",
         "ascending", "descending"]  # fmt: skip


@backends("select_tokens")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [1, 37, 199])
def test_the_definition(v, kind, backend, device):
    scores = torch.stack([rows(kind, v), rows("softmax", v)]).to(device)
    for keep in sorted({0, 1, v // 10, v // 2, v}):
        for top_p in (0.0, 1e-7, 0.4, 0.99, 1.0):
            check(scores, keep, top_p, backend=backend)


@backends("select_tokens")
def test_interleaved_candidates(backend, device):
    scores = torch.stack([rows("softmax", 199), rows("ties", 199), rows("nan and infinity", 199)]).to(device)
    mask = (torch.rand(3, 199, generator=rng(1)) < 0.6).to(device)
    fewest = int(mask.sum(1).min())
    for keep in (0, 1, 2, 20, fewest):
        for top_p in (0.0, 0.4, 1.0):
            check(scores, keep, top_p, mask, backend=backend)


@backends("select_tokens")
@pytest.mark.parametrize("v", [1, 3, 130])
def test_rows_that_start_anywhere(v, backend, device):
    for skew in (1, 2, 3):
        wide = torch.full((4, v + 7), float("nan"))  # outside a row lies what must not be read as its scores
        wide[:, skew : skew + v] = torch.stack([rows(kind, v) for kind in ("softmax", "ties", "zeros", "any bits")])
        masks = torch.rand(4, v + 5, generator=rng(v)) < 0.7
        masks[:, skew % 3 + v // 2] = True
        scores, mask = wide.to(device)[:, skew : skew + v], masks.to(device)[:, skew % 3 : skew % 3 + v]
        keep = max(v // 10, 1)
        for top_p in (0.0, 0.4):
            check(scores, keep, top_p, backend=backend)
            check(scores, keep, top_p, mask, backend=backend)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_floats(values, keep_share, top_p):
    check(torch.tensor([values]), int(keep_share * len(values)), top_p)


@backends("select_tokens")
def test_more_tokens_than_candidates_ends_in_minus_one(backend, device):
    mask = torch.tensor([[True, False, True, False, False]], device=device)
    for top_p in (0.0, 0.4, 1.0):
        got = sk.select_tokens(torch.rand(1, 5, generator=rng(0)).to(device), 4, top_p, mask=mask, backend=backend)
        assert got.indices.tolist() == [[0, 2, -1, -1]]


@backends("select_tokens")
def test_half_scores_are_widened_and_nothing_else_is_written(backend, device):
    scores = torch.stack([rows("softmax", 199)] * 3).to(device)
    want = sk.select_tokens(scores.bfloat16().float(), 20, 0.4, backend=backend)
    got = sk.select_tokens(scores.bfloat16(), 20, 0.4, backend=backend)
    assert torch.equal(got.indices, want.indices)

    def run(_, poison):
        indices = Guarded((3, 20), torch.int64, device, poison)
        counts = Guarded((3,), torch.int32, device, poison)
        module._run(scores, 20, 0.4, None, indices.tensor, counts.tensor, backend)
        return [indices, counts]

    with_both_poisons(run)


@backends("select_tokens")
def test_reruns_are_bitwise_equal(backend, device):
    scores = torch.stack([rows("softmax", 199)] * 2).to(device)
    bitwise_equal_reruns(lambda: sk.select_tokens(scores, 20, 0.4, backend=backend))


def test_bad_arguments():
    ok = dict(scores=torch.rand(2, 9), keep=3, top_p=0.4)
    for name, value, kind in [
        ("scores", torch.rand(9), ValueError),
        ("scores", torch.zeros(2, 9, dtype=torch.int32), TypeError),
        ("keep", 10, ValueError),
        ("keep", -1, ValueError),
        ("keep", 2.0, TypeError),
        ("top_p", 1.5, ValueError),
        ("top_p", float("nan"), ValueError),
        ("top_p", "0.4", TypeError),
        ("mask", torch.ones(2, 9), TypeError),
        ("mask", torch.ones(2, 8, dtype=torch.bool), ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.select_tokens(**{**ok, name: value})
    assert sk.select_tokens(torch.rand(0, 9), 3).indices.shape == (0, 3)
    assert sk.select_tokens(torch.rand(2, 0), 0).indices.shape == (2, 0)


@pytest.mark.parametrize(
    "tokens,ratio,kept",
    [(1000, 0.9, 100), (12544, 0.9, 1254), (10, 0.0, 10), (7, 0.5, 3), (0, 0.9, 0), (100, 0.29, 71)],
)
def test_keep_count_is_exact(tokens, ratio, kept):
    assert sk.keep_count(tokens, ratio) == kept


@pytest.mark.parametrize("tokens,ratio,kind", [(-1, 0.5, ValueError), (5, 1.0, ValueError), (5, -0.1, ValueError),
                                               (5, float("nan"), ValueError), (5.0, 0.5, TypeError)])  # fmt: skip
def test_keep_count_refuses(tokens, ratio, kind):
    with pytest.raises(kind):
        sk.keep_count(tokens, ratio)


def assert_the_reference(scores, keep, top_p, mask, backend, what):
    """Against the reference on the GPU, bitwise."""
    want = sk.reference.select_tokens(scores, keep, top_p, mask=mask)
    got = sk.select_tokens(scores, keep, top_p, mask=mask, backend=backend)
    if not torch.equal(got.indices, want.indices) or not torch.equal(got.num_attention, want.num_attention):
        wrong = (got.indices != want.indices).any(1) | (got.num_attention != want.num_attention)
        raise AssertionError(f"{what}, keep={keep}, top_p={top_p}: wrong rows {wrong.nonzero().flatten().tolist()[:9]}")


@gpu_backends("select_tokens")
@pytest.mark.parametrize("v", [4096, 4097, 12544, 25088, 32768, 32769, 131072, 170_001, 1 << 20, 1 << 22])
def test_real_sizes(v, backend):
    for kind in KINDS:
        scores = torch.stack([rows(kind, v), rows("softmax", v)]).cuda()
        for top_p in (0.0, 0.4, 0.97, 1.0):
            assert_the_reference(scores, v // 10, top_p, None, backend, kind)
    signed = rows("signed zeros", v)[None]  # and the reference itself, where the GPU's sort might differ
    want = sk.reference.select_tokens(signed, v // 10, 0.4)
    assert torch.equal(sk.reference.select_tokens(signed.cuda(), v // 10, 0.4).indices.cpu(), want.indices)


@gpu_backends("select_tokens")
@pytest.mark.parametrize("b,v", [(3, 12544), (16, 25088), (17, 25088), (200, 5000), (7, 131_075), (140, 33_000)])
def test_batches(b, v, backend):
    wide = torch.stack([rows(KINDS[i % len(KINDS)], v + 3) for i in range(min(b, 20))]).cuda()
    wide = wide.repeat(b // 20 + 1, 1)[:b]
    mask = (torch.rand(b, v, generator=rng(b)) < 0.8).cuda()
    for scores in (wide[:, :v], wide[:, 3:]):
        for top_p in (0.0, 0.4, 1.0):
            assert_the_reference(scores, v // 10, top_p, None, backend, "all")
            assert_the_reference(scores, v // 10, top_p, mask, backend, "masked")


@pytest.mark.slow
@gpu_backends("select_tokens")
def test_many_random_rows(backend):
    """SPECVLM_TEST_ROWS=1000000 compares that many with the reference; about 20,000 unless it is set."""
    wanted, done, turn = many_rows(), 0, 0
    g, number = torch.Generator("cuda").manual_seed(7), die(7)

    while done < wanted:
        # mostly short rows, for their number; among them rows for a cluster, and for many CTAs
        b, v = [(1 << 14, number(1, 300)), (1 << 14, number(1, 64)), (number(1, 16), number(4097, 150_000)),
                (1 << 10, number(300, 4500)), (number(1, 3), number(32_769, 1 << 20))][turn % 5]  # fmt: skip
        turn += 1
        scores = hard_random_rows(b, v, g)
        mask = None
        if number(0, 1):
            mask = torch.rand(b, v, generator=g, device="cuda") < number(1, 99) / 100
        keep = (1, max(1, v // 10), v, number(1, v))[number(0, 3)]
        top_p = (0.0, 1e-7, 0.4, 0.4, 0.9, 1.0, number(1, 999) / 1000)[number(0, 6)]
        assert_the_reference(scores, keep, top_p, mask, backend, f"b={b}, v={v}, turn={turn}")
        done += b


@gpu_backends("select_tokens")
def test_graph_replays_with_other_scores(backend):
    scores = torch.rand(2, 5000, generator=rng(0)).cuda()
    graph, got = replayed(lambda: sk.select_tokens(scores, 500, 0.4, backend=backend))
    scores.copy_(torch.softmax(torch.randn(2, 5000, generator=rng(1)) * 4, -1))
    graph.replay()
    want = sk.select_tokens(scores, 500, 0.4, backend="torch")
    assert torch.equal(got.indices, want.indices)
