"""Eager calls of the CUDA tier: the second of a kind skips the checks, and nobody can tell. Without a GPU, the
extension is a fake that launches nothing and notes what it was asked to."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import OPS, ancestor_mask, randint, random_tree, words_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import specvlm_kernels as sk
from specvlm_kernels import _env, backend, launches

MODULES = {op: importlib.import_module(f"specvlm_kernels.ops.{op}") for op in OPS}
CLASSES = ["".join(word.capitalize() for word in op.split("_")) for op in OPS]
Launched = tuple[dict[str, Any], tuple[int, ...]]  # sizes, and addresses with the stream and the workspace


class FakeExtension:
    """Classes like TreeAttention, plans and workspaces, as specvlm_kernels._C has them."""

    LogitsType = SimpleNamespace(BFLOAT16="bf16", FLOAT16="fp16", FLOAT32="fp32")

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        for name in CLASSES:
            setattr(self, name, self._prepared)
        plan = SimpleNamespace(workspace_floats=8, workspace_words=0, workspace_entries=8)
        for op in OPS:
            setattr(self, f"{op}_plan", lambda *_: plan)
            setattr(self, f"{op}_workspace", lambda *_: 8)

    def _prepared(self, **sizes: Any) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda *addresses: self.launched.append((sizes, addresses)))

    def architectures(self) -> list[str]:
        return ["90a"]

    def shared_memory(self, device: int) -> int:
        return 228 * 1024

    def describer(self, exchange_api: object, types: tuple[type, ...]) -> None:
        return None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeExtension]:
    """The CUDA tier on CPU tensors."""
    extension = FakeExtension()
    caches = [backend.extension, backend.describer, backend._built_architecture, backend.multiprocessors]
    caches += [backend.shared_memory, *(m._plan for m in MODULES.values() if hasattr(m, "_plan"))]
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "specvlm_kernels._C", extension)
    monkeypatch.setattr(backend, "device_missing", lambda name, kind, index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launches, "empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(launches, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launches, "raw_stream", lambda index: 7)
    for op in OPS:
        monkeypatch.setattr(MODULES[op].OP, "launches", {})
    yield extension
    for cache in caches:
        cache.cache_clear()


def arguments(op: str) -> dict[str, Any]:
    """All arguments of a call that the CUDA tier takes, by name."""
    q = torch.rand(2, 5, 4, 64).bfloat16()
    k, v = torch.rand(2, 2, 40, 2, 64).bfloat16()
    lens = torch.tensor([7, 0], dtype=torch.int32)
    tree = {"logits": torch.rand(2, 5, 37), "tokens": randint(0, 37, (2, 5)), "parents": random_tree(5, 0)}
    chosen = {"path": randint(-1, 5, (2, 5), dtype=torch.int32), "length": lens.clone()}
    attention = {"q": q, "k": k, "v": v, "kv_lens": lens, "tree_mask": words_of(ancestor_mask(random_tree(5, 0)))}
    scores = {"q": q, "k": k, "lse": torch.rand(2, 5, 4), "kv_lens": lens, "span_start": 1, "span_len": 6}
    candidates = {"log_probs": -torch.rand(2, 5, 4), "token_ids": randint(0, 37, (2, 5, 4))}
    return {
        "tree_attention": attention
        | {"tree_lens": lens, "softmax_scale": 0.1, "return_lse": True, "out": torch.empty_like(q)},
        "token_scores": scores
        | {"query_mask": torch.rand(2, 5) > 0.5, "weight": 0.5, "softmax_scale": 0.1, "out": torch.zeros(2, 6)},
        "select_tokens": {"scores": torch.rand(2, 37), "keep": 7, "top_p": 0.4, "mask": torch.rand(2, 37) > 0.1},
        "draft_topk": {"logits": torch.rand(2, 5, 37), "k": 3, "temperature": 0.7},
        "expand_tree": candidates | {"root": torch.zeros(2, dtype=torch.int64), "nodes": 7},
        "verify_greedy": tree | {"tree_lens": lens},
        "verify_sample": tree | {"coins": torch.rand(2, 6), "temperature": 0.7, "top_k": 4, "top_p": 0.9},
        "compact_kv": {"k_caches": torch.stack([k, k]), "v_caches": torch.stack([v, v]), "kv_lens": lens} | chosen,
    }[op]


def flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in flat(part)] if isinstance(x, (list, tuple)) else []


def moved(x: Any) -> Any:
    """The same layout elsewhere in memory."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
    return [moved(part) for part in x] if isinstance(x, list) else x


def call(op: str, given: dict[str, Any]) -> Any:
    return getattr(sk, op)(**{"backend": "cuda", **given})


def checked(op: str, given: dict[str, Any]) -> Any:
    """A call as if it were the first."""
    kept = dict(MODULES[op].OP.launches)
    MODULES[op].OP.launches.clear()
    try:
        return call(op, given)
    finally:
        MODULES[op].OP.launches.clear()
        MODULES[op].OP.launches.update(kept)


