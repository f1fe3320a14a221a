"""tree_attention against a dense float64 softmax written from the definition."""

import pytest
import torch
from kit import (
    Guarded,
    ancestor_mask,
    assert_close_enough,
    backends,
    bitwise_equal_reruns,
    gpu_backends,
    needs_gpu_memory,
    paged,
    randn,
    random_tree,
    replayed,
    transposed_layout,
    with_both_poisons,
    words_of,
    working_dtype,
)
from torch import Tensor

import specvlm_kernels as sk

# B, N, S, Hq, Hkv, D, context lengths
SHAPES = [
    (3, 1, 40, 16, 2, 64, [17, 39, 0]),
    (2, 26, 90, 8, 2, 64, [63, 0]),
    (1, 63, 70, 7, 1, 64, [7]),
    (1, 64, 199, 2, 2, 128, [130]),
    (2, 65, 150, 3, 3, 64, [1, 85]),
    (1, 128, 130, 2, 1, 16, [2]),
    (3, 5, 37, 5, 1, 80, [32, 0, 13]),
]


def dense(q: Tensor, k: Tensor, v: Tensor, lens: list[int], mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) by one masked softmax a request; mask bool [B,N,N]; whole computation in dtype."""
    b, n, hq, d = q.shape
    group = hq // k.shape[2]
    out = torch.zeros(b, n, hq, d, dtype=dtype)
    lse = torch.full((b, n, hq), float("-inf"), dtype=dtype)
    for r in range(b):
        keys = k[r, : lens[r] + n].cpu().to(dtype).repeat_interleave(group, 1)
        values = v[r, : lens[r] + n].cpu().to(dtype).repeat_interleave(group, 1)
        logits = torch.einsum("nhd,shd->nhs", q[r].cpu().to(dtype), keys) * d**-0.5
        allowed = torch.cat([torch.ones(n, lens[r], dtype=torch.bool), mask[r].cpu()], 1)
        for i in range(n):
            seen = allowed[i].nonzero()[:, 0]
            if len(seen):
                row = logits[i][:, seen]
                lse[r, i] = torch.logsumexp(row, -1)
                out[r, i] = torch.einsum("hs,shd->hd", torch.softmax(row, -1), values[seen])
    return out, lse


def problem(shape, dtype, device, seed=0):
    b, n, s, hq, hkv, d, lens = shape
    q = randn(b, n, hq, d, seed=seed, dtype=dtype, device=device)
    k = randn(b, s, hkv, d, seed=seed + 1, dtype=dtype, device=device)
    v = randn(b, s, hkv, d, seed=seed + 2, dtype=dtype, device=device)
    for r in range(b):  # what lies past the tree must not matter
        k[r, lens[r] + n :] = float("nan")
        v[r, lens[r] + n :] = float("nan")
    masks = torch.stack([ancestor_mask(random_tree(n, seed + r)) for r in range(b)])
    return q, k, v, torch.tensor(lens, dtype=torch.int32, device=device), masks


def check(got, q, k, v, lens, masks, dtype):
    exact, exact_lse = dense(q, k, v, lens, masks, torch.float64)
    plain, plain_lse = dense(q, k, v, lens, masks, dtype)
    assert_close_enough(got[0], exact, plain)
    assert_close_enough(got[1], exact_lse, plain_lse)


@backends("tree_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_trees(shape, dtype, backend, device):
    q, k, v, lens, masks = problem(shape, dtype, device)
    words = words_of(masks).to(device)
    got = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend=backend)
    check(got, q, k, v, shape[-1], masks, dtype)


@backends("tree_attention")
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
def test_causal_chain_is_the_default(shape, backend, device):
    q, k, v, lens, masks = problem(shape, working_dtype(backend), device, seed=5)
    chain = torch.ones_like(masks).tril()
    got = sk.tree_attention(q, k, v, lens, return_lse=True, backend=backend)
    check(got, q, k, v, shape[-1], chain, working_dtype(backend))


@backends("tree_attention")
def test_one_mask_for_the_whole_batch(backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    masks[:] = masks[0]
    got = sk.tree_attention(q, k, v, lens, words_of(masks[0]).to(device), return_lse=True, backend=backend)
    check(got, q, k, v, SHAPES[1][-1], masks, working_dtype(backend))


@backends("tree_attention")
def test_ragged_trees(backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    for r, live in enumerate([26, 4]):
        masks[r, live:] = True  # rows and columns past the tree count for nothing, whatever their bits
        masks[r, :, live:] = True
    words = words_of(masks).to(device)
    tree_lens = torch.tensor([26, 4], dtype=torch.int32, device=device)
    k[1, 4:], v[1, 4:] = float("nan"), float("nan")
    out, lse = sk.tree_attention(q, k, v, lens, words, tree_lens=tree_lens, return_lse=True, backend=backend)
    assert bool((out[1, 4:] == 0).all()) and bool((lse[1, 4:] == float("-inf")).all())
    masks[1, 4:] = False
    masks[1, :, 4:] = False
    k[1], v[1] = k[1].nan_to_num(), v[1].nan_to_num()
    exact, exact_lse = dense(q, k, v, SHAPES[1][-1], masks, torch.float64)
    plain, plain_lse = dense(q, k, v, SHAPES[1][-1], masks, working_dtype(backend))
    assert_close_enough(out[:1], exact[:1], plain[:1])
    assert_close_enough(out[1:, :4], exact[1:, :4], plain[1:, :4])
    assert_close_enough(lse[1:, :4], exact_lse[1:, :4], plain_lse[1:, :4])


@backends("tree_attention")
def test_rows_that_see_nothing(backend, device):
    q, k, v, lens, masks = problem((1, 5, 20, 4, 2, 64, [0]), working_dtype(backend), device)
    masks[:, 3] = False
    masks[:, :, 3] = False  # and a node that nobody sees may hold anything
    k[:, 3], v[:, 3] = float("nan"), float("inf")
    out, lse = sk.tree_attention(q, k, v, lens, words_of(masks).to(device), return_lse=True, backend=backend)
    assert bool((out[0, 3] == 0).all()) and bool((lse[0, 3] == float("-inf")).all())
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(lse[0, :3]).all())


@backends("tree_attention")
@pytest.mark.parametrize("page_size", [1, 2, 4, 16, 64, 256])
def test_paged_equals_contiguous(page_size, backend, device):
    shape = (2, 26, 256, 8, 2, 64, [64, 5])
    q, k, v, lens, masks = problem(shape, working_dtype(backend), device)
    words = words_of(masks).to(device)
    k_pages, table = paged(k, page_size)
    v_pages, _ = paged(v, page_size)
    got = sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, return_lse=True, backend=backend)
    check(got, q, k, v, shape[-1], masks, working_dtype(backend))


@backends("tree_attention")
def test_any_strides(backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    words = words_of(masks).to(device)
    want = sk.tree_attention(q, k, v, lens, words, backend=backend)
    wide = torch.full((*q.shape[:3], 2 * q.shape[3]), 7.0, device=device, dtype=q.dtype)
    wide[..., : q.shape[3]] = q
    q_strided = wide[..., : q.shape[3]]
    got = sk.tree_attention(q_strided, transposed_layout(k), transposed_layout(v), lens, words, backend=backend)
    assert torch.equal(got, want)


@backends("tree_attention")
def test_every_output_is_written_and_nothing_else(backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    words = words_of(masks).to(device)

    def run(poison, _):
        out = Guarded(tuple(q.shape), q.dtype, device, poison)
        assert sk.tree_attention(q, k, v, lens, words, out=out.tensor, backend=backend) is out.tensor
        return [out]

    with_both_poisons(run)


@backends("tree_attention")
def test_hostile_lengths_stay_inside(backend, device):
    q, k, v, _, masks = problem((3, 5, 40, 4, 2, 64, [35, 35, 35]), working_dtype(backend), device)
    words = words_of(masks).to(device)
    hostile = torch.tensor([-1, 40, 2**31 - 1], dtype=torch.int32, device=device)
    want = sk.reference.tree_attention(q, k, v, hostile, words)
    got = sk.tree_attention(q, k, v, hostile, words, backend=backend)
    assert bool(torch.isfinite(got).all())
    assert torch.allclose(got, want, atol=1e-5 if got.dtype == torch.float32 else 2e-2)


@backends("tree_attention")
@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_hostile_page_tables_stay_inside(page_size, backend, device):
    q = randn(3, 5, 4, 64, device=device, dtype=working_dtype(backend))
    words = words_of(torch.ones(3, 5, 5, dtype=torch.bool).tril()).to(device)
    hostile = torch.tensor([-1, 40, 2**31 - 1], dtype=torch.int32, device=device)
    table = torch.tensor([[-1, 2**31 - 1] * 4] * 3, dtype=torch.int32, device=device)
    pages = randn(4, page_size, 2, 64, device=device, dtype=q.dtype)
    got = sk.tree_attention(q, pages, pages, hostile, words, page_table=table, backend=backend)
    assert bool(torch.isfinite(got).all())


@backends("tree_attention")
@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_tiny_and_huge_logits(scale, backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    words = words_of(masks).to(device)
    got = sk.tree_attention(q * scale, k, v, lens, words, return_lse=True, backend=backend)
    check(got, q * scale, k, v, SHAPES[1][-1], masks, working_dtype(backend))


@backends("tree_attention")
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_softmax_scale(scale, backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], working_dtype(backend), device)
    words = words_of(masks).to(device)
    got = sk.tree_attention(q, k, v, lens, words, softmax_scale=scale, backend=backend)
    want = sk.tree_attention(q * (scale * 64**0.5), k, v, lens, words, backend=backend)  # a power of two: exact
    assert torch.allclose(got, want, atol=2e-6 if got.dtype == torch.float32 else 2e-2)


@backends("tree_attention")
def test_reruns_are_bitwise_equal(backend, device):
    q, k, v, lens, masks = problem(SHAPES[1], torch.bfloat16, device)
    words = words_of(masks).to(device)
    bitwise_equal_reruns(lambda: sk.tree_attention(q, k, v, lens, words, return_lse=True, backend=backend))


@pytest.mark.parametrize("b,n", [(0, 4), (2, 0)])
def test_empty_input(b, n):
    q, cache = torch.zeros(b, n, 4, 64), torch.zeros(b, 8, 2, 64)
    out, lse = sk.tree_attention(q, cache, cache, torch.zeros(b, dtype=torch.int32), return_lse=True)
    assert out.shape == (b, n, 4, 64) and lse.shape == (b, n, 4)


def test_bad_arguments():
    q, k, lens = torch.zeros(2, 3, 4, 64), torch.zeros(2, 8, 2, 64), torch.zeros(2, dtype=torch.int32)
    words = torch.zeros(3, 1, dtype=torch.int64)
    ok = dict(q=q, k=k, v=k, kv_lens=lens, tree_mask=words)
    sk.tree_attention(**ok)
    with pytest.raises(ValueError, match="q: 3 nodes do not fit a cache of 0 tokens"):
        sk.tree_attention(**{**ok, "k": k[:, :0], "v": k[:, :0]})
    with pytest.raises(ValueError, match="k: expected at least one page"):
        sk.tree_attention(q, k[:0], k[:0], lens, page_table=torch.zeros(2, 2, dtype=torch.int32))
    for name, value, kind in [
        ("q", "text", TypeError),
        ("q", q[0], ValueError),
        ("q", q.int(), TypeError),
        ("q", torch.zeros(2, 9, 4, 64), ValueError),
        ("q", torch.zeros(2, 3, 3, 64), ValueError),
        ("q", torch.zeros(2, 3, 64, 4).transpose(2, 3), ValueError),
        ("k", k.half(), TypeError),
        ("k", k[..., :32], ValueError),
        ("v", torch.zeros(2, 9, 2, 64), ValueError),
        ("kv_lens", lens.long(), TypeError),
        ("kv_lens", lens[:1], ValueError),
        ("tree_mask", words.int(), TypeError),
        ("tree_mask", torch.zeros(3, 2, dtype=torch.int64), ValueError),
        ("tree_lens", lens[:1], ValueError),
        ("page_table", lens, ValueError),
        ("softmax_scale", float("nan"), ValueError),
        ("out", torch.zeros(2, 3, 4, 32), ValueError),
        ("backend", "gpu", ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.tree_attention(**{**ok, name: value})
    with pytest.raises(ValueError, match="page_size"):
        sk.tree_attention(q, k[:, :3], k[:, :3], lens, page_table=torch.zeros(2, 2, dtype=torch.int32))


@gpu_backends("tree_attention")
def test_graph_replays_with_other_lengths(backend):
    shape = (2, 26, 400, 8, 2, 64, [63, 0])
    q, k, v, lens, masks = problem(shape, torch.bfloat16, "cuda")
    k, v = k.nan_to_num(), v.nan_to_num()
    words = words_of(masks).cuda()
    graph, out = replayed(lambda: sk.tree_attention(q, k, v, lens, words, backend=backend))
    for new in ([0, 5], [374, 200]):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        want = sk.tree_attention(q, k, v, lens, words, backend=backend)
        assert torch.equal(out, want)


@gpu_backends("tree_attention")
@pytest.mark.parametrize("hq,hkv,n,s", [(64, 8, 26, 12544), (28, 4, 4, 2560), (40, 8, 48, 25088), (40, 8, 1, 200000)])
def test_real_sizes(hq, hkv, n, s, backend):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, n, hq, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, s, hkv, 128, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lens = torch.tensor([s - n - 3], dtype=torch.int32, device="cuda")
    words = words_of(ancestor_mask(random_tree(n, 1))).cuda()
    got, lse = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend=backend)
    kd, vd, qd = k.double(), v.double(), q.double()
    exact, exact_lse = sk.reference.tree_attention(qd, kd, vd, lens, words, return_lse=True)
    plain = sk.reference.tree_attention(q, k, v, lens, words)
    assert_close_enough(got, exact, plain)
    assert float((lse.double() - exact_lse).abs().max()) < 1e-3


@gpu_backends("tree_attention")
@needs_gpu_memory(24)
@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_past_two_to_the_31_elements(page_size, backend):
    s, n = (1 << 31) // (2 * 128) + 4096, 8
    k = torch.zeros(1, s, 2, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    start = s - n - 10
    g = torch.Generator("cuda").manual_seed(0)
    k[:, start - 500 :] = torch.randn(1, s - start + 500, 2, 128, generator=g, device="cuda").bfloat16()
    v[:, start - 500 :] = torch.randn(1, s - start + 500, 2, 128, generator=g, device="cuda").bfloat16()
    k[:, : start - 500] = -100.0
    q = torch.rand(1, n, 4, 128, generator=g, device="cuda").bfloat16() + 1  # far positions weigh nothing
    lens = torch.tensor([start], dtype=torch.int32, device="cuda")
    near = slice(start - 500, s)
    caches, table = (k, v), None
    if page_size:
        pages = s // page_size
        caches = tuple(x.view(pages, page_size, 2, 128) for x in (k, v))
        table = torch.arange(pages, device="cuda", dtype=torch.int32)[None]
    got = sk.tree_attention(q, *caches, lens, page_table=table, backend=backend)
    want = sk.tree_attention(
        q, k[:, near].contiguous(), v[:, near].contiguous(), torch.full_like(lens, 500), backend="torch"
    )
    assert torch.allclose(got.float(), want.float(), atol=2e-2)
