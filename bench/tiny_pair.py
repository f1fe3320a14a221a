"""The trained tiny pair on held-out clips: true acceptance, and whether graphs, calls and plain decoding agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

import specvlm_kernels as sk
from specvlm_kernels.cli import NEAR_TIE, agreement
from specvlm_kernels.integrations.processing import VideoQuestion
from specvlm_kernels.stats import ROUND_PHASES, Stats
from specvlm_kernels.video import Video

TINY = Path(__file__).parent.parent / "examples" / "tiny_vlm"
LONG = 2000  # tokens of the generation that must not drift


def run(clips: int, device: torch.device, passes: str) -> dict[str, Any]:
    """Clips are drawn, not decoded from a file, so that PyAV is not needed."""
    sys.path.append(str(TINY))
    import generate  # the example's scenes

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    near_tie = NEAR_TIE[str(dtype).removeprefix("torch.")]
    models = [
        AutoModelForImageTextToText.from_pretrained(TINY / m, dtype=dtype).to(device) for m in ("target", "draft")
    ]
    asker = VideoQuestion(TINY / "target")
    decoders = {
        name: sk.SpeculativeDecoder.from_transformers(*models, passes=passes, graphs=graphs)
        for name, graphs in (("graphs", None), ("calls", False))
    }
    counts = {name: {"same": 0, "near_ties": 0, "different": 0} for name in decoders}
    graphs_equal_calls, accepted, rounds, notes = 0, 0, 0, []
    milliseconds = {name: [0.0, 0] for name in decoders}

    def compare(label: str, inputs: Any, limit: int, stop: list[int] | None) -> Stats:
        nonlocal graphs_equal_calls
        plain = decoders["graphs"].generate_autoregressive(inputs, limit, stop_tokens=stop, with_margins=True)
        outputs = []
        for name, decoder in decoders.items():
            got = decoder.generate(inputs, limit, stop_tokens=stop)
            outputs.append(got.tokens)
            same, note = agreement(plain, got, near_tie)
            kind = "same" if same else "near_ties" if note.startswith("near-tie") else "different"
            counts[name][kind] += 1
            if note:
                notes.append(f"{label}, {name}: {note}")
            seconds = got.stats.seconds
            milliseconds[name][0] += 1e3 * sum(seconds[phase] for phase in (*ROUND_PHASES, "host"))
            milliseconds[name][1] += got.stats.rounds
        graphs_equal_calls += outputs[0] == outputs[1]
        return got.stats

    for index in range(clips):
        scene, pairs = generate.make_clip(generate.HELD_OUT_SEED + 50_000 + index)
        frames = generate.render_scene(scene)[:: max(1, round(generate.FPS / asker.fps))]
        video = Video(frames.permute(0, 2, 3, 1).contiguous().numpy(), asker.fps)
        inputs = asker(video, pairs[index % len(pairs)][0]).inputs
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        stats = compare(f"clip {index}", inputs, 200, None)
        accepted, rounds = accepted + stats.accepted, rounds + stats.rounds
        if index == 0:
            compare(f"{LONG} tokens", inputs, LONG, [])
    return {
        "clips": clips,
        "passes": passes,
        "dtype": str(dtype),
        "tau": accepted / rounds,  # of the clips: the long one leaves what the pair was trained for
        "ms_per_round": {name: total / count for name, (total, count) in milliseconds.items()},
        "against_plain": counts,
        "graphs_equal_calls": graphs_equal_calls,
        "different": sum(c["different"] for c in counts.values()),
        "notes": notes,
    }


def print_record(record: dict[str, Any], console: Console) -> None:
    runs = record["clips"] + 1
    console.print(f"tiny pair, {record['clips']} held-out clips and one of {LONG} tokens, {record['dtype']}")
    for name, counts in record["against_plain"].items():
        ms = record["ms_per_round"][name]
        console.print(f"  {name} against plain decoding: {counts}, {ms:.2f} ms a round", highlight=False)
    console.print(f"  graphs = calls in {record['graphs_equal_calls']} of {runs}; tau {record['tau']:.2f}")
    for note in record["notes"][:20]:
        console.print(f"  {note}", highlight=False)
