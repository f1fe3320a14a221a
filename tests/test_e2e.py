"""The end-to-end benchmark's plumbing on the CPU, and its models of published sizes."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent))  # bench is run from a checkout, not installed
import specvlm_kernels as sk
from bench import e2e, e2e_timeline
from bench.__main__ import main
from bench.e2e_models import SIZES, build, config_of
from bench.e2e_timeline import Kernel


def test_smoke(capsys, tmp_path):
    path = tmp_path / "out.json"
    options = ["--rounds", "2", "--passes", "fused,eager", "--prefill", "--json", str(path)]
    assert main(["e2e", "--cpu-smoke", *options]) == 0
    out = capsys.readouterr().out
    assert "acceptance simulated" in out and "mean nothing" in out and "tok/s at 5" in out
    record = json.loads(path.read_text())
    assert len(record["results"]) == 4 and not record["not_run"]
    for row in record["results"]:
        assert set(row["phases_ms"]) == {"draft", "verify", "accept", "commit"}
        assert len(row["steps_ms"]) == 8 and all(ms > 0 for ms in row["steps_ms"].values())
        assert row["contexts"] == {"target": 500, "draft": 140}
    for row in record["prefill"]:
        assert row["kept_tokens"] == 40 and row["prompt_tokens"] == 500
        assert all(row["seconds"][phase] > 0 for phase in ("target_prefill", "rating", "select", "draft_prefill"))
    for row in record["results"]:
        assert row["stock_ms"] > 0 and row["plain_ms"] > 0 and row["round_ms"] > 0


def test_nothing_starts_after_the_time_limit(capsys):
    assert main(["e2e", "--cpu-smoke", "--rounds", "2", "--max-seconds", "0"]) == 0
    assert "not run for want of time" in capsys.readouterr().out


def test_gemms(capsys):
    assert main(["e2e", "--cpu-smoke", "--gemms"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SIZES["Qwen2.5-VL-32B"].products())


@pytest.mark.parametrize(
    "arguments", [["--passes", "fast"], ["--pair", "Qwen2.5-VL-7B"], ["--pair", "Qwen2.5-VL-7B,LLaVA-OneVision-0.5B"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["e2e", *arguments])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    """Weights counted by hand are those of the real class; parameters exist on no device here."""
    from transformers import LlavaOnevisionForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    size = SIZES[name]
    kind = Qwen2_5_VLForConditionalGeneration if size.family == "qwen" else LlavaOnevisionForConditionalGeneration
    with torch.device("meta"):
        model = kind(config_of(size))
    text = model.model.language_model
    products = sum(p.numel() for p in text.layers.parameters() if p.dim() > 1)
    assert products == size.layers * size.layer_weights
    assert model.lm_head.weight.shape == (size.vocab, size.hidden)
    assert (model.lm_head.weight is text.embed_tokens.weight) == size.tied
    layer = text.layers[0]
    shapes = size.products()
    merged = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    assert shapes["qkv"] == (sum(m.out_features for m in merged), merged[0].in_features)
    assert shapes["gate_up"] == (2 * layer.mlp.gate_proj.out_features, layer.mlp.gate_proj.in_features)
    for product, module in (("out", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
        assert shapes[product] == (module.out_features, module.in_features)


def test_the_floor_of_the_32b_model():
    """MEASURED.md: 16.1 ms at 16k context, without the embedding, at 4.25 TB/s; 7B and 3B at 1.7k 3.35 and 1.47."""
    for name, context, ms in (("32B", 16_384, 16.1), ("7B", 1700, 3.35), ("3B", 1700, 1.47)):
        assert SIZES[f"Qwen2.5-VL-{name}"].pass_bytes(context) / 4.25e12 * 1e3 == pytest.approx(ms, rel=0.03)


def test_random_weights_speak():
    """A model made on the device works as one loaded from a checkpoint would: finite, position-dependent logits."""
    for name in ("tiny Qwen2.5-VL", "tiny LLaVA-OneVision"):
        model = build(name, torch.device("cpu"), torch.float32)
        assert not any(p.is_meta for p in (*model.parameters(), *model.model.language_model.buffers()))
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[5, 6, 5, 7, 5]])).logits
        assert torch.isfinite(logits).all() and not torch.allclose(logits[0, 0], logits[0, 4])


def test_the_simulated_verdict_is_a_path():
    tree = sk.SPECVLM_TREE
    tokens = torch.arange(26)[None]
    verdict = e2e.Simulated(tree, accepted=3)(torch.randn(1, 26, 50), tokens, tree.parents_tensor(), torch.zeros(1, 27))
    path = [0, *verdict.path[0, :5].tolist()]
    assert verdict.length.tolist() == [3] and [tree.parents[node] for node in path[1:]] == path[:-1]
    names = e2e.step_names(tree)
    assert len(names) == 8 and names[5] == "verify (26)"


def test_timeline(tmp_path):
    names = ["nvjet_tst_64x8", "_attention_kernel", "_skinny_kernel", "_rope_to_cache_kernel", "_topk_kernel"]
    kernels = [Kernel(n, e2e_timeline.kind_of(n), 2.0 * i, 1.0) for i, n in enumerate(names)]
    assert [k.kind for k in kernels] == [
        "matrix products",
        "attention",
        "matrix products",
        "small kernels",
        "vocabulary",
    ]
    sums = e2e_timeline.summary(kernels)
    assert sums["matrix products"] == 2 and sums["gaps"] == 4 and sums["kernels"] == 5
    row = {"target": "a", "draft": "b", "video": 1000, "passes": "fused"}
    e2e_timeline.draw(kernels, str(tmp_path / "t.png"), {"results": [row], "header": {"gpu": "g", "commit": "c"}})
    assert (tmp_path / "t.png").stat().st_size > 5000
