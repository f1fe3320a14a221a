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
    working_dtype,
)

import specvlm_kernels as sk
from specvlm_kernels.backend import extension

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
    q, k, lse, lens = problem(SHAPES[1], working_dtype(backend), device)
    q2, k2, lse2, _ = problem(SHAPES[1], working_dtype(backend), device, seed=9)
    out = torch.zeros(2, 37, device=device)
    for layer in ((q, k, lse), (q2, k2, lse2)):
        assert sk.token_scores(*layer, lens, 3, 37, weight=0.5, out=out, backend=backend) is out
    one = sk.token_scores(q, k, lse, lens, 3, 37, backend=backend)
    two = sk.token_scores(q2, k2, lse2, lens, 3, 37, backend=backend)
    assert torch.allclose(out, (one + two) / 2, rtol=1e-5, atol=1e-9)


@backends("token_scores")
def test_a_whole_span_sums_to_the_weight(backend, device):
    shape = (2, 7, 90, 8, 2, 64, [63, 40], 0, 90)
    q, k, lse, lens = problem(shape, working_dtype(backend), device)
    got = sk.token_scores(q, k, lse, lens, 0, 90, weight=0.25, backend=backend)
    assert torch.allclose(got.sum(1), torch.tensor(0.25, device=device), rtol=1e-4)


@backends("token_scores")
def test_query_mask(backend, device):
    q, k, lse, lens = problem(SHAPES[1], working_dtype(backend), device)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=device)
    got = sk.token_scores(q, k, lse, lens, 3, 37, query_mask=mask, backend=backend)
    p = softmax_rows(q, k, SHAPES[1][-3], torch.float64)[0]
    exact = p[0, mask[0].cpu()].mean((0, 1))[3:40]
    assert torch.allclose(got[0].cpu().double(), exact, rtol=1e-5, atol=1e-9)
    assert bool((got[1] == 0).all())


@backends("token_scores")
def test_span_start_per_request(backend, device):
    q, k, lse, lens = problem(SHAPES[1], working_dtype(backend), device)
    start = torch.tensor([3, 40], dtype=torch.int32, device=device)
    got = sk.token_scores(q, k, lse, lens, start, 20, backend=backend)
    for r, at in enumerate([3, 40]):
        want = sk.token_scores(q, k, lse, lens, at, 20, backend=backend)
        assert torch.equal(got[r], want[r])


@backends("token_scores")
@pytest.mark.parametrize("page_size", [1, 16])
def test_paged_and_strided_caches(page_size, backend, device):
    shape = (2, 7, 96, 8, 2, 64, [63, 40], 3, 37)
    q, k, lse, lens = problem(shape, working_dtype(backend), device)
    want = sk.token_scores(q, k, lse, lens, 3, 37, backend=backend)
    pages, table = paged(k, page_size)
    got = sk.token_scores(q, pages, lse, lens, 3, 37, page_table=table, backend=backend)
    assert torch.allclose(got, want, rtol=1e-6)
    assert torch.equal(sk.token_scores(q, transposed_layout(k), lse, lens, 3, 37, backend=backend), want)


@backends("token_scores")
def test_hostile_values_stay_inside(backend, device):
    q, k, lse, _ = problem(SHAPES[1], working_dtype(backend), device)
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


def cuda_problem(hq, hkv, d, t, s, lens, dtype=torch.bfloat16, seed=0):
    """(q, k, lse, lens) on the GPU and the dense probabilities [B,T,Hq,S]."""
    q, k, lse, lens_tensor = problem((len(lens), t, s, hq, hkv, d, lens, 0, 0), dtype, "cuda", seed)
    return q, k, lse, lens_tensor, softmax_rows(q, k, lens, torch.float64)[0]


