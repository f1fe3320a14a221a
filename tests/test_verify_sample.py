"""verify_sample: its definition by hand, and chi-square tests of what it emits."""

import pytest
import torch
from kit import (
    Guarded,
    backends,
    bitwise_equal_reruns,
    gpu_backends,
    randint,
    randn,
    random_tree,
    replayed,
    rng,
    with_both_poisons,
)
from scipy.stats import chisquare

import specvlm_kernels as sk
from specvlm_kernels.ops import verify_sample as module


def distribution(row, temperature, top_k, top_p) -> list[float]:
    """The target's distribution, filtered, by loops over a sorted list."""
    p = torch.softmax(row.double() / temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda i: (-float(row[i]), i))
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        whole, mass, kept = sum(p[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += p[i]
            if mass >= top_p * whole:
                break
        order = kept
    whole = sum(p[i] for i in order)
    return [p[i] / whole if i in set(order) else 0.0 for i in range(len(p))]


def inverse_cdf(p, coin) -> tuple[int, float]:
    """(id, distance of the coin from the nearest edge)."""
    whole, mass, edge = sum(p), 0.0, 1.0
    chosen = None
    for i, share in enumerate(p):
        mass += share
        edge = min(edge, abs(coin - mass / whole))
        if chosen is None and share > 0 and coin * whole < mass:
            chosen = i
    return chosen if chosen is not None else max(i for i, share in enumerate(p) if share > 0), edge


def walk(logits, tokens, parents, coins, **settings):
    n, path, node, edge = len(tokens), [], 0, 1.0
    while True:
        p = distribution(logits[node], **settings)
        below, accepted = 0.0, None
        for i in (i for i in range(node + 1, n) if parents[i] == node):
            share = p[tokens[i]] if 0 <= tokens[i] < len(p) else 0.0
            if share == 0:
                continue
            below, p[tokens[i]] = below + share, 0.0
            edge = min(edge, abs(coins[node] - below))
            if coins[node] < below or sum(p) == 0:
                accepted = i
                break
        if accepted is None:
            following, last_edge = inverse_cdf(p, coins[n])
            return path, following, min(edge, last_edge)
        path.append(accepted)
        node = accepted


SETTINGS = [
    dict(temperature=1.0, top_k=None, top_p=None),
    dict(temperature=0.6, top_k=3, top_p=None),
    dict(temperature=1.5, top_k=None, top_p=0.7),
    dict(temperature=0.8, top_k=5, top_p=0.9),
    dict(temperature=1.0, top_k=1, top_p=None),
]


def problem(b, n, vocab, device, seed=0, dtype=torch.float32):
    logits = randn(b, n, vocab, seed=seed, dtype=dtype, device=device)
    tokens = randint(0, vocab, (b, n), seed=seed + 1).to(device)
    parents = torch.stack([random_tree(n, seed + r) for r in range(b)]).to(device)
    coins = torch.rand(b, n + 1, generator=rng(seed + 2)).to(device)
    return logits, tokens, parents, coins


@backends("verify_sample")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("b,n,vocab", [(1, 1, 5), (4, 26, 4), (2, 12, 37)])
def test_the_definition(b, n, vocab, settings, backend, device):
    for seed in range(1 if backend == "triton" and device == "cpu" else 4):  # the interpreter is slow
        logits, tokens, parents, coins = problem(b, n, vocab, device, seed)
        got = sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend)
        for r in range(b):
            path, following, edge = walk(
                logits[r].cpu(), tokens[r].tolist(), parents[r].tolist(), coins[r].tolist(), **settings
            )
            if edge < 1e-6:  # at an edge rounding decides
                continue
            assert got.path[r].tolist() == path + [-1] * (n - len(path))
            assert int(got.length[r]) == len(path) and int(got.next_token[r]) == following


@backends("verify_sample")
def test_no_mass_is_never_accepted(backend, device):
    logits = torch.tensor([[[0.0, float("-inf"), 0.0]] * 4], device=device)
    tokens = torch.tensor([[0, 1, 2, 2]], device=device)
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32, device=device)
    coins = torch.zeros(1, 5, device=device)
    got = sk.verify_sample(logits, tokens, parents, coins, temperature=1.0, backend=backend)
    assert got.path.tolist() == [[2, -1, -1, -1]] and got.next_token.tolist() == [0]
    coins[0, 0] = 0.9  # the second of two equal siblings has no mass, so this is the rest
    got = sk.verify_sample(logits, tokens, parents, coins, temperature=1.0, backend=backend)
    assert got.length.tolist() == [0] and got.next_token.tolist() == [0]


