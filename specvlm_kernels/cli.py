"""The command line: specvlm generate | compare | info."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding import Generation, SpeculativeDecoder
    from .integrations.processing import VideoPrompt
    from .video import Video

METHODS = ("specvlm", "uniform", "random", "none")
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # logit gaps that a dtype's rounding can turn round


class UserError(Exception):
    """Something the user can mend; printed as one sentence, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("specvlm: interrupted", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"specvlm: error: {message}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="specvlm", description="Speculative decoding of video LLMs (SpecVLM).")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer a question about a video")
    _video_arguments(generate)
    generate.add_argument("--method", choices=METHODS, default="specvlm", help="how the draft's tokens are pruned")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, help="sample among the k most likely tokens")
    generate.add_argument("--nucleus", type=float, help="sample among the likeliest tokens that hold this probability")
    generate.add_argument("--seed", type=int, default=0, help="for sampling and random pruning")
    generate.set_defaults(run=run_generate)

    compare = commands.add_parser("compare", help="plain decoding against three ways of speculating")
    _video_arguments(compare)
    compare.set_defaults(run=run_compare)

    info = commands.add_parser("info", help="GPU, tiers found, and why one is missing")
    info.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to FILE or standard output")
    info.set_defaults(run=run_info)
    return top


def _video_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("video", help="a video file")
    command.add_argument("question")
    command.add_argument("--model", help="target checkpoint folder or hub name (default: the tiny example)")
    command.add_argument("--draft", help="draft checkpoint folder or hub name (default: the tiny example)")
    command.add_argument("--prune", type=float, default=0.9, help="share of the video tokens to prune, in [0,1)")
    command.add_argument("--top-p", type=float, default=0.4, help="share of attention for stage I of the pruning")
    command.add_argument("--tree", default="paper", help='"paper" (26 nodes), "chain:N" or "dynamic:DEPTH,WIDTH,NODES"')
    command.add_argument("--positions", choices=("original", "compact"), default="original")
    command.add_argument("--max-new-tokens", type=int, default=512)
    command.add_argument("--max-cache-tokens", type=int, help="refuse requests that need a larger cache")
    command.add_argument("--fps", type=float, help="frames a second to read (default: the checkpoint's)")
    command.add_argument("--max-frames", type=int, help="most frames to read (default: the checkpoint's)")
    command.add_argument(
        "--passes", choices=("eager", "compile", "fused", "fused-gemm"), default="eager", help="how tokens are decoded"
    )
    command.add_argument("--no-graphs", action="store_true", help="launch every kernel of a round by itself")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    command.add_argument("--dtype", choices=sorted(NEAR_TIE), help="default: bfloat16 on a GPU, float32 on the CPU")
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help="results to FILE or standard output")
    command.add_argument("--overlay", metavar="FILE.png", help="draw the frames with the kept tokens lit")


