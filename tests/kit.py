"""What the op tests share: backends to run on, guarded outputs, layouts, the tolerance rule."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

OPS = (
    "tree_attention",
    "token_scores",
    "select_tokens",
    "draft_topk",
    "expand_tree",
    "verify_greedy",
    "verify_sample",
    "compact_kv",
)
# Kernels still to come. tests/test_rooms.py holds this against the code: entries only ever go.
TO_COME: dict[str, set[str]] = {
    "cuda": set(),
    "triton": set(),
}
# What a kernel may say that it cannot run; a test that meets one of these is skipped with that reason.
KNOWN_LIMITS = (
    "the kernel takes bf16 and fp16, got torch.float32",
    "D must be 64 or 128",
)
# Ops with a kernel for Hopper and another for everything else: both are run, on a GPU that has both.
TWO_CUDA_KERNELS = ("tree_attention", "token_scores", "select_tokens")


def backends(op: str) -> pytest.MarkDecorator:
    """Parametrises (backend, device): torch and Triton's interpreter on the CPU, everything on the GPU."""
    params = [pytest.param("torch", "cpu", id="torch-cpu"), pytest.param("torch", "cuda", id="torch-cuda")]
    if op not in TO_COME["triton"]:
        if not torch.cuda.is_available():
            params.append(pytest.param("triton", "cpu", id="triton-interpreter"))
        params.append(pytest.param("triton", "cuda", id="triton-cuda"))
    for i, param in enumerate(params):
        if param.values[1] == "cuda":
            params[i] = pytest.param(*param.values, id=param.id, marks=pytest.mark.gpu)
    params += [pytest.param("cuda", "cuda", id=name, marks=marks) for name, marks in _cuda_kernels(op)]
    return pytest.mark.parametrize("backend,device", params)


def gpu_backends(op: str) -> pytest.MarkDecorator:
    """Parametrises the GPU kernels of an op."""
    params = [] if op in TO_COME["triton"] else [pytest.param("triton", id="triton", marks=pytest.mark.gpu)]
    params += [pytest.param("cuda", id=name, marks=marks) for name, marks in _cuda_kernels(op)]
    return pytest.mark.parametrize("backend", params)


def _cuda_kernels(op: str) -> list[tuple[str, list[pytest.MarkDecorator]]]:
    """The device's own kernel, and that of sm_80 where it is another one (conftest.py acts on the mark)."""
    if op in TO_COME["cuda"]:
        return []
    own, sm80 = ("cuda", [pytest.mark.gpu]), ("cuda-sm80", [pytest.mark.gpu, pytest.mark.cuda_arch(80)])
    return [own, sm80] if op in TWO_CUDA_KERNELS else [own]


def needs_gpu_memory(gib: int) -> pytest.MarkDecorator:
    """Skips a test on a GPU with less memory."""
    have = torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0
    return pytest.mark.skipif(0 < have < gib, reason=f"needs a GPU with {gib} GiB, this one has {have}")


def working_dtype(backend: str) -> torch.dtype:
    """What to test a backend's structure in: float32 where it takes it."""
    return torch.bfloat16 if backend == "cuda" else torch.float32


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=rng(seed)).to(device, dtype)


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, generator=rng(seed)).to(dtype)


def random_tree(n: int, seed: int) -> Tensor:
    """int32 [n]: parents of a random tree, every parent below its child."""
    g = rng(seed)
    parents = [-1] + [int(torch.randint(0, i, (), generator=g)) for i in range(1, n)]
    return torch.tensor(parents, dtype=torch.int32)


def ancestor_mask(parents: Tensor) -> Tensor:
    """bool [n,n] by walking up from every node."""
    n = len(parents)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        j = i
        while j >= 0:
            mask[i, j] = True
            j = int(parents[j])
    return mask


def words_of(mask: Tensor) -> Tensor:
    """int64 [...,n,ceil(n/64)] bit by bit, in Python integers."""
    n = mask.shape[-1]
    flat = mask.reshape(-1, n).tolist()
    rows = []
    for row in flat:
        words = [sum(1 << (j - w) for j in range(w, min(w + 64, n)) if row[j]) for w in range(0, n, 64)]
        rows.append([word - (1 << 64) if word >= 1 << 63 else word for word in words])
    return torch.tensor(rows, dtype=torch.int64).reshape(*mask.shape[:-1], -1)