@backends("verify_sample")
def test_a_coin_past_the_last_mass_takes_the_last_child(backend, device):
    logits = torch.tensor([[[3.0, 1.0, 0.0, -1.0]] * 3], device=device)
    tokens = torch.tensor([[0, 0, 1]], device=device)
    parents = torch.tensor([-1, 0, 0], dtype=torch.int32, device=device)
    coins = torch.tensor([[0.99999994, 0.5, 0.99999994, 0.99999994]], device=device)
    got = sk.verify_sample(logits, tokens, parents, coins, temperature=1.0, top_k=2, backend=backend)
    assert got.path.tolist() == [[2, -1, -1]] and got.next_token.tolist() == [1]


@backends("verify_sample")
def test_every_output_is_written_and_reruns_are_equal(backend, device):
    logits, tokens, parents, coins = problem(3, 12, 5, device)
    bitwise_equal_reruns(
        lambda: sk.verify_sample(logits, tokens, parents, coins, temperature=1.0, top_p=0.9, backend=backend),
        times=1 if device == "cpu" else 5,
    )

    def run(_, poison):
        outputs = [
            Guarded((3, 12), torch.int32, device, poison),
            Guarded((3,), torch.int32, device, poison),
            Guarded((3,), torch.int64, device, poison),
        ]
        module._run(logits, tokens, parents, coins, 1.0, None, None, *(g.tensor for g in outputs), backend)
        return outputs

    with_both_poisons(run)


@backends("verify_sample")
def test_hostile_trees_stay_inside(backend, device):
    logits, tokens, _, coins = problem(1, 6, 5, device)
    for parents in ([-1, 5, 2, 3, 4, 1], [-5, 1, 0, 2, 4, 2**31 - 1]):
        given = torch.tensor(parents, dtype=torch.int32, device=device)
        for values in (tokens, torch.tensor([[0, -1, 2**62, 5, 0, 0]], device=device)):
            got = sk.verify_sample(logits, values, given, coins, temperature=1.0, backend=backend)
            want = sk.reference.verify_sample(logits, values, given, coins, temperature=1.0)
            assert torch.equal(got.path, want.path) and torch.equal(got.next_token, want.next_token)


