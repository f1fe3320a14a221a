"""The trained pair on held-out MP4 clips: lossless, and worth it."""

import pytest
import torch
from models import greedy
from tiny import CLIPS, held_out_prompt, models

import specvlm_kernels as sk

NUM_CLIPS = 52


@pytest.mark.parametrize("index", range(NUM_CLIPS))
def test_speculation_is_lossless(index, tmp_path):
    """transformers' generate = our autoregressive tokens = our speculative tokens, in float32."""
    target, draft = models()
    inputs, _ = held_out_prompt(index, tmp_path)
    decoder = sk.SpeculativeDecoder.from_transformers(target, draft)
    want = greedy(target, inputs, 200)
    assert decoder.generate_autoregressive(inputs, 200).tokens == want
    generation = decoder.generate(inputs, 200)
    assert generation.tokens == want
    assert 60 <= len(want) <= 151 and want[-1] in decoder.target.stop_tokens
    stats = generation.stats
    assert stats.visual_tokens >= 1000 and stats.kept_tokens == sk.keep_count(stats.visual_tokens, 0.9)
    assert stats.target_passes < len(want) / 2


def test_the_target_reads_the_video(tmp_path):
    """Answers are right far more often than a model that does not see could be, and change with the video."""
    target, draft = models()
    decoder = sk.SpeculativeDecoder.from_transformers(target, draft)
    right = 0
    for index in range(16):
        inputs, answer = held_out_prompt(index, tmp_path)
        tokens = decoder.generate(inputs, 200).tokens
        from tiny import asker

        right += asker().tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer.strip()
    assert right >= 11, right
    dark = {**inputs, "pixel_values_videos": torch.zeros_like(inputs["pixel_values_videos"])}
    assert decoder.generate(dark, 200).tokens != tokens


def test_shipped_clips_are_h264():
    import av

    paths = sorted(CLIPS.glob("*.mp4"))
    assert len(paths) >= 4
    for path in paths:
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"


def test_checkpoints_are_small():
    weights = [path for name in ("target", "draft") for path in (CLIPS.parent / name).glob("*.safetensors")]
    assert len(weights) == 2 and sum(path.stat().st_size for path in weights) < 16e6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gpu_says_what_the_cpu_says(dtype, tmp_path):
    """Up to near-ties: where answers part, the target's two best logits are as close as rounding can turn."""
    near_tie = {torch.float32: 1e-3, torch.bfloat16: 0.25}[dtype]
    on_cpu = sk.SpeculativeDecoder.from_transformers(*models())
    on_gpu = sk.SpeculativeDecoder.from_transformers(*models("cuda", dtype))
    for index in range(8):
        inputs, _ = held_out_prompt(index, tmp_path)
        plain = on_cpu.generate_autoregressive(inputs, 200, with_margins=True)
        got = on_gpu.generate({k: v.cuda() for k, v in inputs.items()}, 200)
        if got.tokens != plain.tokens:
            at = next(i for i, (a, b) in enumerate(zip(plain.tokens, got.tokens)) if a != b)
            assert plain.margins[at] < near_tie, (index, at, plain.margins[at])