class Guarded:
    """A poisoned output between canaries."""

    MARGIN = 64

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, poison: float):
        count = 1
        for size in shape:
            count *= size
        self._canary = 123
        self._buffer = torch.full((count + 2 * self.MARGIN,), self._canary, dtype=dtype, device=device)
        self.tensor = self._buffer[self.MARGIN : self.MARGIN + count].view(shape)
        self.tensor.fill_(poison)

    def check(self) -> Tensor:
        """The output, once the canaries are seen to be alive."""
        edges = torch.cat([self._buffer[: self.MARGIN], self._buffer[-self.MARGIN :]])
        assert bool((edges == self._canary).all()), "written outside the output"
        return self.tensor


def with_both_poisons(run: Callable[[float, int], list[Guarded]]) -> list[Tensor]:
    """Runs with two poisons (float, int); outputs must be the same: every element was written, none was read."""
    first = [g.check().clone() for g in run(float("nan"), -7)]
    second = [g.check() for g in run(1e4, 1 << 20)]
    for a, b in zip(first, second):
        assert torch.equal(a.nan_to_num(nan=5e5), b.nan_to_num(nan=5e5)), "an output element was not written"
    return first


def assert_close_enough(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The tolerance rule: error against float64 at most twice that of plain PyTorch, plus one rounding."""
    assert got.shape == exact.shape, (got.shape, exact.shape)
    got, plain, exact = got.cpu(), plain.cpu(), exact.cpu()
    infinite = torch.isinf(exact)
    assert torch.equal(torch.isinf(got), infinite), "infinities differ"
    exact_finite = torch.where(infinite, 0, exact)
    error = torch.where(infinite, 0, got.double() - exact_finite).abs().max()
    allowed = 2 * torch.where(infinite, 0, plain.double() - exact_finite).abs().max()
    rounding = torch.finfo(got.dtype).eps * exact_finite.abs().max()
    assert bool(error <= allowed + rounding), f"error {error:.3g}, allowed {allowed:.3g} + {rounding:.3g}"


def paged(cache: Tensor, page_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A cache [B,S,H,D] as shuffled pages and its page table; S must be a multiple of page_size."""
    b, s, h, d = cache.shape
    per = s // page_size
    order = torch.randperm(b * per + 3, generator=rng(seed))[: b * per]
    pages = torch.full((b * per + 3, page_size, h, d), float("nan"), dtype=cache.dtype)
    pages[order] = cache.cpu().reshape(b * per, page_size, h, d)
    return pages.to(cache.device), order.reshape(b, per).to(cache.device, torch.int32)


def unpaged(pages: Tensor, table: Tensor) -> Tensor:
    return pages[table.long()].flatten(1, 2)


def transposed_layout(x: Tensor) -> Tensor:
    """The same [B,S,H,D] values over [B,H,S,D] memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def bitwise_equal_reruns(run: Callable[[], Any], times: int = 5) -> None:
    first = run()
    for _ in range(times):
        for a, b in zip(first, run()):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "not bitwise the same on every run"


def replayed(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures run() after a warm-up; returns the graph and what run() returned inside the capture."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def die(seed: int) -> Callable[[int, int], int]:
    """Throws numbers from low to high, both included."""
    choose = rng(seed)
    return lambda low, high: int(torch.randint(low, high + 1, (), generator=choose))


def many_rows() -> int:
    """Rows that a comparison of many with the reference takes: SPECVLM_TEST_ROWS, or 20,000."""
    return int(os.environ.get("SPECVLM_TEST_ROWS", "20000"))


def hard_random_rows(b: int, v: int, g: torch.Generator) -> torch.Tensor:
    """float32 [b,v] on the generator's device, rows of many kinds: ties, subnormals, any bits, sorted, one giant."""
    uniform, normal = (f((b, v), generator=g, device=g.device) for f in (torch.rand, torch.randn))
    bits = torch.randint(-(1 << 31), 1 << 31, (b, v), generator=g, device=g.device)
    kinds = [
        torch.exp(1.5 * normal) / v,
        torch.softmax(5 * normal, -1),
        normal,
        uniform.bfloat16().float(),
        (uniform * 3).floor(),
        (uniform < 0.01).float() * normal,
        bits.to(torch.int32).view(torch.float32),
        (bits & 0x3FFFFF).to(torch.int32).view(torch.float32),  # subnormal
        torch.exp2(60 * uniform - 30),
        torch.where(uniform < 1 / v, 1e30, normal.abs()),
        torch.zeros_like(uniform),
    ]
    kind = torch.randint(0, len(kinds), (b, 1), generator=g, device=g.device)
    scores = kinds[0]
    for i in range(1, len(kinds)):
        scores = torch.where(kind == i, kinds[i], scores)
    order = torch.randint(0, 8, (b, 1), generator=g, device=g.device)
    ascending = scores.sort(-1).values
    return torch.where(order == 0, ascending, torch.where(order == 1, ascending.flip(-1), scores))