def first_two_tokens(draws: int, verify, device="cpu", batch=20000):
    """Counts of the first token, and of the second given the first, over a tree of depth 2 whose children are the
    draft's top-k; logits depend on the token, as a language model's do."""
    vocab = 6
    model = (randn(vocab + 1, vocab, seed=3) * 1.5).to(device)  # row t: logits after token t; last row: at the root
    root_children, deeper = [4, 1, 2], {4: [0, 3], 1: [2], 2: []}
    tokens, parents, rows = [0], [-1], [vocab]
    for token in root_children:
        parents.append(0), tokens.append(token), rows.append(token)
    for place, token in enumerate(root_children, 1):
        for child in deeper[token]:
            parents.append(place), tokens.append(child), rows.append(child)
    first = torch.zeros(vocab, dtype=torch.int64)
    second = torch.zeros(vocab, vocab, dtype=torch.int64)
    generator = torch.Generator(device).manual_seed(11)
    n = len(tokens)
    t = torch.tensor(tokens, device=device).expand(batch, n).contiguous()
    p = torch.tensor(parents, dtype=torch.int32, device=device)
    logits = model[torch.tensor(rows, device=device)].expand(batch, n, vocab).contiguous()
    for _ in range(draws // batch):
        coins = torch.rand(batch, n + 1, generator=generator, device=device)
        verdict = verify(logits, t, p, coins)
        emitted = torch.where(verdict.path >= 0, t.gather(1, verdict.path.clamp(min=0).long()), -1)
        one = torch.where(verdict.length > 0, emitted[:, 0], verdict.next_token)
        two = torch.where(verdict.length > 1, emitted[:, 1], verdict.next_token)
        first += torch.bincount(one.cpu(), minlength=vocab)
        has_two = (verdict.length > 0).cpu()
        pair = one.cpu() * vocab + two.cpu()
        second += torch.bincount(pair[has_two], minlength=vocab * vocab).view(vocab, vocab)
    return first, second, model.cpu().double()


def p_values(first, second, model, temperature=1.0, top_k=None, top_p=None):
    vocab, values = len(first), []
    for row, count in [(model[vocab], first)] + [(model[token], second[token]) for token in (4, 1, 2)]:
        expected = torch.tensor(distribution(row, temperature, top_k, top_p), dtype=torch.float64) * count.sum()
        some = expected > 0
        assert not bool(count[~some].any()), "a token without mass was emitted"
        if int(some.sum()) > 1:
            values.append(chisquare(count[some].numpy(), expected[some].numpy()).pvalue)
    return values


def test_emitted_tokens_follow_the_target():
    result = first_two_tokens(200_000, lambda *call: sk.verify_sample(*call, temperature=1.0))
    assert min(p_values(*result)) > 1e-3


@pytest.mark.parametrize("fault", ["residual left out", "threshold loosened"])
def test_the_chi_square_test_can_fail(fault):
    def broken(logits, tokens, parents, coins):
        if fault == "threshold loosened":
            coins = coins.clone()
            coins[:, :-1] *= 0.97
        verdict = sk.verify_sample(logits, tokens, parents, coins, temperature=1.0)
        if fault == "residual left out":
            rows = torch.arange(len(tokens))
            last = verdict.path.gather(1, (verdict.length.long() - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0).long()
            cdf = torch.softmax(logits[rows, last].double(), -1).cumsum(-1)
            return verdict._replace(next_token=(cdf <= coins[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1))
        return verdict

    assert min(p_values(*first_two_tokens(200_000, broken))) < 1e-6


@gpu_backends("verify_sample")
@pytest.mark.parametrize(
    "settings", [{}, dict(temperature=0.7, top_k=4), dict(temperature=1.3, top_k=5, top_p=0.9)], ids=str
)
def test_a_million_draws_on_the_gpu(settings, backend):
    settings = {"temperature": 1.0, **settings}
    result = first_two_tokens(
        1_000_000, lambda *call: sk.verify_sample(*call, **settings, backend=backend), "cuda", 4_000
    )
    assert min(p_values(*result, **settings)) > 1e-3


NEAR = 1e-6


def at_an_edge(logits, tokens, parents, coins, settings, got, want) -> bool:
    """Whether two verdicts (path, next token) of one request part where rounding may decide: at a coin within 1e-6 of
    an edge of its interval, or at a row where a token's cumulated mass lies as near to top_p."""
    (path, token), (want_path, want_token) = got, want
    depth = 0
    while depth < min(len(path), len(want_path)) and path[depth] == want_path[depth]:
        depth += 1
    node = want_path[depth - 1] if depth else 0
    if settings.get("top_p"):
        whole = {**settings, "top_p": None}
        mass = sk.reference.target_distribution(logits[node], **whole).sort(descending=True).values.cumsum(-1)
        if float((mass - settings["top_p"]).abs().min()) < NEAR:
            return True
    p = sk.reference.target_distribution(logits[node], **settings)
    rest, start, end, below = p.clone(), {}, {}, 0.0
    for i in (i for i in range(node + 1, len(tokens)) if parents[i] == node and 0 <= tokens[i] < len(p)):
        start[i], below = below, below + float(rest[tokens[i]])
        end[i] = below
        rest[tokens[i]] = 0
    start[None], end[None] = below, 1.0
    if len(end) > 1 and abs(below - coins[node]) < NEAR:
        return True
    if path != want_path:
        one, other = (p[depth] if depth < len(p) else None for p in (path, want_path))
        lower, upper = sorted((one, other), key=lambda i: len(tokens) if i is None else i)
        return abs(end[lower] - coins[node]) < NEAR and abs(start[upper] - coins[node]) < NEAR
    edges = rest.cumsum(-1) / rest.sum()
    lower, upper = sorted((token, want_token))
    return abs(float(edges[lower]) - coins[-1]) < NEAR and abs(float(edges[upper - 1]) - coins[-1]) < NEAR


def disagreements(logits, tokens, parents, coins, settings, got) -> int:
    """Requests whose verdict is not the reference's; each must be at an edge."""
    want = sk.reference.verify_sample(logits, tokens, parents, coins, **settings)
    count = 0
    for r in range(len(tokens)):
        if all(torch.equal(a[r], b[r]) for a, b in zip(got, want)):
            continue
        both = [(v.path[r, : int(v.length[r])].tolist(), int(v.next_token[r])) for v in (got, want)]
        assert got.path[r, int(got.length[r]) :].eq(-1).all()
        tree = parents if parents.dim() == 1 else parents[r]
        call = (logits[r], tokens[r].tolist(), tree.tolist(), coins[r].tolist())
        assert at_an_edge(*call, settings, *both), (r, settings, both)
        count += 1
    return count


def likely_tokens(logits, parents, seed):
    """Every node's token is one of the three most likely at its parent, so paths are accepted and siblings repeat."""
    b, n, vocab = logits.shape
    best = logits.float().topk(min(3, vocab), -1).indices
    best = torch.gather(best, 1, parents.long().clamp(min=0)[..., None].expand(-1, -1, best.shape[-1]))
    return torch.gather(best, 2, randint(0, best.shape[-1], (b, n, 1), seed=seed).to(logits.device))[..., 0]


FILTERS = [
    dict(top_k=top_k, top_p=top_p) for top_k in (None, 1, 50, 1 << 20) for top_p in (None, 1e-6, 0.9, 1.0)
]  # fmt: skip


def many_cases(device, backend, seeds, largest):
    """Random rows, trees and coins against the reference; returns (requests, disagreements)."""
    requests = differing = 0
    for seed in seeds:
        g = rng(seed)

        def pick(choices, g=g):
            return choices[int(torch.randint(len(choices), (), generator=g))]

        b, n, vocab = pick([1, 3]), pick([1, 5, 12, 26]), pick([v for v in (1, 37, 2051, 8193, 20011) if v <= largest])
        dtype, pad = pick([torch.bfloat16, torch.float16, torch.float32]), pick([0, 0, 1, 3])
        logits = torch.full((b, n, vocab + pad), float("nan"), dtype=dtype, device=device)[..., pad:]
        logits.copy_(randn(b, n, vocab, seed=seed) * pick([0.0, 0.3, 1.0, 4.0]))
        wild = pick([None, None, float("nan"), float("-inf"), float("inf"), 0.0])
        if wild is not None:
            logits[(randn(b, n, vocab, seed=seed + 1) > pick([1, 4])).to(device)] = wild
        parents = torch.stack([random_tree(n, seed + r) for r in range(b)]).to(device)
        tokens = likely_tokens(logits.nan_to_num(nan=float("-inf")), parents, seed)
        if pick([False, False, True]):
            hostile = (randn(b, n, seed=seed + 2) > 1).to(device)
            parents = torch.where(hostile, randint(-5, n + 5, (b, n), seed, torch.int32).to(device), parents)
            tokens[(randn(b, n, seed=seed + 3) > 1.5).to(device)] = pick([-1, vocab, 2**62])
        coins = torch.rand(b, n + 1, generator=g)
        coins[torch.rand(b, n + 1, generator=g) < pick([0.0, 0.0, 0.3])] = pick([0.0, 0.99999994])
        coins = coins.to(device)
        settings = dict(temperature=pick([0.2, 0.7, 1.0, 3.0]), **pick(FILTERS))
        got = sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend)
        differing += disagreements(logits, tokens, parents, coins, settings, got)
        requests += b
    return requests, differing


@gpu_backends("verify_sample")
@pytest.mark.parametrize("part", range(8))  # side by side: Triton compiles nearly every case
def test_disagreements_with_the_reference_are_at_edges(part, backend):
    requests, differing = many_cases("cuda", backend, range(25 * part, 25 * part + 25), 20011)
    print(f"{differing} of {requests} requests differ from the reference, each at an edge")
    assert differing <= requests / 20


@gpu_backends("verify_sample")
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_filter_at_real_sizes(filters, backend):
    b, vocab = 2, 152064
    settings = dict(temperature=0.8, **filters)
    logits, _, parents, coins = problem(b, 26, vocab, "cuda", dtype=torch.bfloat16)
    logits *= 3
    tokens = likely_tokens(logits, parents, 0)
    got = sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend)
    disagreements(logits, tokens, parents, coins, settings, got)


@gpu_backends("verify_sample")
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 256])
@pytest.mark.parametrize("filters", [{}, dict(top_k=50, top_p=0.9)], ids=str)
def test_chains_and_wide_trees(n, filters, backend):
    """A chain that is accepted to its end, and a root whose children are its most likely tokens."""
    vocab, settings = 9001, dict(temperature=1.0, **filters)
    logits = randn(2, n, vocab, seed=n, device="cuda")
    chain = torch.arange(-1, n - 1, dtype=torch.int32, device="cuda").expand(2, n)
    wide = (torch.arange(n, device="cuda").clamp(max=1) - 1).int().expand(2, n)
    coins = torch.rand(2, n + 1, generator=rng(n)).cuda()
    tokens = logits[:, :1].topk(n, -1).indices[:, 0]
    got = sk.verify_sample(logits, tokens, wide, coins, **settings, backend=backend)
    disagreements(logits, tokens, wide, coins, settings, got)
    best = logits.argmax(-1, keepdim=True)
    logits.scatter_(2, best, 25.0)
    tokens[:, 1:] = best[:, :-1, 0]
    coins[:, :n] *= 0.9
    got = sk.verify_sample(logits, tokens, chain, coins, **settings, backend=backend)
    assert got.length.tolist() == [n - 1] * 2
    disagreements(logits, tokens, chain, coins, settings, got)


