"""compact_kv against a copy made row by row in Python."""

import pytest
import torch
from kit import backends, gpu_backends, paged, randint, randn, replayed, rng, transposed_layout, unpaged

import specvlm_kernels as sk


def ascending_path(n: int, length: int, seed: int) -> list[int]:
    picks = torch.randperm(n - 1, generator=rng(seed))[:length] + 1
    return sorted(picks.tolist()) + [-1] * (n - length)


def problem(layers, b, s, h, d, n, device, dtype=torch.float32, seed=0):
    k, v = (randn(layers, b, s, h, d, seed=seed + i, dtype=dtype, device=device) for i in range(2))
    lens = randint(0, s - n + 1, (b,), seed=seed, dtype=torch.int32)
    lengths = [int(randint(0, n, (), seed=seed + r)) for r in range(b)]
    path = torch.tensor([ascending_path(n, length, seed + r) for r, length in enumerate(lengths)], dtype=torch.int32)
    return k, v, lens.to(device), path.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def moved(cache, lens, path, length):
    """The caches [L,B,S,H,D] after the move, row by row from a copy of what was there."""
    want = cache.clone()
    for r in range(len(length)):
        for i in range(int(length[r])):
            want[:, r, int(lens[r]) + 1 + i] = cache[:, r, int(lens[r]) + int(path[r, i])]
    return want


SHAPES = [(1, 1, 8, 1, 64, 1), (3, 2, 90, 2, 64, 26), (2, 3, 70, 3, 16, 65), (4, 1, 199, 1, 128, 128)]


@backends("compact_kv")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacked_layers(shape, dtype, backend, device):
    for seed in range(3):
        k, v, lens, path, length = problem(*shape, device, dtype, seed)
        want_k, want_v = moved(k, lens, path, length), moved(v, lens, path, length)
        want_lens = lens + length + 1
        sk.compact_kv(k, v, lens, path, length, backend=backend)
        assert torch.equal(k, want_k) and torch.equal(v, want_v) and torch.equal(lens, want_lens)


@backends("compact_kv")
def test_lists_of_layers_and_any_strides(backend, device):
    k, v, lens, path, length = problem(*SHAPES[1], device)
    want_k, want_v = moved(k, lens, path, length), moved(v, lens, path, length)
    ks, vs = [transposed_layout(layer) for layer in k], [layer.clone() for layer in v]
    sk.compact_kv(ks, vs, lens, path, length, backend=backend)
    assert torch.equal(torch.stack(ks), want_k) and torch.equal(torch.stack(vs), want_v)


@backends("compact_kv")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("stacked", [True, False])
def test_pages(stacked, page_size, backend, device):
    k, v, lens, path, length = problem(3, 2, 96, 2, 64, 26, device)
    want_k, want_v = moved(k, lens, path, length), moved(v, lens, path, length)
    pages = [[paged(layer, page_size)[0] for layer in cache] for cache in (k, v)]
    table = paged(k[0], page_size)[1]
    spare = pages[0][0].isnan().flatten(1).all(1)
    if stacked:
        pages = [torch.stack(p) for p in pages]
    sk.compact_kv(*pages, lens, path, length, page_table=table, backend=backend)
    for got, want in zip(pages, (want_k, want_v)):
        for layer, want_layer in zip(got, want):
            assert torch.equal(unpaged(layer, table), want_layer)
            assert bool(layer[spare].isnan().all())  # pages of nobody are left alone


@backends("compact_kv")
def test_hostile_values_move_nothing_wrong(backend, device):
    b, _n, s = 6, 5, 12
    rows = [
        # kv_lens, length, path -> rows that move (source, target), kv_lens after
        (4, 3, [3, 2, 4, 1, 1], [(7, 5), (8, 7)], 8),  # path[1] = 2 is in place already
        (4, 9, [-1, 1, 0, 4, 2**31 - 1], [], 9),  # entries not above their place; length clamped to n-1
        (10, 2, [3, 4, 0, 0, 0], [], 12),  # past the capacity
        (-3, 2, [2, 4, 0, 0, 0], [(2, 1), (4, 2)], 3),
        (2**31 - 1, 4, [2, 3, 4, 4, 0], [], 12),
        (0, -7, [2, 3, 4, 0, 0], [], 1),
    ]
    k = randn(2, b, s, 2, 64, device=device)
    v = randn(2, b, s, 2, 64, seed=1, device=device)
    want_k, want_v = k.clone(), v.clone()
    for r, (_, _, _, moves, _) in enumerate(rows):
        for source, target in moves:
            want_k[:, r, target], want_v[:, r, target] = k[:, r, source], v[:, r, source]
    lens, length = (torch.tensor([row[i] for row in rows], dtype=torch.int32, device=device) for i in (0, 1))
    path = torch.tensor([row[2] for row in rows], dtype=torch.int32, device=device)
    sk.compact_kv(k, v, lens, path, length, backend=backend)
    assert lens.tolist() == [row[4] for row in rows]
    assert torch.equal(k, want_k) and torch.equal(v, want_v)