def relative_error(got, exact):
    return float((got.cpu().double() - exact).abs().max() / exact.max())


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 48, 65, 129, 200, 512])
@pytest.mark.parametrize(
    "hq,hkv,d,dtype",
    [(8, 2, 128, torch.bfloat16), (5, 1, 128, torch.float16), (7, 1, 64, torch.bfloat16), (3, 3, 64, torch.float16)],
    ids=str,
)
def test_cuda_any_number_of_queries(hq, hkv, d, dtype, t, cuda_kernel):
    context = 211
    q, k, lse, lens, exact = cuda_problem(hq, hkv, d, t, context + t + 3, [context, 65], dtype)
    got = sk.token_scores(q, k, lse, lens, 1, context + t, backend="cuda")
    assert relative_error(got, exact.mean((1, 2))[:, 1 : 1 + context + t]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 4, 8, 32, 128])
def test_cuda_spans_begin_and_end_anywhere(page_size, cuda_kernel):
    """Before the text (at 200), across its beginning and inside it; up to the end of the cache."""
    q, k, lse, lens, exact = cuda_problem(10, 2, 128, 48, 256, [200])
    want, table = exact.mean((1, 2)), None
    if page_size:
        k, table = paged(k, page_size)
    for start in (0, 1, 7, 63, 64, 65, 127, 190, 199, 200, 201, 230, 247):
        for length in sorted({1, 9, min(64, 256 - start), 256 - start}):
            out = Guarded((1, length), torch.float32, "cuda", 0.0)
            sk.token_scores(q, k, lse, lens, start, length, out=out.tensor, page_table=table, backend="cuda")
            error = (out.check().cpu().double() - want[:, start : start + length]).abs().max()
            assert error < 1e-5 * want.max(), (start, length)


@pytest.mark.gpu
def test_cuda_ragged_batch(cuda_kernel):
    """More requests than a warp has lanes; some have no token of the span."""
    lens = [0, 1, 500, 63, 64, 257] * 7
    q, k, lse, lens_tensor, exact = cuda_problem(4, 2, 128, 9, 520, lens)
    got = sk.token_scores(q, k, lse, lens_tensor, 70, 450, backend="cuda")
    assert relative_error(got, exact.mean((1, 2))[:, 70:]) < 1e-5


@pytest.mark.gpu
def test_cuda_sixty_four_layers_in_one_buffer(cuda_kernel):
    layers, start, span = 64, 3, 190
    out, want = torch.zeros(1, span, device="cuda"), 0
    for layer in range(layers):
        q, k, lse, lens, exact = cuda_problem(16, 2, 128, 24, 230, [200], seed=2 * layer)
        sk.token_scores(q, k, lse, lens, start, span, weight=1 / layers, out=out, backend="cuda")
        want = want + exact.mean((1, 2))[:, start : start + span] / layers
    assert relative_error(out, want) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("t", [48, 300])
def test_cuda_probabilities_sum_to_the_weight(t, cuda_kernel):
    q, k, lse, lens, _ = cuda_problem(14, 2, 128, t, 1000, [1000 - t])
    got = sk.token_scores(q, k, lse, lens, 0, 1000, weight=0.125, backend="cuda")
    assert float((got.double().sum() / 0.125 - 1).abs()) < 1e-4


