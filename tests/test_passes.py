"""Lean passes: kernel by kernel against float64, pass by pass against transformers' own modules, and in the loop."""

import copy
import functools
import re
import shutil

import kit
import pytest
import torch
from models import greedy, llava, llava_inputs, qwen, qwen_inputs
from recorder import recorded_graphs

import specvlm_kernels as sk
from specvlm_kernels.integrations.transformers import wrap
from specvlm_kernels.passes import ops
from specvlm_kernels.passes.lean import merge

FAMILIES = {"qwen": (qwen, qwen_inputs), "llava": (llava, llava_inputs)}
INTERPRETER = [] if torch.cuda.is_available() else [torch.float32, torch.float16]
WHERE = pytest.mark.parametrize(
    "device,dtype",
    [
        *(pytest.param("cpu", dtype, id=f"interpreter-{dtype}") for dtype in INTERPRETER),
        *(
            pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ],
)
ROWS_AND_WIDTHS = pytest.mark.parametrize("rows,width", [(1, 64), (3, 200), (26, 1), (5, 1537)])


@pytest.fixture(scope="module")
def triton_ops():
    if torch.cuda.is_available():
        return ops.layer_ops("fused-gemm", torch.device("cuda"))
    from specvlm_kernels.triton import decoder_layer, skinny_gemm

    kernels = decoder_layer.add_rms_norm, decoder_layer.rope_to_cache, decoder_layer.silu_mul
    return ops.LayerOps(*kernels, skinny_gemm.linear)


def strided(x):
    """The same values in rows that are further apart, with NaN between."""
    wide = torch.full((len(x), x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@WHERE
@ROWS_AND_WIDTHS
def test_add_rms_norm(triton_ops, device, dtype, rows, width):
    x, residual = (kit.randn(rows, width, seed=s, dtype=dtype, device=device) for s in (1, 2))
    weight = kit.randn(width, seed=3, dtype=dtype, device=device)
    before = x.clone(), residual.clone()
    normed, total = triton_ops.add_rms_norm(strided(x), strided(residual), weight, 1e-6)
    plain, plain_total = ops.add_rms_norm(x, residual, weight, 1e-6)
    exact, _ = ops.add_rms_norm(plain_total.double(), torch.zeros_like(x).double(), weight.double(), 1e-6)
    kit.assert_close_enough(normed, exact, plain)
    assert torch.equal(total, plain_total)  # the sum is rounded once: the same to the bit
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@WHERE
@ROWS_AND_WIDTHS
def test_silu_mul(triton_ops, device, dtype, rows, width):
    gate_up = 3 * kit.randn(rows, 2 * width, dtype=dtype, device=device)
    got, plain = triton_ops.silu_mul(strided(gate_up)), ops.silu_mul(gate_up)
    kit.assert_close_enough(got, ops.silu_mul(gate_up.double()), plain)


@WHERE
@pytest.mark.parametrize("rows,q_heads,kv_heads,d", [(1, 4, 2, 64), (5, 7, 1, 128), (26, 2, 2, 16), (3, 3, 1, 80)])
def test_rope_to_cache(triton_ops, device, dtype, rows, q_heads, kv_heads, d):
    size = 40
    qkv = kit.randn(rows, (q_heads + 2 * kv_heads) * d, dtype=dtype, device=device)
    angles = 1000 * kit.randn(rows, d // 2, seed=1, dtype=torch.float64, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = (torch.randperm(size, generator=kit.rng(2))[:rows]).to(device)

    def run(function, qkv, cos, sin):
        filler = kit.randn(size, 2 * kv_heads, d, seed=5, dtype=torch.float32, device=device).to(qkv.dtype)
        keys, values = filler[:, :kv_heads], filler[:, kv_heads:].clone()
        queries = torch.full((rows, q_heads, d), float("nan"), dtype=qkv.dtype, device=device)
        function(qkv, cos, sin, queries, keys, values, slots)
        return queries, keys, values

    got = run(triton_ops.rope_to_cache, strided(qkv), cos, sin)
    plain = run(ops.rope_to_cache, qkv, cos, sin)
    exact = run(ops.rope_to_cache, qkv.double(), cos.double(), sin.double())
    for a, b, c in zip(got, exact, plain):
        kit.assert_close_enough(a, b, c)
    untouched = torch.ones(size, dtype=torch.bool)
    untouched[slots.cpu()] = False
    for a, b in zip(got[1:], plain[1:]):
        assert torch.equal(a[untouched.to(device)], b[untouched.to(device)])
    assert torch.equal(got[2], plain[2])


def test_the_definition_of_rope_is_transformers():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    qkv, angles = kit.randn(5, 8 * 32), kit.randn(5, 16, seed=1)
    queries, keys, values = torch.empty(5, 4, 32), torch.empty(5, 2, 32), torch.empty(5, 2, 32)
    ops.rope_to_cache(qkv, angles.cos(), angles.sin(), queries, keys, values, torch.arange(5))
    q, k, v = qkv.view(1, 5, 8, 32).transpose(1, 2).split([4, 2, 2], 1)
    both = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    for got, want in ((queries, q), (keys, k), (values, v)):
        assert torch.allclose(got, want[0].transpose(0, 1), atol=1e-6)


@WHERE
@pytest.mark.parametrize("hostile", [-1, 40, 2**31 - 1, -(2**40)])
def test_a_slot_outside_the_cache_writes_nothing(triton_ops, device, dtype, hostile):
    guarded = [kit.Guarded((40, 2, 16), dtype, device, 7.0) for _ in range(2)]
    slots = torch.tensor([hostile], device=device)
    qkv, angle = kit.randn(1, 8 * 16, dtype=dtype, device=device), torch.zeros(1, 8, dtype=dtype, device=device)
    queries = torch.empty(1, 4, 16, dtype=dtype, device=device)
    triton_ops.rope_to_cache(qkv, angle, angle, queries, guarded[0].tensor, guarded[1].tensor, slots)
    assert all(bool((g.check() == 7).all()) for g in guarded)


SHAPES = [  # with a bias or without
    (1, 64, 128, True),
    (26, 200, 96, False),
    (4, 37, 1000, True),
    (32, 130, 512, False),
    (17, 1, 33, True),
    (26, 640, 2048, False),
]


@WHERE
@pytest.mark.parametrize("rows,columns,depth,with_bias", SHAPES)
@pytest.mark.parametrize("splits", [None, 3])
def test_skinny_gemm(triton_ops, monkeypatch, device, dtype, rows, columns, depth, with_bias, splits):
    from specvlm_kernels.triton import skinny_gemm

    x = kit.randn(rows, depth, dtype=dtype, device=device)
    weight = kit.randn(columns, depth, seed=1, dtype=dtype, device=device) / depth**0.5
    bias = kit.randn(columns, seed=2, dtype=dtype, device=device) if with_bias else None
    if splits:
        chosen = skinny_gemm.config(rows, columns, depth, x.element_size(), 8) | {"SPLITS": splits}
        monkeypatch.setattr(skinny_gemm, "config", lambda *_: dict(chosen))
    run = lambda: triton_ops.linear(strided(x), strided(weight), bias)  # noqa: E731
    plain = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(*(t.double() if t is not None else None for t in (x, weight, bias)))
    kit.assert_close_enough(run(), exact, plain)
    kit.bitwise_equal_reruns(lambda: [run()])
    assert not skinny_gemm._counters(x.device).any()


@WHERE
def test_more_rows_than_a_skinny_product_takes(triton_ops, device, dtype):
    x, weight = kit.randn(33, 64, dtype=dtype, device=device), kit.randn(40, 64, seed=1, dtype=dtype, device=device)
    assert torch.equal(triton_ops.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert triton_ops.linear(x[:0], weight).shape == (0, 40)


def test_skinny_gemm_splits_fill_the_device():
    from specvlm_kernels.triton.skinny_gemm import config

    for columns, depth in ((7168, 5120), (5120, 5120), (55_296, 5120), (5120, 27_648), (152_064, 5120)):
        chosen = config(26, columns, depth, 2, 132)
        programs = -(-columns // chosen["BLOCK_N"]) * chosen["SPLITS"]
        assert chosen["ROWS"] == 32 and programs / (-(-programs // 264) * 264) > 0.75  # of the last wave, in use


@pytest.mark.gpu
def test_skinny_gemm_in_a_graph_with_other_contents():
    from specvlm_kernels.triton import skinny_gemm

    x = kit.randn(26, 5120, dtype=torch.bfloat16, device="cuda")
    weight = kit.randn(5120, 5120, seed=1, dtype=torch.bfloat16, device="cuda")
    graph, out = kit.replayed(lambda: skinny_gemm.linear(x, weight))
    for seed in (2, 3):
        x.copy_(kit.randn(26, 5120, seed=seed))
        graph.replay()
        assert torch.equal(out, skinny_gemm.linear(x, weight))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (7, 1)])
def test_a_lean_pass_equals_transformers(family, heads, kv_heads):
    """Chain, tree, a later level of it and chosen rows: logits and cache."""
    make, make_inputs = FAMILIES[family]
    eager = wrap(make(1, heads, kv_heads))
    lean = wrap(copy.deepcopy(eager.model), "fused")
    prompt = eager.embed(make_inputs(1))
    tree = sk.SPECVLM_TREE
    caches = []
    with torch.inference_mode():
        for model in (eager, lean):
            cache = model.new_cache(256)
            model.forward(cache, prompt.embeds, prompt.positions, fresh=True)
            cache.kv_lens += prompt.length
            caches.append(cache)
        start = prompt.next_position
        tokens = kit.randint(0, 190, (1, 26), seed=3)
        depths = torch.tensor([tree.depths])
        for options, new, positions in (
            ({}, tokens[:, :2], start + torch.arange(2)[None]),
            ({"rows": torch.tensor([1])}, tokens[:, :2], start + torch.arange(2)[None]),
            ({"tree_mask": tree.mask_words()}, tokens, start + depths),
            ({"tree_mask": tree.mask_words()[:13], "first": 5}, tokens[:, 5:13], start + depths[:, 5:13]),
        ):
            want, got = (m.forward(c, new, positions, **options) for m, c in zip((eager, lean), caches))
            assert want.shape == got.shape and torch.allclose(want, got, atol=2e-5, rtol=1e-4)
    for a, b in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("passes", ["fused", "fused-gemm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_passes_in_recorded_rounds(monkeypatch, family, passes):
    make, make_inputs = FAMILIES[family]
    target, draft = make(2), make(2)
    want = {seed: greedy(target, make_inputs(seed), 40) for seed in (1, 2)}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    with recorded_graphs(monkeypatch):
        decoder = sk.SpeculativeDecoder.from_transformers(target, draft, passes=passes, pruning=sk.Pruning("none"))
        for seed, tokens in want.items():
            assert decoder.generate(make_inputs(seed), 40).tokens == tokens
            assert decoder.generate_autoregressive(make_inputs(seed), 40).tokens == tokens
    for seed, tokens in want.items():
        assert greedy(target, make_inputs(seed), 40) == tokens  # the modules work on the merged weights


def test_compiled_layers(monkeypatch):
    """fullgraph: one graph a layer; eager kernels stand in for Inductor's, which the GPU tests run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    target, inputs = qwen(1), qwen_inputs(1)
    want = greedy(target, inputs, 12)
    decoder = sk.SpeculativeDecoder.from_transformers(target, qwen(51, 2, 1, layers=1), passes="compile")
    assert decoder.generate(inputs, 12).tokens == want
    assert decoder.generate_autoregressive(inputs, 12).tokens == want


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on the CPU")
def test_inductor_writes_the_cache_in_place():
    """Through a view it would copy every layer's cache on every pass: 33 MB four times at 16k context."""
    from torch._inductor.utils import run_and_get_code

    model = wrap(qwen(1, layers=1), "compile")
    with torch.inference_mode():
        cache = model.new_cache(192)
        _, code = run_and_get_code(model._lean.forward, cache, torch.tensor([[5, 6]]), torch.tensor([[3, 4]]))
    assert "index_copy" in code[0] and "tree_attention" in code[0]
    assert not re.search(r"empty_strided\w*\(\(192,", code[0])


def test_merging_keeps_one_copy():
    model = qwen(1)
    attention = model.model.language_model.layers[0].self_attn
    before = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
    modules = attention.q_proj, attention.k_proj, attention.v_proj
    merged = merge(modules, "weight")
    assert torch.equal(merged, before)
    assert all(m.weight.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr() for m in modules)
    again = merge(modules, "weight")  # a model may be wrapped twice
    assert again.data_ptr() == merged.data_ptr() and torch.equal(again, merged)
    with torch.no_grad():
        attention.k_proj.weight.zero_()
    assert not merged[len(attention.q_proj.weight) :][: len(attention.k_proj.weight)].any()


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="passes: expected one of eager"):
        wrap(qwen(1), "other")
    model = qwen(1)
    model.model.language_model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"hidden_act.*eager"):
        wrap(model, "fused")
    model = qwen(1)
    model.model.language_model.layers[1].self_attn.k_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.k_proj"):
        wrap(model, "fused")
    model = qwen(1)
    model.model.language_model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="yarn"):
        wrap(model, "fused")
    model = llava(1)
    type(model.model.language_model)  # Qwen2Model: known
    wrap(model, "fused")
    model.model.language_model.__class__ = type("OtherModel", (type(model.model.language_model),), {})
    with pytest.raises(ValueError, match="OtherModel"):
        wrap(model, "fused")


@pytest.mark.gpu
@pytest.mark.parametrize("passes", ["compile", "fused", "fused-gemm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_on_the_gpu(family, passes):
    """float32 and CUDA graphs: the tokens of transformers' own generate."""
    make, make_inputs = FAMILIES[family]
    target, draft = make(2).cuda(), make(52, 2, 1, layers=1).cuda()
    inputs = {k: v.cuda() for k, v in make_inputs(1).items()}
    want = greedy(target, inputs, 40)
    tree = sk.TokenTree.chain(2) if passes == "compile" else sk.SPECVLM_TREE  # every width of a pass is compiled
    decoder = sk.SpeculativeDecoder.from_transformers(target, draft, passes=passes, tree=tree)
    assert decoder.generate(inputs, 40).tokens == want
    assert decoder.generate_autoregressive(inputs, 40).tokens == want