def run_generate(args: argparse.Namespace) -> int:
    from .decoding import Sampling
    from .pruning import Pruning

    if args.temperature < 0:
        raise UserError(f"--temperature: expected 0 or more, got {args.temperature}")
    sampling = Sampling(args.temperature, args.top_k, args.nucleus, args.seed) if args.temperature else None
    pruning = Pruning(args.method, args.prune, args.top_p, args.seed)
    job = Job(args)
    decoder = job.decoder(pruning=pruning, sampling=sampling)
    quiet = args.json == "-"
    shown = ""

    def stream(tokens: list[int]) -> None:
        nonlocal shown
        if not so_far:
            progress.label("decoding")
        so_far.extend(tokens)
        progress.advance(len(tokens))
        if not quiet:
            progress.give_way()
            text = job.tokenizer.decode(so_far, skip_special_tokens=True)
            if not text.endswith("�"):  # half of a character: wait for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text

    so_far: list[int] = []
    with Progress("reading the video", args.max_new_tokens) as progress:
        generation = decoder.generate(job.prompt.inputs, args.max_new_tokens, on_tokens=stream)
    if not quiet:
        print((generation.text or "")[len(shown) :])
        s = generation.stats
        print(
            f"{s.new_tokens} tokens in {s.rounds} rounds, tau {s.tau:.2f}, tokens per round {s.tokens_per_round:.2f}, "
            f"draft read {s.kept_tokens} of {s.visual_tokens} video tokens, {s.total_seconds:.2f} s",
            file=sys.stderr,
        )
    if args.json:
        write_json(args.json, job.record() | {"method": args.method, **result(generation)})
    if args.overlay:
        job.overlay(args.overlay, generation)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .pruning import Pruning

    job = Job(args)
    prunings = {
        "speculative, no pruning": Pruning("none", args.prune),
        "uniform pruning": Pruning("uniform", args.prune),
        "SpecVLM": Pruning("specvlm", args.prune, args.top_p),
    }
    decoder = job.decoder(pruning=prunings["SpecVLM"])
    limit, runs = args.max_new_tokens, {}
    with Progress("warm-up", 4 * limit) as progress:
        # the first pass through a model pays for what is set up lazily; nobody's time should
        decoder.generate(job.prompt.inputs, 8)
        progress.label("plain")
        runs["plain"] = decoder.generate_autoregressive(
            job.prompt.inputs, limit, with_margins=True, on_tokens=lambda tokens: progress.advance(len(tokens))
        )
        for name, pruning in prunings.items():
            progress.label(name)
            decoder.pruning = pruning  # one decoder: the target's cache is there once
            runs[name] = decoder.generate(
                job.prompt.inputs, limit, on_tokens=lambda tokens: progress.advance(len(tokens))
            )

    plain = runs["plain"]
    rows, identical = [], True
    for name, generation in runs.items():
        same, note = agreement(plain, generation, NEAR_TIE[job.dtype])
        identical &= same or note.startswith("near-tie")
        s = generation.stats
        rows.append(
            {
                "run": name,
                "new_tokens": s.new_tokens,
                "target_passes": s.target_passes,
                "tau": s.tau if name != "plain" else None,
                "tokens_per_round": s.tokens_per_round if name != "plain" else None,
                "seconds": s.total_seconds - s.seconds["capture"],  # once for every later request too
                "kept_tokens": s.kept_tokens if name != "plain" else None,
                "identical": same,
                "note": note,
                **result(generation),
            }
        )
    columns = ("", "tokens", "target passes", "tau", "tokens per round", "video tokens read", "time", "identical")
    table = Table(*columns, title=f"{Path(args.video).name}: {args.question}")
    for row in rows:
        speculative = row["tau"] is not None
        table.add_row(
            row["run"],
            str(row["new_tokens"]),
            str(row["target_passes"]),
            f"{row['tau']:.2f}" if speculative else "-",
            f"{row['tokens_per_round']:.2f}" if speculative else "-",
            f"{row['kept_tokens']}/{plain.stats.visual_tokens}" if speculative else "-",
            f"{row['seconds']:.2f} s",
            ("yes" if row["identical"] else "no") + (f" ({row['note']})" if row["note"] else ""),
        )
    console = Console(stderr=args.json == "-")
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    captured = sum(generation.stats.seconds["capture"] for generation in runs.values())
    if decoder.graphs:
        console.print(f"CUDA graphs were recorded in {captured:.1f} s, which the times leave out", highlight=False)
    console.print(plain.text or "", highlight=False)
    if args.json:
        write_json(args.json, job.record() | {"identical": all(r["identical"] for r in rows), "runs": rows})
    if args.overlay:
        job.overlay(args.overlay, runs["SpecVLM"])
    return 0 if identical else 1


def agreement(plain: Generation, other: Generation, near_tie: float) -> tuple[bool, str]:
    """Whether two greedy answers are the same, and what to say of the first difference."""
    if plain.tokens == other.tokens:
        return True, ""
    at = next(
        (i for i, (a, b) in enumerate(zip(plain.tokens, other.tokens)) if a != b),
        min(len(plain.tokens), len(other.tokens)),
    )
    margin = plain.margins[at] if plain.margins and at < len(plain.margins) else float("inf")
    kind = "near-tie" if margin <= near_tie else "difference"
    return False, f"{kind} at token {at}, logit gap {margin:.2g}"


