"""What is special to the CUDA kernels of tree_attention: how they cut work, pages, and the choice between them."""

import pytest
import torch
from kit import ancestor_mask, assert_close_enough, gpu_backends, paged, random_tree, words_of

import specvlm_kernels as sk
from specvlm_kernels import _env, backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def problem(b, n, s, hq, hkv, d, lens, dtype=torch.bfloat16, seed=0):
    """q, k, v with NaN past every tree, lens, and a random tree a request as mask words."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=g, device=DEVICE, dtype=dtype)
        for shape in [(b, n, hq, d), (b, s, hkv, d), (b, s, hkv, d)]
    )
    for r, length in enumerate(lens):
        k[r, length + n :] = v[r, length + n :] = float("nan")
    words = words_of(torch.stack([ancestor_mask(random_tree(n, seed + r)) for r in range(b)])).to(DEVICE)
    return q, k, v, torch.tensor(lens, dtype=torch.int32, device=DEVICE), words


def check(got, q, k, v, lens, words, **kwargs):
    """Against the reference in float64, where plain PyTorch is the reference in the inputs' dtype."""
    exact, exact_lse = sk.reference.tree_attention(
        q.double(), k.double(), v.double(), lens, words, return_lse=True, **kwargs
    )
    plain = sk.reference.tree_attention(q, k, v, lens, words, **kwargs)
    assert_close_enough(got[0], exact, plain)
    finite = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(got[1]), finite)
    assert float((got[1].double() - exact_lse)[finite].abs().max()) < 1e-3


def planned(b, n, s, hq, hkv, d, page_size=0):
    """The plan of such a call."""
    module, _ = backend.extension()
    device = (backend.architecture(0), backend.multiprocessors(0), backend.shared_memory(0))
    return module.tree_attention_plan(b, n, hq, hkv, d, s, page_size, *device)


def chosen(*shape):
    """The name of the kernel that takes such a call."""
    return planned(*shape).kernel.name


# every size of a CTA's row tile, groups that do not divide it, and one that does not fit it
HEADS = [(1, 1), (5, 1), (8, 1), (7, 1), (28, 4), (40, 8), (64, 8), (150, 1), (131, 1)]