def variants(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that differ from `arguments` in one of them, most of them wrong."""
    given = arguments(op)
    for name, x in given.items():
        others: list[Any] = [None, True, "abc", [1, 2], object()]
        if isinstance(x, Tensor):
            others += [x.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.bool)]
            others += [x[None], x[0], x[..., :-1], x[:1], x.to("meta"), x.numpy() if x.dtype != torch.bfloat16 else 0]
            others += [torch.stack([x, x], -1)[..., 0], torch.cat([x, x], -1)[..., : x.shape[-1]], x.to_sparse()]
            others += [[x], [x, x], (x,), list(x), torch.empty(0), torch.nn.Parameter(x, requires_grad=False)]
            bytes_ = torch.zeros(x.numel() * x.element_size() + 32, dtype=torch.uint8)
            others.append(bytes_[x.element_size() :][: x.numel() * x.element_size()].view(x.dtype).view(x.shape))
        else:
            others += [0, 1, 1.0, -1, 2, 2.0, 0.5, 1e9, 10**9, float("nan"), float("inf"), torch.tensor(1), 1 + 0j]
        for i, other in enumerate(others):
            yield f"{name}, {i}", {**given, name: other}
    for name in ("page_table", "out", "mask", "tree_lens", "query_mask", "draft_log_probs", "nodes", "backend"):
        for i, other in enumerate((None, "triton", 3, torch.zeros(2, 3, dtype=torch.int32), torch.rand(2, 5))):
            if name not in given:
                yield f"{name}, {i}", {**given, name: other}


def outcome(run: Any, fake: FakeExtension) -> Any:
    """What a call returns, raises and launches, but for where new tensors lie."""
    fake.launched.clear()
    try:
        returned = flat(run())
    except Exception as error:
        return type(error), str(error)
    layouts = [(type(x), x.shape, x.stride(), x.dtype) for x in returned]
    return layouts, [sizes for sizes, _ in fake.launched], len(fake.launched)


@pytest.mark.parametrize("op", OPS)
def test_the_second_call_launches_the_same_without_checks(op, fake, monkeypatch):
    first = arguments(op)
    checked_outputs = flat(call(op, first))
    again = {name: moved(x) for name, x in first.items()}
    call(op, again)
    expected = fake.launched.pop()
    assert len(MODULES[op].OP.launches) == 1
    checked(op, again)
    monkeypatch.delattr(MODULES[op], "prepare")
    outputs = flat(call(op, again))
    (first_sizes, _), (checked_sizes, checked_addresses), (sizes, addresses) = fake.launched
    assert sizes is first_sizes and sizes == checked_sizes and sizes is expected[0]
    assert len(addresses) == len(checked_addresses) and addresses[0] == 7
    for x in flat(list(again.values())):
        assert addresses.count(x.data_ptr()) == checked_addresses.count(x.data_ptr()) > 0
    for x, y in zip(outputs, checked_outputs, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert addresses.index(x.data_ptr()) >= 2
    given = {x.data_ptr() for x in flat(list(again.values()))}
    assert [a in given for a in addresses[2:]] == [a in given for a in checked_addresses[2:]]
    assert [a for a in addresses[2:] if a in given] == [a for a in checked_addresses[2:] if a in given]


@pytest.mark.parametrize("op", OPS)
def test_other_arguments_are_checked_as_if_nothing_were_kept(op, fake):
    """After a good call, and after each other, every variant returns, raises and launches what it does alone."""
    good, other = arguments(op), {name: moved(x) for name, x in arguments(op).items()}
    wrong = 0
    for name, given in variants(op):
        alone = outcome(lambda given=given: checked(op, given), fake)
        call(op, good)
        for _ in range(2):
            assert outcome(lambda given=given: call(op, given), fake) == alone, name
        wrong += isinstance(alone[0], type)
        call(op, other)
    assert wrong > 20
    assert all(launch.made is not None for launch in MODULES[op].OP.launches.values())


def test_lists_of_layers(fake):
    given = arguments("compact_kv")
    stacked = {**given}
    listed = {**given, "k_caches": list(given["k_caches"]), "v_caches": list(given["v_caches"])}
    mixed = {**given, "v_caches": list(given["v_caches"])}
    for each, caches in ((stacked, 2), (listed, 4), (mixed, 3), (listed, 4), (stacked, 2), (mixed, 3)):
        fake.launched.clear()
        call("compact_kv", each)
        ((sizes, addresses),) = fake.launched
        assert len(addresses) == 6 + caches and sizes["layers"] == 2
        assert addresses[6:] == tuple(x.data_ptr() for x in (*flat([each["k_caches"]]), *flat([each["v_caches"]])))
    with pytest.raises(ValueError, match="k_caches"):
        call("compact_kv", {**given, "k_caches": [given["k_caches"]], "v_caches": [given["v_caches"]]})


def test_given_and_new_outputs(fake):
    given = arguments("expand_tree")
    first = call("expand_tree", given)
    second = call("expand_tree", given)
    assert isinstance(second, type(first)) and first.mask.data_ptr() != second.mask.data_ptr()
    for _ in range(2):
        filled = call("expand_tree", {**given, "out": first})
        assert all(x is y for x, y in zip(filled, first))
    given = arguments("tree_attention")
    for _ in range(2):
        out, lse = call("tree_attention", given)
        assert out is given["out"] and lse.shape == (2, 5, 4)
        new = call("tree_attention", {**given, "out": None, "return_lse": False})
        assert isinstance(new, Tensor) and new.shape == given["q"].shape


def test_calls_that_need_a_copy_are_not_kept(fake):
    rows = torch.rand(5, 2, 40)[..., :37].transpose(0, 1)[:, 1:]
    for _ in range(2):
        call("draft_topk", {"logits": rows, "k": 3})
        call("select_tokens", {"scores": torch.rand(2, 37).half(), "keep": 3})
        odd = torch.empty(2, 5, 4, 67, dtype=torch.bfloat16)[..., 1:65]
        call("tree_attention", {**arguments("tree_attention"), "out": odd})
    assert not any(MODULES[op].OP.launches for op in ("draft_topk", "select_tokens", "tree_attention"))


def test_values_are_checked_on_demand_after_a_good_call(fake, monkeypatch):
    given = arguments("tree_attention")
    call("tree_attention", given)
    given["kv_lens"][0] = 36
    call("tree_attention", given)
    monkeypatch.setattr(_env, "CHECK", True)
    with pytest.raises(ValueError, match="kv_lens: expected values"):
        call("tree_attention", given)


def test_modes_and_subclasses_see_every_call(fake):
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    given = arguments("verify_greedy")
    call("verify_greedy", given)
    with Seen():
        call("verify_greedy", given)
    assert "aten.empty.memory_format" in names

    class Subclass(Tensor):
        pass

    kept = len(MODULES["verify_greedy"].OP.launches)
    for _ in range(2):
        call("verify_greedy", {**given, "logits": given["logits"].as_subclass(Subclass)})
    assert len(MODULES["verify_greedy"].OP.launches) == kept


def test_what_is_kept_is_bounded(fake, monkeypatch):
    monkeypatch.setattr(backend, "MOST_LAUNCHES", 3)
    for keep in range(1, 9):
        call("select_tokens", {"scores": torch.rand(1, 37), "keep": keep})
        assert 1 <= len(MODULES["select_tokens"].OP.launches) <= 3


def test_several_threads(fake):
    """Every thread's own tensors reach the launch, whoever came first."""
    wrong = []

    def run() -> None:
        for _ in range(100):
            logits = torch.rand(2, 3, 37)
            log_probs, ids = call("draft_topk", {"logits": logits, "k": 3})
            wanted = (logits.data_ptr(), log_probs.data_ptr(), ids.data_ptr())
            if not any(addresses[2:] == wanted for _, addresses in list(fake.launched)):
                wrong.append(wanted)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_the_extension_describes_as_python_does():
    """Different or equal by one are so by the other; what one leaves to the checks, so does the other."""
    x = torch.zeros(4, 6, 8, device="cuda")
    tensors = [x, x.clone(), x[:2], x[:, :3], x[:, ::2], x.transpose(0, 1), x.flatten(), x[0], x[:1], x.cpu()]
    tensors += [
        torch.zeros(193, device="cuda")[1:].view(4, 6, 8),
        x.as_strided((1, 6, 8), (1, 8, 1)),
        torch.nn.Parameter(x),
        None,
    ]
    tensors += [x.to(dtype) for dtype in (torch.int32, torch.int64, torch.float64, torch.bfloat16, torch.float16)]
    tensors += [x.bool(), x.byte(), x[:0], torch.zeros((), device="cuda")]
    fast = backend.extension()[0].describer(getattr(Tensor, "__dlpack_c_exchange_api__", None), launches.PLAIN_TENSORS)
    if fast is None:
        pytest.skip("torch has no DLPack exchange API")
    ours, theirs = ([describe((t, x), (t,)) for t in tensors] for describe in (launches.describe, fast))
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert list(a[1]) == list(b[1])
        for j in range(i):
            assert (a[0] == ours[j][0]) == (b[0] == theirs[j][0]), (i, j)
    for odd in (1, "abc", x.to_sparse(), x.cpu().numpy(), [x]):
        assert launches.describe((odd,), ()) is None and fast((odd,), ()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["draft_topk", "verify_greedy", "verify_sample", "select_tokens", "expand_tree"])
def test_kept_launches_in_graphs_and_on_other_streams(op):
    given = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments(op).items()}
    want = [x.clone() for x in flat(checked(op, given))]
    call(op, given)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = flat(call(op, given))
        stream.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flat(call(op, given))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
