"""tau of the tiny pair on held-out clips, for every pruning method and ratio or for static and dynamic trees.

    python examples/tiny_vlm/tau.py --clips 50            tau.json, tau.md and tau.png
    python examples/tiny_vlm/tau.py --clips 50 --trees    trees.json and trees.md

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
TREES = {
    "static": sk.SPECVLM_TREE,
    "dynamic, 26 nodes": sk.DynamicTree(depth=5, width=10, nodes=26),
    "dynamic, 60 nodes": sk.DynamicTree(depth=5, width=10, nodes=60),
    "dynamic, 26 nodes, deeper": sk.DynamicTree(depth=8, width=10, nodes=26),
    "dynamic, 60 nodes, deeper": sk.DynamicTree(depth=8, width=10, nodes=60),
}


def prompts(clips: int, asker: VideoQuestion):
    """One (inputs, question) a clip."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(clips):
            scene, pairs = generate.make_clip(FIRST_SEED + i)
            path = Path(folder) / f"{i}.mp4"
            generate.write_mp4(path, generate.render_scene(scene))
            yield asker(read_video(path, asker.fps), pairs[i % len(pairs)][0]).inputs


def decode(clips: int, settings: dict[str, dict]) -> tuple[dict[str, dict[str, int]], dict]:
    """Sums over the clips for every setting (a decoder's options), and what all of them have in common."""
    asker = VideoQuestion(HERE / "target")
    target, draft = (
        AutoModelForImageTextToText.from_pretrained(HERE / m, dtype=torch.float32) for m in ("target", "draft")
    )
    keys = ("accepted", "rounds", "draft_passes", "kept_tokens", "stage1_tokens")
    totals = {name: dict.fromkeys(keys, 0) for name in settings}
    different, tokens = 0, 0
    for i, inputs in enumerate(prompts(clips, asker)):
        plain = sk.SpeculativeDecoder.from_transformers(target, draft).generate_autoregressive(inputs, 200).tokens
        tokens += len(plain)
        for name, options in settings.items():
            decoder = sk.SpeculativeDecoder.from_transformers(target, draft, **options)
            generation = decoder.generate(inputs, 200)
            different += generation.tokens != plain
            for key in keys:
                totals[name][key] += getattr(generation.stats, key)
        print(f"clip {i + 1} of {clips}", flush=True)
    common = {
        "clips": clips,
        "first_seed": FIRST_SEED,
        "answer_tokens": tokens / clips,
        "runs_that_differ_from_plain_decoding": different,
        "torch": torch.__version__,
    }
    return totals, common


def rates(total: dict[str, int]) -> dict[str, float]:
    tau = total["accepted"] / total["rounds"]
    return {"tau": tau, "tokens_per_round": tau + 1}


def measure(clips: int, positions: str) -> dict:
    pairs = [(method, ratio) for method in METHODS for ratio in RATIOS]
    settings = {f"{m} {r}": {"pruning": sk.Pruning(m, r), "positions": positions} for m, r in pairs}
    totals, common = decode(clips, settings)
    rows = [
        {
            "method": method,
            "pruned": ratio,
            "kept_tokens": total["kept_tokens"] / clips,
            "stage1_tokens": total["stage1_tokens"] / clips,
            **rates(total),
        }
        for (method, ratio), total in zip(pairs, totals.values())
    ]
    return {**common, "positions": positions, "tree_nodes": sk.SPECVLM_TREE.num_nodes, "rows": rows}


def measure_trees(clips: int, positions: str) -> dict:
    settings = {name: {"tree": tree, "positions": positions} for name, tree in TREES.items()}
    totals, common = decode(clips, settings)
    rows = [
        {
            "tree": name,
            "nodes": TREES[name].num_nodes,
            "depth": TREES[name].max_depth,
            "draft_nodes": TREES[name].draft_nodes,
            "target_passes": total["rounds"] / clips,
            "draft_passes": total["draft_passes"] / clips,
            **rates(total),
        }
        for name, total in totals.items()
    ]
    pruning = sk.Pruning()
    return {**common, "positions": positions, "method": pruning.method, "pruned": pruning.ratio, "rows": rows}


def trees_table(record: dict) -> str:
    columns = "| tree | nodes | depth | tau (tokens per round) | rounds an answer | draft passes an answer |"
    lines = [columns, "|---|--:|--:|---|--:|--:|"]
    for row in record["rows"]:
        rate = f"{row['tau']:.2f} ({row['tokens_per_round']:.2f})"
        passes = f"{row['target_passes']:.1f} | {row['draft_passes']:.1f}"
        lines.append(f"| {row['tree']} | {row['nodes']} | {row['depth']} | {rate} | {passes} |")
    head = (
        f"tau on {record['clips']} held-out clips of {record['answer_tokens']:.0f} answer tokens on average, "
        f"{record['pruned']:.0%} pruned by {NAMES[record['method']]}, {record['positions']} positions; "
        f"{record['runs_that_differ_from_plain_decoding']} runs differ from plain decoding. A round accepts at most as "
        "many tokens as the tree is deep.\n\n"
    )
    return head + "\n".join(lines) + "\n"


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
    parser.add_argument("--trees", action="store_true", help="static and dynamic trees instead of ways to prune")
    parser.add_argument("--out", type=Path, default=HERE / "tau")
    args = parser.parse_args()
    record = (measure_trees if args.trees else measure)(args.clips, args.positions)
    text = (trees_table if args.trees else table)(record)
    name = "trees" if args.trees else "tau"
    args.out.mkdir(exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / f"{name}.md").write_text(text)
    if not args.trees:
        plot(record, args.out / "tau.png")
    print(text)


if __name__ == "__main__":
    main()