@pytest.mark.parametrize("page_size", [0, 2])
@pytest.mark.parametrize("nodes", [1, 4, 13, 26])
@pytest.mark.parametrize("hq,hkv", HEADS)
@pytest.mark.parametrize("d", [64, 128])
def test_every_number_of_rows(d, hq, hkv, nodes, page_size, cuda_kernel):
    q, k, v, lens, words = problem(2, nodes, 700, hq, hkv, d, [650, 3])
    caches, table = (k, v), None
    if page_size:
        (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
        caches = (k_pages, v_pages)
    got = sk.tree_attention(q, *caches, lens, words, page_table=table, return_lse=True, backend="cuda")
    check(got, q, k, v, lens, words)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nodes", [64, 128, 199, 256, 300])
def test_big_trees_and_long_texts(nodes, dtype, cuda_kernel):
    q, k, v, lens, words = problem(2, nodes, 1000, 10, 2, 128, [700, 63], dtype)
    tree_lens = torch.tensor([nodes, nodes - 37], dtype=torch.int32, device=DEVICE)
    for mask in (words, None):
        got = sk.tree_attention(q, k, v, lens, mask, tree_lens=tree_lens, return_lse=True, backend="cuda")
        check(got, q, k, v, lens, mask, tree_lens=tree_lens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("above", [(10.5,), (10.5, 30.0, 200.0)], ids=["a little", "more and more"])
@pytest.mark.parametrize("who", [slice(None), slice(3), slice(-3, None)], ids=["all", "first", "last"])
@pytest.mark.parametrize(
    "hq,hkv,nodes",
    [(28, 4, 4), (28, 4, 26), (40, 8, 26), (40, 8, 32), (40, 8, 64), (64, 8, 26), (64, 8, 32), (64, 8, 48)],
)
def test_scores_far_above_those_before(hq, hkv, nodes, who, above, dtype, cuda_kernel):
    """Now and then a key whose scores (natural log) are so much larger that references have to move: those of all
    nodes, or of nodes that one warpgroup has. With 10.5 the many others still have 1.5% of the weight."""
    q, k, v, lens, words = problem(1, nodes, 20_000, hq, hkv, 128, [19_900], dtype)
    q[..., 0] = 0.0
    q[:, who, :, 0] = 128**0.5  # times the scale: 1
    k[:, :19_900, :, 0] = 0.0
    for i, position in enumerate(range(100, 19_900, 331)):
        k[:, position, :, 0] = above[i % len(above)]
    got = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")
    check(got, q, k, v, lens, words)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hq,hkv", [(28, 4), (40, 8), (64, 8)])
def test_nodes_past_the_tree_may_hold_nan(hq, hkv, dtype, cuda_kernel):
    """Also where a key far above those before makes references move."""
    q, k, v, lens, words = problem(1, 26, 20_000, hq, hkv, 128, [19_900], dtype)
    q[..., 0] = 128**0.5
    k[:, :19_900, :, 0] = 0.0
    k[:, 10_000, :, 0], k[:, 15_000, :, 0] = 30.0, 150.0
    q[:, 12:] = float("nan")
    tree_lens = torch.tensor([12], dtype=torch.int32, device=DEVICE)
    got = sk.tree_attention(q, k, v, lens, words, tree_lens=tree_lens, return_lse=True, backend="cuda")
    q[:, 12:] = 0.0
    check(got, q, k, v, lens, words, tree_lens=tree_lens)


@pytest.mark.parametrize("n,hq,hkv,s", [(26, 64, 8, 8192), (26, 28, 4, 8192), (4, 28, 4, 20_000), (48, 64, 8, 4096)])
def test_no_part_is_read_that_was_not_written(n, hq, hkv, s, cuda_kernel):
    """Whatever lies in the workspace, at lengths that give a CTA little or nothing."""
    q, k, v, lens, words = problem(1, n, s, hq, hkv, 128, [s - n])
    plan = planned(1, n, s, hq, hkv, 128)
    for context in range(0, 4000, 61):
        lens.fill_(context)

        def run(poison):
            torch.full((plan.workspace_floats,), poison, device=DEVICE)  # the next call gets its memory
            return sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")

        for one, other in zip(run(1e4), run(-1e4)):
            assert torch.equal(one, other), context
    check(run(1e4), q, k, v, lens, words)


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 32, 128, 256])
@pytest.mark.parametrize("layout", ["tokens outside", "heads outside"])
def test_pages_at_every_length(layout, page_size, cuda_kernel):
    """Contexts and trees that end before, at and behind the edges of pages and tiles."""
    lens = [0, 1, 37, 38, 39, 63, 64, 65, 101, 102, 103, 128, 190, 229, 230]
    q, k, v, lens, words = problem(len(lens), 26, 256, 8, 2, 64, lens)
    (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
    if layout == "heads outside":
        k_pages, v_pages = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_pages, v_pages))
    got = sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, return_lse=True, backend="cuda")
    check(got, q, k, v, lens, words)


