"""Every op under torch.compile(fullgraph=True) and torch.library.opcheck."""

import pytest
import torch
from kit import OPS, ancestor_mask, randint, randn, random_tree, words_of

import specvlm_kernels as sk
from specvlm_kernels.backend import OPS as REGISTERED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def example(op: str, device: str) -> tuple[tuple, dict, tuple[int, ...]]:
    """(args, kwargs, indices of the args that the op mutates) of a small call."""
    q, k, v = (randn(2, n, h, 64, seed=i, device=device) for i, (n, h) in enumerate([(5, 4), (40, 2), (40, 2)]))
    lens = torch.tensor([7, 0], dtype=torch.int32, device=device)
    words = words_of(ancestor_mask(random_tree(5, 0))).to(device)
    logits, tokens = randn(2, 5, 37, device=device), randint(0, 37, (2, 5)).to(device)
    parents = random_tree(5, 0).to(device)
    path = torch.tensor([[2, 4, -1, -1, -1], [-1] * 5], dtype=torch.int32, device=device)
    length = torch.tensor([2, 0], dtype=torch.int32, device=device)
    return {
        "tree_attention": ((q, k, v, lens, words), {"return_lse": True}, ()),
        "token_scores": ((q, k, torch.full((2, 5, 4), 5.0, device=device), lens, 1, 6), {"weight": 0.5}, ()),
        "select_tokens": ((randn(2, 37, device=device), 7), {"top_p": 0.4}, ()),
        "draft_topk": ((logits, 3), {}, ()),
        "expand_tree": ((-logits[..., :4].abs(), randint(0, 37, (2, 5, 4)).to(device), lens.long(), 7), {}, ()),
        "verify_greedy": ((logits, tokens, parents), {}, ()),
        "verify_sample": ((logits, tokens, parents, torch.rand(2, 6, device=device)), {"temperature": 0.7}, ()),
        "compact_kv": (([k.clone(), k.clone()], [v.clone(), v.clone()], lens.clone(), path, length), {}, (0, 1, 2)),
    }[op]


def flat(x) -> list[torch.Tensor]:
    if x is None:
        return []
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in flat(part)]


def clone(x):
    return [t.clone() for t in x] if isinstance(x, list) else x.clone() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op, device):
    args, kwargs, mutated = example(op, device)
    function = getattr(sk, op)
    eager_args, compiled_args = [clone(a) for a in args], [clone(a) for a in args]
    eager = flat(function(*eager_args, **kwargs)) + flat([eager_args[i] for i in mutated])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*inputs):
        return function(*inputs, **kwargs)

    compiled = flat(run(*compiled_args)) + flat([compiled_args[i] for i in mutated])
    assert len(eager) == len(compiled) > 0
    for a, b in zip(eager, compiled):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    module = __import__(f"specvlm_kernels.ops.{op}", fromlist=["prepare"])
    args, kwargs, _ = example(op, device)
    call = module.prepare(*args, **{k: v for k, v in kwargs.items() if k != "return_lse"})
    b = 2
    outputs = {
        "tree_attention": [torch.empty(b, 5, 4, 64, device=device), torch.empty(b, 5, 4, device=device)],
        "token_scores": [torch.zeros(b, 6, device=device)],
        "select_tokens": [
            torch.zeros(b, 7, dtype=torch.int64, device=device),
            torch.zeros(b, dtype=torch.int32, device=device),
        ],
        "draft_topk": [
            torch.zeros(10, 3, device=device),
            torch.zeros(10, 3, dtype=torch.int64, device=device),
        ],
        "expand_tree": flat(module.empty_expansion(args[0], 7)) if op == "expand_tree" else [],
        "verify_greedy": flat(module.empty_verdict(args[1])) if op == "verify_greedy" else [],
        "verify_sample": flat(module.empty_verdict(args[1])) if op == "verify_sample" else [],
        "compact_kv": [],
    }[op]
    torch.library.opcheck(getattr(torch.ops.specvlm, op).default, (*call, *outputs, None))


@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_choice_and_the_reasons(op):
    args, kwargs, _ = example(op, "cpu")
    text = sk.explain(op, *args, **kwargs)
    assert text == sk.explain(getattr(sk, op), *args, **kwargs)
    assert text.splitlines()[0] == f"{op}: torch runs this call"
    assert "  cuda: " in text and "  triton: " in text and ("on cpu" in text or "no cuda kernel yet" in text)
    with pytest.raises(NotImplementedError, match="cuda"):
        getattr(sk, op)(*args, **kwargs, backend="cuda")
    with pytest.raises(ValueError, match="op"):
        sk.explain("softmax")


def test_every_op_is_registered():
    assert tuple(REGISTERED) == OPS or set(REGISTERED) == set(OPS)


def test_device_values_are_checked_on_demand(monkeypatch):
    from specvlm_kernels import _env

    (q, k, v, lens, words), _, _ = example("tree_attention", "cpu")
    lens[0] = 36
    sk.tree_attention(q, k, v, lens, words)
    monkeypatch.setattr(_env, "CHECK", True)
    with pytest.raises(ValueError, match=r"kv_lens: expected values in 0\.\.35, got 0\.\.36"):
        sk.tree_attention(q, k, v, lens, words)
    with pytest.raises(ValueError, match="mask"):
        sk.select_tokens(torch.rand(1, 4), 3, mask=torch.tensor([[True, True, False, False]]))