@backends("compact_kv")
def test_hostile_page_tables_stay_inside(backend, device):
    pages = randn(2, 3, 4, 2, 64, device=device)
    table = torch.tensor([[-1, 2**31 - 1]], dtype=torch.int32, device=device)
    lens = torch.tensor([1], dtype=torch.int32, device=device)
    path = torch.tensor([[3, 4, 5, -1, -1, -1]], dtype=torch.int32, device=device)
    length = torch.tensor([3], dtype=torch.int32, device=device)
    sk.compact_kv(pages, pages.clone(), lens, path, length, page_table=table, backend=backend)
    assert bool(pages.isfinite().all()) and lens.tolist() == [5]


def test_bad_arguments():
    caches = torch.zeros(2, 1, 8, 2, 64)
    ints = dict(kv_lens=torch.zeros(1, dtype=torch.int32), path=torch.zeros(1, 3, dtype=torch.int32),
                length=torch.zeros(1, dtype=torch.int32))  # fmt: skip
    ok = dict(k_caches=caches, v_caches=caches.clone(), **ints)
    sk.compact_kv(**ok)
    for name, value, kind in [
        ("k_caches", caches[0], ValueError),
        ("k_caches", [], ValueError),
        ("k_caches", None, TypeError),
        ("k_caches", [caches[0], caches[1, :, :4]], ValueError),
        ("v_caches", caches[:1], ValueError),
        ("v_caches", list(caches[..., :32]), ValueError),
        ("kv_lens", torch.zeros(1, dtype=torch.int64), TypeError),
        ("path", torch.zeros(1, 0, dtype=torch.int32), ValueError),
        ("length", torch.zeros(2, dtype=torch.int32), ValueError),
        ("page_table", torch.zeros(2, 1, dtype=torch.int32), ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.compact_kv(**{**ok, name: value})


@gpu_backends("compact_kv")
@pytest.mark.parametrize("page_size", [None, 16])
def test_eighty_layers_in_a_graph_with_other_paths(page_size, backend):
    k, v, lens, path, length = problem(80, 2, 512, 8, 128, 26, "cuda", torch.bfloat16)
    caches, table = [k, v], None
    if page_size is not None:
        table = paged(k[0], page_size)[1]
        caches = [torch.stack([paged(layer, page_size)[0] for layer in cache]) for cache in (k, v)]
    start = [c.clone() for c in caches]
    lens_start = lens.clone()
    graph, _ = replayed(lambda: sk.compact_kv(*caches, lens, path, length, page_table=table, backend=backend))
    for seed in range(5):
        for cache, before in zip(caches, start):
            cache.copy_(before)
        lens.copy_(lens_start + seed)
        lengths = [seed * 5, 25 - seed]
        path.copy_(torch.tensor([ascending_path(26, n, seed) for n in lengths], dtype=torch.int32))
        length.copy_(torch.tensor(lengths, dtype=torch.int32))
        want = [moved(cache, lens, path, length) for cache in (k, v)]
        want_lens = lens + length + 1
        graph.replay()
        for got, expected in zip(caches, want):
            flat = got if table is None else torch.stack([unpaged(layer, table) for layer in got])
            assert torch.equal(flat, expected)
        assert torch.equal(lens, want_lens)


@pytest.mark.gpu
def test_cuda_counters_survive_many_streams():
    """Launches on several streams at once must not share a counter: kv_lens would be advanced early or never."""
    streams = [torch.cuda.Stream() for _ in range(8)]
    problems = [problem(16, 1, 512, 8, 128, 26, "cuda", torch.bfloat16, seed) for seed in range(8)]
    want = [lens + 50 * (length + 1) for _, _, lens, _, length in problems]
    capacity = 512
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (k, v, lens, path, length) in zip(streams, problems):
            with torch.cuda.stream(stream):
                sk.compact_kv(k, v, lens, path, length, backend="cuda")
    torch.cuda.synchronize()
    for (_, _, lens, _, _), expected in zip(problems, want):
        assert torch.equal(lens, expected.clamp(max=capacity))