@gpu_backends("verify_sample")
def test_streams_do_not_disturb_each_other(backend):
    """Launches in flight together count their CTAs' arrivals apart."""
    streams = [torch.cuda.Stream() for _ in range(6)]
    problems = [problem(2, 12, 20011, "cuda", seed, torch.bfloat16) for seed in range(6)]
    settings = [dict(temperature=1.0, top_k=[None, 50][i % 2], top_p=[None, 0.9][i // 2 % 2]) for i in range(6)]
    want = [sk.verify_sample(*call, **s, backend=backend) for call, s in zip(problems, settings)]
    torch.cuda.synchronize()
    for _ in range(30):
        got = []
        for stream, call, s in zip(streams, problems, settings):
            with torch.cuda.stream(stream):
                got.append(sk.verify_sample(*call, **s, backend=backend))
        torch.cuda.synchronize()
        for a, b in zip(got, want):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


@gpu_backends("verify_sample")
@pytest.mark.parametrize("filters", [{}, dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9)], ids=str)
def test_real_sizes_in_a_graph(filters, backend):
    settings = dict(temperature=1.0, **filters)
    logits, tokens, parents, coins = problem(2, 26, 152064, "cuda", dtype=torch.bfloat16)
    graph, got = replayed(lambda: sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend))
    for seed in (0, 1, 2):
        logits.copy_(randn(2, 26, 152064, seed=seed) * 4)
        tokens.copy_(likely_tokens(logits, parents, seed))
        coins.copy_(torch.rand(2, 27, generator=rng(seed)))
        graph.replay()
        disagreements(logits, tokens, parents, coins, settings, got)
        eager = sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, eager))


