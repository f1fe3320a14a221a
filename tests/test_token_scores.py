"""token_scores against sums of a dense float64 softmax."""

import pytest
import torch
from kit import (
    Guarded,
    assert_close_enough,
    backends,
    bitwise_equal_reruns,
    gpu_backends,
    paged,
    randn,
    replayed,
    transposed_layout,
)

import specvlm_kernels as sk

# B, T, S, Hq, Hkv, D, context lengths, span start, span length
SHAPES = [
    (1, 1, 40, 4, 2, 64, [30], 0, 30),
    (2, 7, 90, 8, 2, 64, [63, 40], 3, 37),
    (1, 16, 199, 7, 1, 128, [150], 11, 199 - 11),
    (1, 37, 70, 3, 3, 16, [20], 5, 50),
]


def softmax_rows(q, k, lens, dtype):
    """probabilities [B,T,Hq,S] and lse [B,T,Hq] of causal attention, dense."""
    _b, t, hq, d = q.shape
    s = k.shape[1]
    keys = k.cpu().to(dtype).repeat_interleave(hq // k.shape[2], 2)
    logits = torch.einsum("bthd,bshd->bths", q.cpu().to(dtype), keys) * d**-0.5
    last = torch.tensor(lens)[:, None] + torch.arange(t)
    logits[(torch.arange(s) > last[..., None])[:, :, None].expand_as(logits)] = float("-inf")
    return torch.softmax(logits, -1), torch.logsumexp(logits, -1)


def problem(shape, dtype, device, seed=0):
    b, t, s, hq, hkv, d, lens, _start, _span = shape
    q = randn(b, t, hq, d, seed=seed, dtype=dtype, device=device)
    k = randn(b, s, hkv, d, seed=seed + 1, dtype=dtype, device=device)
    _, lse = softmax_rows(q, k, lens, torch.float64)
    return q, k, lse.float().to(device), torch.tensor(lens, dtype=torch.int32, device=device)


@backends("token_scores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_attention_of_each_token(shape, dtype, backend, device):
    start, span, lens_list = shape[-2], shape[-1], shape[-3]
    q, k, lse, lens = problem(shape, dtype, device)
    for r, length in enumerate(lens_list):  # keys that no query sees may hold anything
        k[r, length + q.shape[1] :] = float("nan")
    got = sk.token_scores(q, k, lse, lens, start, span, backend=backend)
    exact = softmax_rows(q, k.nan_to_num(), lens_list, torch.float64)[0].mean((1, 2))[:, start : start + span]
    assert got.dtype == torch.float32
    error = float((got.cpu().double() - exact).abs().max() / exact.max())
    assert error < 1e-5, error


@backends("token_scores")
def test_layers_add_up_with_their_weights(backend, device):
    q, k, lse, lens = problem(SHAPES[1], torch.float32, device)
    q2, k2, lse2, _ = problem(SHAPES[1], torch.float32, device, seed=9)
    out = torch.zeros(2, 37, device=device)
    for layer in ((q, k, lse), (q2, k2, lse2)):
        assert sk.token_scores(*layer, lens, 3, 37, weight=0.5, out=out, backend=backend) is out
    one = sk.token_scores(q, k, lse, lens, 3, 37, backend=backend)
    two = sk.token_scores(q2, k2, lse2, lens, 3, 37, backend=backend)
    assert torch.allclose(out, (one + two) / 2, rtol=1e-5, atol=1e-9)


@backends("token_scores")
def test_a_whole_span_sums_to_the_weight(backend, device):
    shape = (2, 7, 90, 8, 2, 64, [63, 40], 0, 90)
    q, k, lse, lens = problem(shape, torch.float32, device)
    got = sk.token_scores(q, k, lse, lens, 0, 90, weight=0.25, backend=backend)
    assert torch.allclose(got.sum(1), torch.tensor(0.25, device=device), rtol=1e-4)


@backends("token_scores")
def test_query_mask(backend, device):
    q, k, lse, lens = problem(SHAPES[1], torch.float32, device)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=device)
    got = sk.token_scores(q, k, lse, lens, 3, 37, query_mask=mask, backend=backend)
    p = softmax_rows(q, k, SHAPES[1][-3], torch.float64)[0]
    exact = p[0, mask[0].cpu()].mean((0, 1))[3:40]
    assert torch.allclose(got[0].cpu().double(), exact, rtol=1e-5, atol=1e-9)
    assert bool((got[1] == 0).all())


@backends("token_scores")
def test_span_start_per_request(backend, device):
    q, k, lse, lens = problem(SHAPES[1], torch.float32, device)
    start = torch.tensor([3, 40], dtype=torch.int32, device=device)
    got = sk.token_scores(q, k, lse, lens, start, 20, backend=backend)
    for r, at in enumerate([3, 40]):
        want = sk.token_scores(q, k, lse, lens, at, 20, backend=backend)
        assert torch.equal(got[r], want[r])


@backends("token_scores")
@pytest.mark.parametrize("page_size", [1, 16])
def test_paged_and_strided_caches(page_size, backend, device):
    shape = (2, 7, 96, 8, 2, 64, [63, 40], 3, 37)
    q, k, lse, lens = problem(shape, torch.float32, device)
    want = sk.token_scores(q, k, lse, lens, 3, 37, backend=backend)
    pages, table = paged(k, page_size)
    got = sk.token_scores(q, pages, lse, lens, 3, 37, page_table=table, backend=backend)
    assert torch.allclose(got, want, rtol=1e-6)
    assert torch.equal(sk.token_scores(q, transposed_layout(k), lse, lens, 3, 37, backend=backend), want)


@backends("token_scores")
def test_hostile_values_stay_inside(backend, device):
    q, k, lse, _ = problem(SHAPES[1], torch.float32, device)
    lens = torch.tensor([-5, 2**31 - 1], dtype=torch.int32, device=device)
    start = torch.tensor([-3, 2**31 - 20], dtype=torch.int32, device=device)
    out = Guarded((2, 20), torch.float32, device, 0.0)
    sk.token_scores(q, k, lse, lens, start, 20, out=out.tensor, backend=backend)
    out.check()
    lse[:] = float("-inf")
    assert bool((sk.token_scores(q, k, lse, lens, 0, 20, backend=backend) == 0).all())


@backends("token_scores")
def test_reruns_are_bitwise_equal(backend, device):
    q, k, lse, lens = problem(SHAPES[2], torch.bfloat16, device)
    bitwise_equal_reruns(lambda: (sk.token_scores(q, k, lse, lens, 11, 188, backend=backend),))


def test_lse_comes_from_tree_attention():
    q, k, lse, lens = problem(SHAPES[1], torch.float32, "cpu")
    _, ours = sk.tree_attention(q, k, k, lens, return_lse=True)
    assert torch.allclose(ours, lse, atol=1e-5)


def test_bad_arguments():
    q, k, lens = torch.zeros(2, 3, 4, 64), torch.zeros(2, 8, 2, 64), torch.zeros(2, dtype=torch.int32)
    ok = dict(q=q, k=k, lse=torch.zeros(2, 3, 4), kv_lens=lens, span_start=0, span_len=4)
    sk.token_scores(**ok)
    for name, value, kind in [
        ("lse", torch.zeros(2, 3, 2), ValueError),
        ("lse", torch.zeros(2, 3, 4).half(), TypeError),
        ("span_len", 9, ValueError),
        ("span_len", -1, ValueError),
        ("span_len", 1.5, TypeError),
        ("span_start", 5, ValueError),
        ("span_start", lens.long(), TypeError),
        ("query_mask", torch.ones(2, 3), TypeError),
        ("query_mask", torch.ones(2, 4, dtype=torch.bool), ValueError),
        ("weight", float("inf"), ValueError),
        ("out", torch.zeros(2, 5), ValueError),
        ("k", k[:1], ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.token_scores(**{**ok, name: value})
    assert sk.token_scores(**{**ok, "span_len": 0}).shape == (2, 0)


@gpu_backends("token_scores")
def test_graph_replays_with_other_lengths(backend):
    shape = (2, 7, 400, 8, 2, 64, [63, 40], 3, 37)
    q, k, lse, lens = problem(shape, torch.bfloat16, "cuda")
    out = torch.zeros(2, 37, device="cuda")
    graph, _ = replayed(lambda: sk.token_scores(q, k, lse, lens, 3, 37, out=out, backend=backend))
    lens.copy_(torch.tensor([300, 4], dtype=torch.int32))
    out.zero_()
    graph.replay()
    assert torch.equal(out, sk.token_scores(q, k, lse, lens, 3, 37, backend=backend))


@gpu_backends("token_scores")
@pytest.mark.parametrize("hq,hkv,t,s", [(64, 8, 48, 12544), (40, 8, 48, 25088), (28, 4, 512, 4096)])
def test_real_sizes(hq, hkv, t, s, backend):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, t, hq, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, s + t, hkv, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor([s], dtype=torch.int32, device="cuda")
    _, lse = sk.reference.tree_attention(q, k, k, lens, return_lse=True)
    got = sk.token_scores(q, k, lse, lens, 100, s - 200, backend=backend)
    exact = sk.reference.token_scores(q.double(), k.double(), lse.double(), lens, 100, s - 200)
    plain = sk.reference.token_scores(q, k, lse, lens, 100, s - 200)
    assert_close_enough(got, exact, plain)
    assert float((got.double() - exact).abs().max() / exact.max()) < 1e-5
