"""draft_topk against a sort of Python tuples and a float64 log-softmax."""

import math

import pytest
import torch
from kit import (
    Guarded,
    assert_close_enough,
    backends,
    bitwise_equal_reruns,
    die,
    gpu_backends,
    hard_random_rows,
    many_rows,
    randint,
    randn,
    replayed,
    with_both_poisons,
)

import specvlm_kernels as sk
from specvlm_kernels.ops import draft_topk as module


def slow_ids(row: list[float], k: int) -> list[int]:
    value = [-math.inf if math.isnan(x) else x for x in row]
    return sorted(range(len(row)), key=lambda i: (-value[i], i))[:k]


@backends("draft_topk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows,vocab,k", [(1, 1, 1), (3, 37, 37), (4, 199, 10), (2, 1000, 64)])
def test_ids_and_log_probs(rows, vocab, k, dtype, backend, device):
    logits = (randn(rows, vocab, seed=rows) * 4).to(device, dtype)
    log_probs, ids = sk.draft_topk(logits, k, temperature=0.7, backend=backend)
    assert log_probs.dtype == torch.float32 and ids.dtype == torch.int64
    assert ids.tolist() == [slow_ids(row, k) for row in logits.float().tolist()]
    exact = torch.log_softmax(logits.double().cpu() / 0.7, -1).gather(1, ids.cpu())
    plain = torch.log_softmax(logits.float().cpu() / 0.7, -1).gather(1, ids.cpu())
    assert_close_enough(log_probs, exact, plain)


@backends("draft_topk")
def test_ties_go_to_the_lower_id_and_nan_is_last(backend, device):
    logits = torch.tensor([[2.0, 5.0, 5.0, float("nan"), 5.0, -1.0, 2.0]], device=device)
    log_probs, ids = sk.draft_topk(logits, 7, backend=backend)
    assert ids.tolist() == [[1, 2, 4, 0, 6, 5, 3]]
    assert float(log_probs[0, 6]) == float("-inf")
    assert abs(float(log_probs.exp().sum()) - 1) < 1e-6
    same = torch.zeros(2, 300, device=device, dtype=torch.bfloat16)
    assert sk.draft_topk(same, 20, backend=backend)[1].tolist() == [list(range(20))] * 2