@gpu_backends("verify_sample")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_real_sizes(settings, backend):
    logits, tokens, parents, coins = problem(4, 26, 152064, "cuda", dtype=torch.bfloat16)
    best = logits.float().argmax(-1)
    tokens.copy_(torch.gather(best, 1, parents.long().clamp(min=0)))
    logits.scatter_(2, best[..., None], 14.0)
    got = sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend)
    disagreements(logits, tokens, parents, coins, settings, got)
    bitwise_equal_reruns(lambda: sk.verify_sample(logits, tokens, parents, coins, **settings, backend=backend), 20)


@pytest.mark.gpu
def test_the_cuda_kernel_says_what_it_cannot_take():
    for b, n, dtype, reason in [(1, 3, torch.float64, "float64"), (1, 769, torch.float32, "768 nodes")]:
        logits, tokens, parents, coins = problem(b, n, 5, "cuda", dtype=dtype)
        call = (logits, tokens, parents, coins)
        assert reason in sk.explain("verify_sample", *call, temperature=1.0)
        with pytest.raises(sk.BackendUnavailableError, match=reason):
            sk.verify_sample(*call, temperature=1.0, backend="cuda")


def test_bad_arguments():
    ok = dict(
        logits=torch.zeros(2, 3, 9),
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        parents=torch.tensor([-1, 0, 0], dtype=torch.int32),
        coins=torch.zeros(2, 4),
        temperature=1.0,
    )
    sk.verify_sample(**ok)
    for name, value, kind in [
        ("coins", torch.zeros(2, 3), ValueError),
        ("coins", torch.zeros(2, 4).double(), TypeError),
        ("temperature", 0.0, ValueError),
        ("top_k", 0, ValueError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("draft_log_probs", torch.zeros(2, 4), ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.verify_sample(**{**ok, name: value})
