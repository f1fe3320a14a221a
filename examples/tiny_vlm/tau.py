"""tau of the tiny pair for every pruning method and ratio on held-out clips: tau.json, tau.md and tau.png.

    python examples/tiny_vlm/tau.py --clips 50

Clips are written as MP4 files and read back; questions take turns. Every run's tokens are compared with plain
decoding's, so the table also says that nothing was lost.
"""

import argparse
import json
import tempfile
from pathlib import Path

import generate
import torch
from transformers import AutoModelForImageTextToText

import specvlm_kernels as sk
from specvlm_kernels.integrations.processing import VideoQuestion
from specvlm_kernels.video import read_video

HERE = Path(__file__).parent
FIRST_SEED = generate.HELD_OUT_SEED + 60_000
RATIOS = (0.0, 0.5, 0.75, 0.9, 0.95)
METHODS = ("specvlm", "uniform", "random")
NAMES = {"specvlm": "SpecVLM", "uniform": "uniform", "random": "random"}


def prompts(clips: int, asker: VideoQuestion):
    """One (inputs, question) a clip."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(clips):
            scene, pairs = generate.make_clip(FIRST_SEED + i)
            path = Path(folder) / f"{i}.mp4"
            generate.write_mp4(path, generate.render_scene(scene))
            yield asker(read_video(path, asker.fps), pairs[i % len(pairs)][0]).inputs


def measure(clips: int, positions: str) -> dict:
    asker = VideoQuestion(HERE / "target")
    target, draft = (
        AutoModelForImageTextToText.from_pretrained(HERE / m, dtype=torch.float32) for m in ("target", "draft")
    )
    settings = {f"{method} {ratio}": sk.Pruning(method, ratio) for method in METHODS for ratio in RATIOS}
    totals = {name: {"accepted": 0, "rounds": 0, "tokens": 0, "kept": 0, "stage1": 0} for name in settings}
    different, tokens = 0, 0
    for i, inputs in enumerate(prompts(clips, asker)):
        plain = sk.SpeculativeDecoder.from_transformers(target, draft).generate_autoregressive(inputs, 200).tokens
        tokens += len(plain)
        for name, pruning in settings.items():
            decoder = sk.SpeculativeDecoder.from_transformers(target, draft, pruning=pruning, positions=positions)
            generation = decoder.generate(inputs, 200)
            different += generation.tokens != plain
            stats = generation.stats
            counts = (stats.accepted, stats.rounds, stats.new_tokens, stats.kept_tokens, stats.stage1_tokens)
            for key, value in zip(totals[name], counts):
                totals[name][key] += value
        print(f"clip {i + 1} of {clips}", flush=True)
    rows = [
        {
            "method": name.split()[0],
            "pruned": float(name.split()[1]),
            "kept_tokens": t["kept"] / clips,
            "stage1_tokens": t["stage1"] / clips,
            "tau": t["accepted"] / t["rounds"],
            "tokens_per_round": t["accepted"] / t["rounds"] + 1,
        }
        for name, t in totals.items()
    ]
    return {
        "clips": clips,
        "first_seed": FIRST_SEED,
        "positions": positions,
        "tree_nodes": sk.SPECVLM_TREE.num_nodes,
        "answer_tokens": tokens / clips,
        "runs_that_differ_from_plain_decoding": different,
        "torch": torch.__version__,
        "rows": rows,
    }


def table(record: dict) -> str:
    cells = {(row["method"], row["pruned"]): row for row in record["rows"]}
    lines = ["| pruned | " + " | ".join(NAMES[m] for m in METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for ratio in RATIOS:
        entries = [cells[m, ratio] for m in METHODS]
        texts = [f"{e['tau']:.2f} ({e['tokens_per_round']:.2f})" for e in entries]
        lines.append(f"| {ratio:.0%} | " + " | ".join(texts) + " |")
    head = (
        f"tau (tokens per round) on the {record['tree_nodes']}-node tree, {record['clips']} held-out clips of "
        f"{record['answer_tokens']:.0f} answer tokens on average, {record['positions']} positions; "
        f"{record['runs_that_differ_from_plain_decoding']} runs differ from plain decoding.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def plot(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in METHODS:
        rows = [row for row in record["rows"] if row["method"] == method]
        axes.plot([100 * row["pruned"] for row in rows], [row["tau"] for row in rows], marker="o", label=NAMES[method])
    axes.set(xlabel="video tokens pruned for the draft, %", ylabel="tau: draft tokens accepted per round", ylim=(0, 5))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    parser.add_argument("--out", type=Path, default=HERE / "tau")
    args = parser.parse_args()
    record = measure(args.clips, args.positions)
    args.out.mkdir(exist_ok=True)
    (args.out / "tau.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "tau.md").write_text(table(record))
    plot(record, args.out / "tau.png")
    print(table(record))


if __name__ == "__main__":
    main()