# kernel, nodes, Hq, Hkv, D for 15 requests of 1,024 tokens; few, many and the most columns, one row tile and several
SHAPES = [
    ("SM90", 4, 40, 8, 128),
    ("SM90", 26, 40, 8, 64),
    ("SM90", 26, 64, 8, 128),
    ("SM90_ROWS", 30, 32, 8, 128),
    ("SM90_ROWS", 90, 8, 2, 64),
]


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("kernel,n,hq,hkv,d", SHAPES)
def test_small_pages_in_both_kernels(kernel, n, hq, hkv, d, page_size, cuda_kernel):
    """Right, and bitwise what the same tokens give in a contiguous cache."""
    b, s = 15, 1024
    if backend.architecture(0) >= 90:
        assert chosen(b, n, s, hq, hkv, d, page_size) == kernel
    lens = [0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 256 - n, 255, 513 - n, s - n - 1, s - n]
    q, k, v, lens, words = problem(b, n, s, hq, hkv, d, lens)
    tree_lens = torch.tensor([n - r % 3 for r in range(b)], dtype=torch.int32, device=DEVICE)
    (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
    kwargs = dict(tree_lens=tree_lens, return_lse=True, backend="cuda")
    for mask in (words, None):
        got = sk.tree_attention(q, k_pages, v_pages, lens, mask, page_table=table, **kwargs)
        check(got, q, k, v, lens, mask, tree_lens=tree_lens)
        for one, other in zip(got, sk.tree_attention(q, k, v, lens, mask, **kwargs)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("n", [26, 90])
def test_hostile_entries_of_small_pages(n, page_size, cuda_kernel):
    """Entries outside of the pool mean its first or last page, and those past max_pages are not looked at."""
    b, s = 3, 1000
    q, k, v, lens, words = problem(b, n, s, 40, 8, 128, [s - n, 700, 63])
    (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
    k_pages, v_pages = k_pages.nan_to_num(), v_pages.nan_to_num()
    far = torch.iinfo(torch.int32)
    wide = torch.full((b, table.shape[1] + 70), far.max, dtype=torch.int32, device=DEVICE)
    hostile = wide[:, : table.shape[1]]
    hostile.copy_(table)
    for i, entry in enumerate([-1, far.min, len(k_pages), far.max]):
        hostile[:, i::11] = entry
    lens[2] = far.max
    got = sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=hostile, return_lse=True, backend="cuda")
    tame = hostile.clamp(0, len(k_pages) - 1).contiguous()
    want = sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=tame, return_lse=True, backend="cuda")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    k, v = (pages[tame.long()].flatten(1, 2) for pages in (k_pages, v_pages))
    check(got, q, k, v, lens, words)


@pytest.mark.parametrize("page_size", [0, 1, 4, 16])
def test_sixty_four_uneven_requests(page_size, cuda_kernel):
    """Some CTAs get many requests, some requests many CTAs; trees of 0 nodes are no part of the work."""
    lens = [3000, 0, 1, 2000] + [7 * i for i in range(60)]
    q, k, v, lens, words = problem(64, 26, 3072, 10, 2, 128, lens)
    tree_lens = torch.tensor([26, 0, 5, 25] + [i % 27 for i in range(60)], dtype=torch.int32, device=DEVICE)
    caches, table = (k, v), None
    if page_size:
        (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
        caches = (k_pages, v_pages)
    kwargs = dict(tree_lens=tree_lens, return_lse=True)
    got = sk.tree_attention(q, *caches, lens, words, page_table=table, backend="cuda", **kwargs)
    check(got, q, k, v, lens, words, tree_lens=tree_lens)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("position", [0, 15, 63, 64, 300, 650])
def test_one_logit_far_from_all_others(position, sign, cuda_kernel):
    """10,000 above (the value itself comes out), or below (it counts for nothing), early and late in the cache."""
    q, k, v, lens, _ = problem(1, 26, 700, 8, 2, 128, [660])
    k[:, :686].clamp_(-3, 3)
    direction = torch.randn(128, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).sign().bfloat16()
    q[:] = direction
    k[:, position] = sign * 32 * direction
    out, lse = sk.tree_attention(q, k, v, lens, softmax_scale=2.5, return_lse=True, backend="cuda")
    if sign > 0:
        assert torch.equal(out, v[:, position, None].repeat_interleave(4, 2).expand_as(out))
        assert torch.allclose(lse, torch.full_like(lse, 2.5 * 32 * 128), rtol=1e-6)
    else:
        check((out, lse), q, k, v, lens, None, softmax_scale=2.5)


# Nodes, and a context so short that it and the tree share a tile that a run begins with, and the tree reaches into the
# next: 72 columns a warpgroup with padding, rows on the 64-row side with padding, 80 columns (128 positions) with
# padding, the latter two by pairs of CTAs, 80 columns without pairs, and few columns.
STRADDLING = [(26, 50), (48, 100), (60, 100), (31, 50), (4, 62)]


@pytest.mark.parametrize("nodes,short", STRADDLING)
def test_what_other_kernels_left_in_shared_memory(nodes, short, cuda_kernel):
    """Matrix products leave their operands in the shared memory of every SM: no bit may depend on them."""
    q, k, v, lens, words = problem(3, nodes, 4096, 40, 8, 128, [4000, short, 2500])
    patterns = [torch.full((4096, 4096), x, device=DEVICE, dtype=torch.bfloat16) for x in (0.0, float("nan"), -3e38)]
    patterns.append(torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16))
    results = []
    for pattern in patterns:
        pattern @ pattern
        results.append(sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda"))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@gpu_backends("tree_attention")
@pytest.mark.parametrize("nodes,short", STRADDLING)
@pytest.mark.parametrize("page_size", [0, 1, 4])
def test_a_thousand_reruns_beside_other_work(page_size, nodes, short, backend):
    """Bitwise the same while another stream keeps the GPU busy; a missing barrier shows here."""
    q, k, v, lens, words = problem(3, nodes, 4096, 40, 8, 128, [4000, short, 2500])
    table = None
    if page_size:
        (k, table), (v, _) = paged(k, page_size), paged(v, page_size)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def run():
        return sk.tree_attention(q, k, v, lens, words, page_table=table, return_lse=True, backend=backend)

    first = run()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(10):
                a @ a
        for out, lse in [run() for _ in range(50)]:
            assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
@pytest.mark.parametrize("nodes", [26, 48])
def test_graph_replays_with_other_lengths_and_pages(nodes, page_size, cuda_kernel):
    q, k, v, lens, words = problem(3, nodes, 4096, 40, 8, 128, [400, 0, 37])
    k, v = k.nan_to_num(), v.nan_to_num()
    (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, backend="cuda")
    with torch.cuda.graph(graph):
        out = sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, backend="cuda")
    for new in ([486, 486, 486], [0, 1, 63], [5, 300, 0], [4000, 2, 1999]):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        table.copy_(table.flip(0))
        graph.replay()
        assert torch.equal(
            out, sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, backend="cuda")
        ), new


