"""The trained example, for tests."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parent.parent / "examples" / "tiny_vlm"
TARGET, DRAFT, CLIPS = TINY / "target", TINY / "draft", TINY / "clips"
if str(TINY) not in sys.path:
    sys.path.append(str(TINY))


@functools.cache
def models(device: str = "cpu", dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForImageTextToText

    return tuple(AutoModelForImageTextToText.from_pretrained(m, dtype=dtype).to(device) for m in (TARGET, DRAFT))


@functools.cache
def asker():
    from specvlm_kernels.integrations.processing import VideoQuestion

    return VideoQuestion(TARGET)


def held_out_prompt(index: int, folder: Path):
    """A held-out clip, written as an MP4 and read back, with one of its questions: (inputs, answer)."""
    pytest.importorskip("av", reason="PyAV is not installed")
    import generate

    from specvlm_kernels.video import read_video

    scene, pairs = generate.make_clip(generate.HELD_OUT_SEED + 50_000 + index)
    path = folder / f"{index}.mp4"
    generate.write_mp4(path, generate.render_scene(scene))
    question, answer = pairs[index % len(pairs)]
    return asker()(read_video(path, asker().fps), question).inputs, answer