HARD_ROWS = {
    "all equal": lambda v: torch.full((v,), 1.5),
    "ascending": lambda v: torch.linspace(-20, 20, v),
    "descending": lambda v: torch.linspace(20, -20, v),
    "runs of equals": lambda v: (torch.arange(v) // 300 % 7).float(),
    "five values": lambda v: randint(-2, 3, (v,), seed=1).float(),
    "zeros of both signs": lambda v: torch.where(randn(v, seed=2) > 0, 0.0, -0.0),
    "denormals": lambda v: randn(v, seed=3) * 1e-39,
    "far from 0": lambda v: randn(v, seed=4) + 1000,
    "half NaN": lambda v: torch.where(randn(v, seed=5) > 0, float("nan"), randn(v, seed=6)),
    "all NaN": lambda v: torch.full((v,), float("nan")),
    "mostly -inf": lambda v: torch.where(randn(v, seed=7) < 2.5, float("-inf"), randn(v, seed=8)),
    "all -inf": lambda v: torch.full((v,), float("-inf")),
    "some inf": lambda v: torch.where(randn(v, seed=9) > 2.5, float("inf"), randn(v, seed=10)),
}


def check_hard_rows(vocab, k, backend, device, dtype, pad=0):
    """All of them in one call; with `pad`, rows start between the 16-byte boundaries."""
    rows = torch.stack([make(vocab) for make in HARD_ROWS.values()]).to(dtype)
    held = torch.full((len(rows), vocab + pad), float("nan"), dtype=dtype, device=device)
    held[:, pad:] = rows.to(device)
    log_probs, ids = sk.draft_topk(held[:, pad:], k, temperature=0.7, backend=backend)
    want, want_ids = sk.reference.draft_topk(rows.double(), k, temperature=0.7)
    plain, _ = sk.reference.draft_topk(rows.float(), k, temperature=0.7)
    for r, name in enumerate(HARD_ROWS):
        if name == "denormals" and (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
            continue  # Triton's interpreter does not convert them exactly
        assert torch.equal(ids[r].cpu(), want_ids[r]), name
        known = ~want[r].isnan()
        assert torch.equal(log_probs[r].cpu().isnan(), ~known), name
        if known.any():
            assert_close_enough(log_probs[r].cpu()[known], want[r][known], plain[r][known])


@backends("draft_topk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hard_rows(dtype, backend, device):
    check_hard_rows(2500, 20, backend, device, dtype)


@gpu_backends("draft_topk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "vocab,k,pad", [(152064, 10, 0), (152064, 64, 0), (33333, 17, 3), (2049, 16, 1), (2**20, 64, 1)]
)
def test_hard_rows_of_real_sizes(vocab, k, pad, dtype, backend):
    check_hard_rows(vocab, k, backend, "cuda", dtype, pad)


@backends("draft_topk")
@pytest.mark.parametrize("wide,vocab", [(250, 199), (256, 200)])
def test_leading_dims_and_slices_of_the_vocabulary(wide, vocab, backend, device):
    part = randn(2, 3, wide, device=device)[..., :vocab]
    log_probs, ids = sk.draft_topk(part, 5, backend=backend)
    assert ids.shape == log_probs.shape == (2, 3, 5)
    want = sk.draft_topk(part.contiguous(), 5, backend=backend)
    assert torch.equal(ids, want[1])
    if (backend, vocab) == ("cuda", 199) or (backend, device) == ("triton", "cuda"):
        # The normaliser's sum may round differently: CUDA's vectors lie at multiples of 16 bytes wherever a row starts,
        # and Triton compiles a kernel of its own, with other lanes, for strides that 16 divides.
        assert torch.allclose(log_probs, want[0], rtol=1e-6, atol=0)
    else:
        assert torch.equal(log_probs, want[0])


@backends("draft_topk")
def test_every_output_is_written_and_reruns_are_equal(backend, device):
    logits = randn(4, 199, device=device)
    bitwise_equal_reruns(lambda: sk.draft_topk(logits, 10, backend=backend))

    def run(poison, int_poison):
        log_probs = Guarded((4, 10), torch.float32, device, poison)
        ids = Guarded((4, 10), torch.int64, device, int_poison)
        module._run(logits, 10, 1.0, log_probs.tensor, ids.tensor, backend)
        return [log_probs, ids]

    with_both_poisons(run)


@gpu_backends("draft_topk")
@pytest.mark.parametrize("rows,vocab,k", [(1, 152064, 10), (26, 152064, 10), (5, 9001, 64)])
def test_many_ctas_write_every_output_and_rerun_bitwise(rows, vocab, k, backend):
    logits = randn(rows, vocab, dtype=torch.bfloat16, device="cuda") * 3
    bitwise_equal_reruns(lambda: sk.draft_topk(logits, k, temperature=0.8, backend=backend), times=50)

    def run(poison, int_poison):
        log_probs = Guarded((rows, k), torch.float32, "cuda", poison)
        ids = Guarded((rows, k), torch.int64, "cuda", int_poison)
        module._run(logits, k, 0.8, log_probs.tensor, ids.tensor, backend)
        return [log_probs, ids]

    with_both_poisons(run)


def test_bad_arguments():
    ok = dict(logits=torch.zeros(2, 9), k=3)
    for name, value, kind in [
        ("logits", [1.0], TypeError),
        ("logits", torch.zeros(()), ValueError),
        ("logits", torch.zeros(2, 9, dtype=torch.int64), TypeError),
        ("k", 0, ValueError),
        ("k", 10, ValueError),
        ("k", True, TypeError),
        ("temperature", 0.0, ValueError),
        ("temperature", -1.0, ValueError),
    ]:
        with pytest.raises(kind, match=name):
            sk.draft_topk(**{**ok, name: value})
    assert sk.draft_topk(torch.zeros(0, 9), 3)[1].shape == (0, 3)


@gpu_backends("draft_topk")
@pytest.mark.parametrize("rows", [1, 4, 26])
def test_real_sizes(rows, backend):
    logits = randn(rows, 152064, dtype=torch.bfloat16, device="cuda") * 3
    log_probs, ids = sk.draft_topk(logits, 10, backend=backend)
    want_log_probs, want_ids = sk.reference.draft_topk(logits.double(), 10)
    assert torch.equal(ids, want_ids)
    assert float((log_probs - want_log_probs).abs().max()) < 1e-4


@gpu_backends("draft_topk")
def test_graph_replays_with_other_logits(backend):
    logits = randn(4, 152064, dtype=torch.bfloat16, device="cuda")
    graph, got = replayed(lambda: sk.draft_topk(logits, 10, backend=backend))
    for seed in (1, 2, 3):
        logits.copy_(torch.zeros_like(logits) if seed == 2 else randn(4, 152064, seed=seed))
        graph.replay()
        want, want_ids = sk.reference.draft_topk(logits.double(), 10)
        assert torch.equal(got[1], want_ids)
        assert float((got[0] - want).abs().max()) < 1e-4


@gpu_backends("draft_topk")
def test_streams_do_not_disturb_each_other(backend):
    """Launches in flight together count their CTAs' arrivals apart."""
    streams = [torch.cuda.Stream() for _ in range(6)]
    logits = [randn(7, 40011, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in range(6)]
    want = [sk.reference.draft_topk(x, 10)[1] for x in logits]
    torch.cuda.synchronize()
    for _ in range(30):
        got = []
        for stream, x in zip(streams, logits):
            with torch.cuda.stream(stream):
                got.append(sk.draft_topk(x, 10, backend=backend)[1])
        torch.cuda.synchronize()
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_the_cuda_kernel_says_what_it_cannot_take():
    logits = torch.zeros(1, 199, device="cuda")
    for call, reason in [((logits.double(), 3), "float64"), ((logits, 65), "k=65")]:
        assert reason in sk.explain("draft_topk", *call)
        with pytest.raises(sk.BackendUnavailableError, match=reason):
            sk.draft_topk(*call, backend="cuda")


def compare_random_rows(wanted: int, backend: str, device: str) -> None:
    """Ids of rows of many kinds, equal to the reference's."""
    done, turn, g, number = 0, 0, torch.Generator(device).manual_seed(5), die(5)

    while done < wanted:
        # mostly short rows, for their number; among them rows of several tiles
        b, vocab = [(4096, number(1, 300)), (4096, number(1, 64)), (number(1, 8), number(8193, 150_000))][turn % 3]
        turn += 1
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number(0, 2)]
        rows, k = hard_random_rows(b, vocab, g).to(dtype), number(1, min(64, vocab))
        _, ids = sk.draft_topk(rows, k, backend=backend)
        _, want = sk.reference.draft_topk(rows.float(), k)
        assert torch.equal(ids, want), f"b={b}, vocab={vocab}, k={k}, {dtype}, turn={turn}"
        done += b


@pytest.mark.slow
@gpu_backends("draft_topk")
def test_many_random_rows(backend):
    """SPECVLM_TEST_ROWS=1000000 compares that many with the reference; about 20,000 unless it is set."""
    compare_random_rows(many_rows(), backend, "cuda")


def test_the_comparison_of_random_rows():
    compare_random_rows(20_000, "torch", "cpu")