# kernel, B, N, S, Hq, Hkv: one pair for all rows, and two of which the second has a CTA without a row tile in the last
# round
PAIRS = [
    ("SM90_ROWS", 1, 32, 3072, 64, 8),
    ("SM90_ROWS", 3, 48, 4096, 40, 8),
    ("SM90_ROWS", 2, 112, 3072, 64, 8),
    ("SM90", 1, 64, 8192, 40, 8),
    ("SM90", 3, 60, 4096, 40, 8),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel,b,n,s,hq,hkv", PAIRS)
def test_pairs_that_load_for_each_other(kernel, b, n, s, hq, hkv, dtype, cuda_kernel):
    """Contexts whose last row tiles see a tile more than the first ones, trees that end within the first row tile, and
    requests without any: right, and bitwise what CTAs give that load for themselves, as with pages of 2 tokens."""
    if backend.architecture(0) >= 90:
        assert chosen(b, n, s, hq, hkv, 128) == kernel
        assert [planned(b, n, s, hq, hkv, 128, size).cluster for size in (0, 16, 2)] == [2, 2, 1]
    for contexts in ([s - n, 128 - n // 2, 0], [1024 - n // 2, 256 - n, 2000], [1280 - n + 1, s - n, 127]):
        q, k, v, lens, words = problem(b, n, s, hq, hkv, 128, contexts[:b], dtype)
        pools = [(paged(k, size), paged(v, size)) for size in (2, 16)]
        for live in ([n, n, n], [5, n, n - 7], [n, 0, 17]):
            kwargs = dict(tree_lens=torch.tensor(live[:b], dtype=torch.int32, device=DEVICE))
            for mask in (words, None):
                got = sk.tree_attention(q, k, v, lens, mask, return_lse=True, backend="cuda", **kwargs)
                check(got, q, k, v, lens, mask, **kwargs)
                for (k_pages, table), (v_pages, _) in pools:
                    same = sk.tree_attention(
                        q, k_pages, v_pages, lens, mask, page_table=table, return_lse=True, backend="cuda", **kwargs
                    )
                    assert torch.equal(same[0], got[0]) and torch.equal(same[1], got[1]), (contexts, live)


def test_an_output_of_odd_strides(cuda_kernel):
    q, k, v, lens, words = problem(2, 9, 200, 6, 2, 64, [150, 64])
    want = sk.tree_attention(q, k, v, lens, words, backend="cuda")
    wide = torch.full((2, 9, 6, 67), 7.0, device=DEVICE, dtype=q.dtype)
    out = wide[..., 1:65]
    assert sk.tree_attention(q, k, v, lens, words, out=out, backend="cuda") is out
    assert torch.equal(out, want) and bool((wide[..., 0] == 7).all()) and bool((wide[..., 65:] == 7).all())


@pytest.mark.parametrize("nodes", [4, 90])
def test_causal_lengths_that_reach_past_the_capacity(nodes, cuda_kernel):
    """The capacity ends inside a tile: what lies between it and the tile's end is seen by nobody."""
    q, k, v, lens, _ = problem(2, nodes, 1000, 40, 8, 128, [1000, 990])
    check(sk.tree_attention(q, k, v, lens, return_lse=True, backend="cuda"), q, k, v, lens, None)


def test_eight_hundred_requests(cuda_kernel):
    """More than fit beside the largest tiles in shared memory."""
    q, k, v, lens, words = problem(800, 26, 72, 8, 1, 128, [i % 46 for i in range(800)])
    check(sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda"), q, k, v, lens, words)


def test_the_architecture_chooses_the_kernel(monkeypatch):
    """On Hopper its own kernel takes what it can, and SPECVLM_CUDA_ARCH=80 gives everything to the other."""
    module, _ = backend.extension()
    own = backend.architecture(0)
    kinds = module.TreeAttentionKernel
    shape = (1, 26, 64, 8, 128, 4096)
    rest = (backend.multiprocessors(0), backend.shared_memory(0))
    plan = module.tree_attention_plan(*shape, 0, own, *rest)
    assert plan.kernel == (kinds.SM90 if own == 90 else kinds.SM80)
    for page_size in (1, 2, 4, 8):
        assert module.tree_attention_plan(*shape, page_size, own, *rest).kernel == plan.kernel
    with pytest.raises(ValueError, match="page_size: expected a power of two, got 3"):
        module.tree_attention_plan(*shape, 3, own, *rest)
    monkeypatch.setattr(_env, "CUDA_ARCH", 80)
    assert backend.architecture(0) == 80
    assert module.tree_attention_plan(*shape, 0, 80, *rest).kernel == kinds.SM80


# B, N, S, Hq, Hkv, D and what the plan makes of it: CTAs of a cluster, columns, row tiles
CLUSTERS = [
    ((7, 4, 1000, 7, 1, 128), (16, 32, 1)),
    ((7, 9, 6144, 7, 1, 64), (16, 64, 1)),
    ((3, 9, 1000, 14, 2, 128), (16, 64, 1)),
    ((15, 4, 500, 7, 1, 64), (8, 32, 1)),
    ((15, 12, 3072, 5, 1, 128), (8, 64, 1)),
    ((2, 26, 1100, 14, 2, 128), (8, 64, 3)),
    ((3, 70, 300, 3, 1, 64), (8, 64, 4)),
]


def needs_clusters():
    if backend.architecture(0) < 90 or backend.multiprocessors(0) < 132:
        pytest.skip("plans clusters on GPUs of compute capability 9.0 with 132 multiprocessors alone")


@pytest.mark.parametrize("shape,plan", CLUSTERS, ids=str)
def test_little_work_is_for_clusters(shape, plan):
    needs_clusters()
    made = planned(*shape)
    assert made.kernel.name == "SM90_CLUSTER"
    assert (made.cluster, made.columns, made.row_tiles) == plan
    assert made.ctas == made.cluster * made.row_tiles * shape[0] * shape[4] and made.workspace_floats == 0
    assert planned(*shape, 8).kernel.name == "SM90_CLUSTER"
    assert planned(*shape, 4).kernel.name != "SM90_CLUSTER"  # pages too small for TMA
    assert planned(shape[0], shape[1], 6145, *shape[3:]).kernel.name != "SM90_CLUSTER"  # tiles that do not fit
    assert planned(16, *shape[1:]).kernel.name != "SM90_CLUSTER"  # more clusters than fit


def test_the_draft_level_is_for_clusters():
    needs_clusters()
    plan = planned(1, 4, 2560, 28, 4, 128)
    assert (plan.kernel.name, plan.cluster, plan.columns, plan.ctas) == ("SM90_CLUSTER", 16, 32, 64)
    assert planned(1, 26, 1024, 28, 4, 128).cluster == 8


@pytest.mark.parametrize("page_size,dtype", [(0, "bfloat16"), (0, "float16"), (8, "bfloat16"), (256, "bfloat16")])
@pytest.mark.parametrize("shape,plan", CLUSTERS, ids=str)
def test_clusters_at_every_length(shape, plan, page_size, dtype):
    """Shares of no tile, of one and of all that fit; trees that end before, at and behind the edges of tiles."""
    b, n, s, hq, hkv, d = shape
    if page_size:
        s = -(-s // page_size) * page_size
    edges = [0, 1, 63 - n, 64 - n, 65 - n, 63, 64, 128 - n, 200, s // 2, s - n - 64, s - n - 1, s - n]
    lens = [max(0, min(x, s - n)) for x in edges]
    tree_lens = torch.tensor([n, n - 1, 1, n, 0, n, n // 2] * 3, dtype=torch.int32, device=DEVICE)[:b]
    for first in range(0, len(lens), b):
        some = (lens[first:] + lens)[:b]
        q, k, v, some, words = problem(b, n, s, hq, hkv, d, some, getattr(torch, dtype), seed=first)
        caches, table = (k, v), None
        if page_size:
            (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
            caches = (k_pages, v_pages)
        for mask, live in [(words, None), (words[0], tree_lens), (None, tree_lens)]:
            kwargs = dict(tree_lens=live, return_lse=True)
            got = sk.tree_attention(q, *caches, some, mask, page_table=table, backend="cuda", **kwargs)
            check(got, q, k, v, some, mask, tree_lens=live)


@pytest.mark.parametrize("shape,plan", CLUSTERS, ids=str)
def test_clusters_do_not_depend_on_pages_or_reruns(shape, plan):
    b, n, s, hq, hkv, d = shape
    s = -(-s // 64) * 64
    q, k, v, lens, words = problem(b, n, s, hq, hkv, d, [(s - n) * r // max(b - 1, 1) for r in range(b)])
    first = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    for _ in range(10):
        with torch.cuda.stream(other):
            a @ a
        results = [sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda") for _ in range(50)]
        results.append(
            sk.tree_attention(q, k_pages, v_pages, lens, words, page_table=table, return_lse=True, backend="cuda")
        )
        for out, lse in results:
            assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


@pytest.mark.parametrize("shape,plan", CLUSTERS, ids=str)
def test_clusters_replay_with_other_lengths(shape, plan):
    b, n, s, hq, hkv, d = shape
    q, k, v, lens, words = problem(b, n, s, hq, hkv, d, [0] * b)
    k, v = k.nan_to_num(), v.nan_to_num()
    graph = torch.cuda.CUDAGraph()
    sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")
    with torch.cuda.graph(graph):
        out, lse = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")
    for new in ([s - n] * b, [1] * b, [(s - n) * r // b for r in range(b)], [0] * b):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        want = sk.tree_attention(q, k, v, lens, words, return_lse=True, backend="cuda")
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1]), new
        check((out, lse), q, k, v, lens, words)


@pytest.mark.parametrize("tokens", [300, 3000])
def test_lengths_that_the_launch_before_writes(tokens):
    """A launch that starts while the one before still runs may read old lengths, and has to notice."""
    b, n, s, hq, hkv, d = 1, 4, 2560, 28, 4, 128
    q, k, v, _, words = problem(b, n, s, hq, hkv, d, [0])
    k, v = k.nan_to_num(), v.nan_to_num()
    # num_attention of select_tokens, an int32 of its last lines, differs from one scores to the next
    scores = torch.rand(8, b, tokens, device=DEVICE) ** torch.arange(1, 9, device=DEVICE)[:, None, None]
    run = [sk.select_tokens(x, tokens // 2, backend="cuda").num_attention for x in scores]
    want = [sk.tree_attention(q, k, v, lens.clone(), words, backend="cuda") for lens in run]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = []
        for x in scores:
            lens = sk.select_tokens(x, tokens // 2, backend="cuda").num_attention
            got.append(sk.tree_attention(q, k, v, lens, words, backend="cuda"))
    for _ in range(20):
        graph.replay()
        for one, other in zip(got, want):
            assert torch.equal(one, other)