@pytest.mark.gpu
def test_cuda_queries_out_of_q_may_hold_anything(cuda_kernel):
    q, k, lse, lens, exact = cuda_problem(8, 2, 128, 100, 400, [300, 290])
    mask = torch.rand(2, 100, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) < 0.5
    q[~mask] = float("nan")
    lse[~mask] = float("nan")
    got = sk.token_scores(q, k, lse, lens, 5, 350, query_mask=mask, backend="cuda")
    want = torch.stack([exact[r, mask[r].cpu()].mean((0, 1))[5:355] for r in range(2)])
    assert relative_error(got, want) < 1e-5
    out = torch.full((2, 350), 7.0, device="cuda")
    sk.token_scores(q, k, lse, lens, 5, 350, query_mask=torch.zeros_like(mask), out=out, backend="cuda")
    assert bool((out == 7).all())
    lse[:, ::2] = float("inf")  # rows that see nothing count in |Q|, and add nothing
    q[:, ::2] = float("inf")
    q[:, 1::2], lse[:, 1::2] = 0, 0
    got = sk.token_scores(q, k, lse, lens, 5, 10, backend="cuda")
    assert torch.allclose(got, torch.full_like(got, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_cuda_hostile_indices_stay_inside(page_size, cuda_kernel):
    q, k, lse, _, _ = cuda_problem(8, 2, 64, 7, 128, [30, 40, 50, 60])
    pages, table = paged(k, page_size)
    worst = [-(2**31), -1, 2**31 - 1, 2**31 - 20]
    table[:, ::2] = torch.tensor(worst, dtype=torch.int32, device="cuda")[:, None]
    pages = pages.nan_to_num()
    lens, start = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (worst, [2**31 - 1, -64, -1, 100]))
    for cache, page_table in ((k, None), (pages, table)):
        for kv_lens in (lens, lens.roll(1), torch.full_like(lens, 100)):
            out = Guarded((4, 50), torch.float32, "cuda", 0.0)
            sk.token_scores(q, cache, lse, kv_lens, start, 50, out=out.tensor, page_table=page_table, backend="cuda")
            assert bool(torch.isfinite(out.check()).all())
            if page_table is None:
                want = sk.reference.token_scores(q, k, lse, kv_lens, start, 50)
                assert torch.allclose(out.tensor, want, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("hq,hkv,t,s", [(64, 8, 48, 12544), (40, 8, 48, 6000), (28, 4, 512, 2048), (8, 8, 1, 5000)])
def test_cuda_many_reruns_are_bitwise_equal(hq, hkv, t, s, cuda_kernel):
    """A race would show as a difference sooner or later."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, t, hq, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, s + t, hkv, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    lse = torch.full((1, t, hq), 9.0, device="cuda")
    lens = torch.tensor([s], dtype=torch.int32, device="cuda")
    bitwise_equal_reruns(lambda: (sk.token_scores(q, k, lse, lens, 17, s - 17, backend="cuda"),), times=200)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_cuda_caches_past_two_to_the_31_elements(page_size, cuda_kernel):
    """The end of a huge cache against the same keys in a small one."""
    hkv, d, tail = 8, 128, 640
    s = 2**31 // (hkv * d) + tail
    k = torch.empty(1, s, hkv, d, dtype=torch.bfloat16, device="cuda")
    k[:, -tail:] = randn(1, tail, hkv, d, dtype=torch.bfloat16, device="cuda")
    q, lse = randn(1, 5, 16, d, seed=1, dtype=torch.bfloat16, device="cuda"), torch.full((1, 5, 16), 7.0, device="cuda")
    lens = torch.tensor([tail - 5], dtype=torch.int32, device="cuda")
    want = sk.token_scores(q, k[:, -tail:], lse, lens, 64, tail - 64, backend="cuda")
    table = None
    if page_size:
        k, table = k.view(-1, page_size, hkv, d), torch.arange(s // page_size, dtype=torch.int32, device="cuda")[None]
    got = sk.token_scores(q, k, lse, lens + s - tail, s - tail + 64, tail - 64, page_table=table, backend="cuda")
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_cuda_plan_keeps_to_the_limits():
    """Which kernel is chosen; and for Hopper, that a row tile of Q and three tiles of keys fit into shared memory."""
    module = extension()[0]
    plan, kernels = module.token_scores_plan, module.TokenScoresKernel
    for group in (1, 2, 3, 5, 7, 8, 12, 28, 64, 71, 128, 256, 300):
        for queries in (1, 5, 48, 91, 128, 512, 2047):
            for page_size in (0, 1, 4, 8, 16, 256):
                made = plan(2, queries, 2 * group, 2, 128, 1000, page_size, 90, 132)
                assert made.workspace_floats == 2 * 2 * 1000
                assert plan(2, queries, 2 * group, 2, 128, 1000, page_size, 80, 132).kernel == kernels.SM80
                if page_size in (1, 4) or group > 256:
                    assert made.kernel == kernels.SM80
                    continue
                assert made.kernel == kernels.SM90
                assert made.row_tiles * made.tile_queries >= queries > (made.row_tiles - 1) * made.tile_queries
                assert made.chunks * made.chunk_queries * group <= made.rows <= 672
                assert made.rows * 260 + made.stages * 64 * 256 < 226 * 1024 and made.stages >= 3