class Job:
    """What both commands prepare: the models, the video, the prompt."""

    def __init__(self, args: argparse.Namespace):
        import torch

        try:
            from transformers import AutoModelForImageTextToText, AutoTokenizer
            from transformers.utils import logging

            from .integrations.processing import VideoQuestion
            from .integrations.transformers import check_tokenizers
            from .video import read_video
        except ImportError as error:
            raise UserError(
                f"{error}; pip install 'specvlm-kernels[vlm]' brings what the command line needs"
            ) from error
        if not args.question.strip():
            raise UserError("the question is empty")
        for name in ("json", "overlay"):
            folder = Path(getattr(args, name) or ".").parent
            if not folder.is_dir():
                raise UserError(f"--{name}: there is no folder {folder}")
        self.args = args
        self.tree = parse_tree(args.tree)
        target, draft = checkpoints(args)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype: str = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        asker = VideoQuestion(target)
        check_tokenizers(asker.tokenizer, AutoTokenizer.from_pretrained(draft))
        self.tokenizer = asker.tokenizer
        self.video: Video = read_video(args.video, args.fps or asker.fps, args.max_frames or asker.max_frames)
        self.prompt: VideoPrompt = asker(self.video, args.question)
        logging.disable_progress_bar()

        def load(folder: str) -> Any:
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, self.dtype))
            return model.to(device)

        with Progress("loading", None):
            self.target, self.draft = load(target), load(draft)

    def decoder(self, **options: Any) -> SpeculativeDecoder:
        from .decoding import SpeculativeDecoder

        return SpeculativeDecoder.from_transformers(
            self.target,
            self.draft,
            tree=self.tree,
            positions=self.args.positions,
            tokenizer=self.tokenizer,
            max_cache_tokens=self.args.max_cache_tokens,
            passes=self.args.passes,
            graphs=False if self.args.no_graphs else None,
            **options,
        )

    def record(self) -> dict[str, Any]:
        """What was asked, for the JSON."""
        from . import __version__

        return {
            "specvlm_kernels": __version__,
            "video": str(self.args.video),
            "question": self.args.question,
            "frames": len(self.video.frames),
            "fps": self.video.fps,
            "prune": self.args.prune,
            "top_p": self.args.top_p,
            "tree_nodes": self.tree.num_nodes,
            "device": str(self.target.device),
            "dtype": self.dtype,
        }

    def overlay(self, path: str, generation: Generation) -> None:
        import torch

        from .overlay import draw, stage_one

        tokens = self.prompt.grid[0] * self.prompt.grid[1] * self.prompt.grid[2]
        if generation.kept is None:
            kept, first = torch.arange(tokens), torch.zeros(tokens, dtype=torch.bool)
        else:
            kept = generation.kept.cpu() - self.prompt.first
            first = torch.zeros(len(kept), dtype=torch.bool)
            if generation.scores is not None:
                first = stage_one(kept, generation.scores.cpu(), generation.stats.stage1_tokens)
        picture = draw(self.video.frames, self.prompt.grid, kept, first)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_whole(path, buffer.getvalue())


def parse_tree(text: str) -> Any:
    from .tree import SPECVLM_TREE, DynamicTree, TokenTree

    if text == "paper":
        return SPECVLM_TREE
    kind, _, rest = text.partition(":")
    numbers = rest.split(",")
    if len(numbers) != {"chain": 1, "dynamic": 3}.get(kind) or not all(number.isdecimal() for number in numbers):
        raise UserError(f'--tree: expected "paper", "chain:N" or "dynamic:DEPTH,WIDTH,NODES", got {text!r}')
    make = TokenTree.chain if kind == "chain" else DynamicTree
    try:
        return make(*map(int, numbers))
    except ValueError as error:
        raise UserError(f"--tree: {text!r}: {error}") from error


def checkpoints(args: argparse.Namespace) -> tuple[str, str]:
    """Target and draft, by default the trained example in the source tree."""
    if bool(args.model) != bool(args.draft):
        raise UserError("--model and --draft go together: a draft only helps a target of its own family")
    if args.model:
        for name in (args.model, args.draft):
            if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
                raise UserError(f"{name}: there is no such checkpoint folder")
        return args.model, args.draft
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        pair = root / "examples" / "tiny_vlm"
        if (pair / "target" / "config.json").is_file():
            return str(pair / "target"), str(pair / "draft")
    raise UserError("the example models are not here: run in a checkout of the project, or name --model and --draft")


def result(generation: Generation) -> dict[str, Any]:
    return {"text": generation.text, "tokens": generation.tokens, "stats": generation.stats.as_dict()}


def run_info(args: argparse.Namespace) -> int:
    import torch

    from . import __version__
    from .backend import BACKENDS, OPS, device_missing

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
    facts: dict[str, Any] = {
        "specvlm_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
    }
    for name in ("triton", "transformers"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError:
            facts[name] = None
    tiers: dict[str, Any] = {}
    for backend in BACKENDS:
        reason = device_missing(backend, device.type, device.index)
        ops = [name for name, op in OPS.items() if backend in op.tiers]
        tiers[backend] = {"available": reason is None, "why_not": reason, "ops": ops}
    if args.json:
        write_json(args.json, facts | {"tiers": tiers})
        return 0
    for name, value in facts.items():
        print(f"{name:16} {value if value is not None else 'not found'}")
    for backend, tier in tiers.items():
        print(f"{backend:16} {'yes: ' + ', '.join(tier['ops']) if tier['available'] else 'no: ' + tier['why_not']}")
    return 0


def write_json(path: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_whole(path, text.encode())


def write_whole(path: str, data: bytes) -> None:
    """The file appears complete or not at all."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


class Progress:
    """A bar on a terminal's standard error; nothing elsewhere."""

    def __init__(self, label: str, total: int | None):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} tokens"))
        self._bar = Bar(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def label(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def advance(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

    def give_way(self) -> None:
        """Leaves a terminal that standard output shares to what is printed there."""
        if sys.stdout.isatty():
            self._bar.stop()


if __name__ == "__main__":
    sys.exit(main())
