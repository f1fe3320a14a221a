"""`python -m bench e2e`: decoding at full model size, with random weights and therefore simulated acceptance.

    python -m bench e2e                                        the pairs and contexts in order of importance
    python -m bench e2e --pair Qwen2.5-VL-32B,Qwen2.5-VL-3B --context 16384
    python -m bench e2e --passes fused,compile,eager --json OUT.json --timeline OUT.png
    python -m bench e2e --prefill                              real prompts first: prefill, rating, pruning
    python -m bench e2e --gemms                                GB/s of every matrix product at 1, 4 and 26 rows
    python -m bench e2e --sweep                                skinny_gemm's configurations, product by product
    python -m bench e2e --tiny-clips 200                       the trained tiny pair: true acceptance, lossless or not
    python -m bench e2e --cpu-smoke                            the plumbing, on the CPU

Measured, for a target, a draft and a number of video tokens: transformers' own decoding (its modules and cache,
SDPA, one token a pass), our own one token at a time, and rounds of the paper's tree. The prompt is not run: caches are
filled with random keys and values, the target's with the video and 100 tokens of text, the draft's with the tenth of
the video that pruning leaves and the text. Weights are random, so the number of accepted tokens is set, not measured:
tokens per second are printed for 3, 4 and 5 tokens a round, and one round costs the same whatever it accepts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import specvlm_kernels as sk
from specvlm_kernels.decoding import PlainStep, Round
from specvlm_kernels.drafting import TreeDrafter
from specvlm_kernels.graphs import Program
from specvlm_kernels.integrations.transformers import TransformersModel, wrap
from specvlm_kernels.model import Prompt
from specvlm_kernels.passes import PASSES
from specvlm_kernels.reference.verify_greedy import Verdict
from specvlm_kernels.workspace import Side

from . import e2e_timeline, environment, gemms, report, tiny_pair
from .e2e_models import SIZES, build
from .harness import Chip, free_memory

TEXT_TOKENS, ROOM = 100, 512  # of the prompt after the video; for the tokens of the measured rounds
TOKENS_PER_ROUND = (3, 4, 5)
# most important first: the time limit cuts from the end
DEFAULT = [
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-7B", 16_384),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-3B", 16_384),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-7B", 4096),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-7B", 65_536),
    ("LLaVA-OneVision-7B", "LLaVA-OneVision-0.5B", 16_384),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-3B", 4096),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-3B", 65_536),
    ("LLaVA-OneVision-7B", "LLaVA-OneVision-0.5B", 4096),
    ("LLaVA-OneVision-7B", "LLaVA-OneVision-0.5B", 65_536),
]
# must, goal on an H200 in ms: plain token, verification pass, round; and of one draft pass
WANTED = {
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-7B", 16_384): ((20.0, 18.5), (21.5, 19.8), (49, 42), (5.2, 4.3)),
    ("Qwen2.5-VL-32B", "Qwen2.5-VL-3B", 16_384): ((20.0, 18.5), (21.5, 19.8), (39, 32), (3.3, 2.4)),
}
TINY = [
    ("tiny Qwen2.5-VL", "tiny Qwen2.5-VL", 400),
    ("tiny LLaVA-OneVision", "tiny LLaVA-OneVision", 400),
]

Row = dict[str, Any]


class Bench:
    """One run on one device; models are built when first needed and dropped when no case needs them any more."""

    def __init__(self, device: torch.device, commit: str | None, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.chip = Chip(device) if device.type == "cuda" else None
        self.ceilings = self.chip.ceilings() if self.chip else None
        self.record: dict[str, Any] = {
            "header": environment.header(device, commit),
            "ceilings": self.ceilings,
            "results": [],
            "prefill": [],
            "not_run": [],
        }
        self._models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        if name not in self._models:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self._models[name] = build(name, self.device, dtype)
        return self._models[name]

    def keep_only(self, names: set[str]) -> None:
        self._models = {name: model for name, model in self._models.items() if name in names}
        free_memory()

    def floor_ms(self, name: str, context: int) -> float | None:
        return SIZES[name].pass_bytes(context) / self.ceilings["read_bytes_per_s"] * 1e3 if self.ceilings else None

    def run(
        self, cases: list[tuple[str, str, int]], passes: list[str], max_seconds: float, prefill: bool = False
    ) -> list[Any]:
        """Measures what the time allows; returns the timeline of the first case."""
        began, timeline = time.perf_counter(), []
        for i, (target, draft, video) in enumerate(cases):
            stock = None
            for variant in passes:
                label = f"{target} + {draft}, {video} video tokens, {variant}"
                if time.perf_counter() - began > max_seconds:
                    self.record["not_run"].append(label)
                    continue
                print(f"{label} ... {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
                try:
                    stock = self.stock_ms(target, video) if stock is None else stock
                    row = self.case(target, draft, video, variant, stock)
                    if not timeline:
                        timeline = row.pop("timeline")
                except torch.OutOfMemoryError as error:
                    row = {"target": target, "draft": draft, "video": video, "passes": variant, "failed": str(error)}
                row.pop("timeline", None)
                self.record["results"].append(row)
                free_memory()
                if prefill and "failed" not in row:
                    self.record["prefill"].append(self.prefill(target, draft, video, variant))
                    free_memory()
            self.keep_only({name for target, draft, _ in cases[i + 1 :] for name in (target, draft)})
        self.record["wall_s"] = round(time.perf_counter() - began, 1)
        return timeline

    def stock_ms(self, name: str, video: int) -> tuple[float, float]:
        """A token of transformers' own decoding, the fastest part of it alone: modules, SDPA, cache, argmax.

        Wall milliseconds, and those of its kernels: eager decoding waits for the host, and hosts differ.
        """
        model, size, context = self.model(name), SIZES[name], video + TEXT_TOKENS
        config = model.model.language_model.config
        cache = DynamicCache(config=config)
        shape = (1, size.kv_heads, context, size.head_dim)
        dtype = model.dtype
        for layer in range(size.layers):
            cache.update(*(torch.randn(shape, dtype=dtype, device=self.device) for _ in range(2)), layer)
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        axes = (3, 1, 1) if size.family == "qwen" else (1, 1)

        def decode() -> None:
            positions = torch.full(axes, cache.get_seq_length(), device=self.device)
            out = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
            token.copy_(out.logits[:, -1:].argmax(-1))

        wall = statistics.median([self._timed(decode) for _ in range(12)][2:])
        kernels = e2e_timeline.kernels_of(decode, self.device)
        return wall * 1e3, sum(kernel.duration for kernel in kernels)

    def case(self, target: str, draft: str, video: int, passes: str, stock_ms: tuple[float, float]) -> Row:
        wrapped = {name: wrap(self.model(name), passes) for name in (target, draft)}
        kept = sk.keep_count(video, 0.9)
        contexts = {"target": video + TEXT_TOKENS, "draft": kept + TEXT_TOKENS}
        sides = {
            "target": self._side(wrapped[target], contexts["target"]),
            "draft": self._side(wrapped[draft], contexts["draft"]),
        }
        graphs = self.device.type == "cuda"
        if graphs:
            torch.cuda.reset_peak_memory_stats(self.device)
        plain = PlainStep(sides["target"], accept_greedy, False, graphs)
        plain_prepare_s = self._timed(plain.program.prepare)
        plain_ms, _ = self._rounds(plain.program)

        self._rewind(sides, contexts)
        vocab = min(wrapped[target].vocab_size, wrapped[draft].vocab_size)
        drafter = TreeDrafter(sides["draft"], sk.SPECVLM_TREE, vocab)
        drafter.start(1)
        round = Round(sides["target"], drafter, Simulated(sk.SPECVLM_TREE, accepted=3), graphs)
        prepare_s = self._timed(round.program.prepare)
        round_ms, phases = self._rounds(round.program)

        self._rewind(sides, contexts)
        split_steps = [(name, step) for name, (_, step) in zip(step_names(sk.SPECVLM_TREE), round.steps, strict=True)]
        split = Program(split_steps, round.state, round.result, graphs=graphs)
        split.prepare()
        _, steps = self._rounds(split)

        self._rewind(sides, contexts)
        timeline = e2e_timeline.trace(round.program, self.device)
        floors = {
            "plain": self.floor_ms(target, contexts["target"]),
            "draft pass": self.floor_ms(draft, contexts["draft"]),
        }
        if floors["plain"] is not None:
            floors["round"] = floors["plain"] + drafter.passes * floors["draft pass"]
        return {
            "target": target,
            "draft": draft,
            "video": video,
            "contexts": contexts,
            "passes": passes,
            "stock_ms": stock_ms[0],
            "stock_kernels_ms": stock_ms[1],
            "plain_ms": plain_ms,
            "round_ms": round_ms,
            "phases_ms": phases,
            "steps_ms": steps,
            "between_rounds_ms": round_ms - sum(phases.values()),
            "kernels_ms": e2e_timeline.summary(timeline),
            "floors_ms": floors,
            "prepare_s": {"plain": plain_prepare_s, "round": prepare_s},
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if graphs else 0,
            "timeline": timeline,
        }

    def prefill(self, target: str, draft: str, video: int, passes: str) -> Row:
        """Seconds of each phase of a request whose prompt is really run, after one that compiles and records."""
        length = video + TEXT_TOKENS
        models = {name: wrap(self.model(name), passes) for name in (target, draft)}
        decoder = sk.SpeculativeDecoder(models[target], models[draft])
        visual = torch.zeros(length, dtype=torch.bool, device=self.device)
        visual[TEXT_TOKENS // 5 :][:video] = True
        positions = torch.arange(length, device=self.device).expand(3 if SIZES[target].family == "qwen" else 1, 1, -1)
        for name, model in models.items():
            embeds = torch.randn(1, length, SIZES[name].hidden, dtype=model.model.dtype, device=self.device)
            prompt = Prompt(embeds, positions, visual, length)
            model.embed = lambda inputs, prompt=prompt: prompt  # type: ignore[method-assign]
        for _ in range(2):
            stats = decoder.generate({}, 12, stop_tokens=[]).stats
        return {
            "target": target,
            "draft": draft,
            "video": video,
            "passes": passes,
            "prompt_tokens": stats.prompt_tokens,
            "kept_tokens": stats.kept_tokens,
            "rounds": stats.rounds,
            "seconds": stats.seconds,
            "peak_bytes": stats.peak_bytes,
        }

    def _side(self, model: TransformersModel, context: int) -> Side:
        cache = model.new_cache(context + ROOM)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        cache.kv_lens.fill_(context)
        return Side(model, cache, torch.zeros(1, dtype=torch.int64, device=self.device))

    @staticmethod
    def _rewind(sides: dict[str, Side], contexts: dict[str, int]) -> None:
        for name, side in sides.items():
            side.cache.kv_lens.fill_(contexts[name])

    def _rounds(self, program: Program) -> tuple[float, dict[str, float]]:
        """Median wall milliseconds from launch to launch, as the decoding loop does it, and of each phase."""
        walls, phases = [], []
        for _ in range(self.rounds + 2):
            started = time.perf_counter()
            seconds: dict[str, float] = {}
            program.launch()
            program.wait(seconds)
            walls.append(time.perf_counter() - started)
            phases.append(seconds)
        names = phases[0]
        medians = {name: statistics.median(p[name] for p in phases[2:]) * 1e3 for name in names}
        return statistics.median(walls[2:]) * 1e3, medians

    def _timed(self, call: Any) -> float:
        started = self._now()
        call()
        return self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def accept_greedy(logits: Tensor, tokens: Tensor, parents: Tensor, coins: Tensor) -> Verdict:
    return sk.verify_greedy(logits, tokens, parents)


class Simulated:
    """verify_greedy at its full cost, then a verdict that accepts so many nodes of the deepest path."""

    def __init__(self, tree: sk.TokenTree, accepted: int) -> None:
        node, path = tree.num_nodes - 1, []
        while node:
            path.append(node)
            node = tree.parents[node]
        self._path, self._accepted = path[::-1], accepted
        self._wanted: Tensor | None = None

    def __call__(self, logits: Tensor, tokens: Tensor, parents: Tensor, coins: Tensor) -> Verdict:
        verdict = sk.verify_greedy(logits, tokens, parents)
        if self._wanted is None:  # in the warm-up, before anything is recorded
            row = self._path + [-1] * (tokens.shape[1] - len(self._path))
            self._wanted = torch.tensor([row], dtype=torch.int32, device=tokens.device)
        verdict.path.copy_(self._wanted)
        verdict.length.fill_(self._accepted)
        return verdict


def step_names(tree: sk.TokenTree) -> list[str]:
    """Of the steps of a round, one name each."""
    levels = [f"draft level {level} ({len(tree.levels[level])})" for level in range(1, tree.max_depth)]
    return ["draft catch-up (2)", *levels, f"verify ({tree.num_nodes})", "accept", "commit"]


def print_record(record: dict[str, Any], console: Console) -> None:
    console.print("  ".join(f"{key}: {value}" for key, value in record["header"].items()), highlight=False)
    if record["ceilings"]:
        console.print(f"read {record['ceilings']['read_bytes_per_s'] / 1e12:.2f} TB/s", highlight=False)
    else:
        console.print("no GPU: a smoke run of the plumbing; these times mean nothing")
    rates = [f"tok/s at {n}" for n in TOKENS_PER_ROUND]
    columns = ("pair", "video", "passes", "stock ms", "plain ms", "% floor", "verify ms", "draft ms",
               "other ms", "round ms", "% floor", *rates, "x stock at 4", "x plain at 4")  # fmt: skip
    table = Table(*columns, title="one round: 26-node tree, random weights, acceptance simulated")
    for row in record["results"]:
        pair, video = f"{row['target']} + {row['draft']}", f"{row['video']:,}"
        if "failed" in row:
            table.add_row(pair, video, row["passes"], f"failed: {row['failed'][:60]}")
            continue
        phases, floors, ms = row["phases_ms"], row["floors_ms"], row["round_ms"]
        table.add_row(
            pair,
            video,
            row["passes"],
            f"{row['stock_ms']:.1f}",
            f"{row['plain_ms']:.2f}",
            share(floors["plain"], row["plain_ms"]),
            f"{phases['verify']:.2f}",
            f"{phases['draft']:.2f}",
            f"{ms - phases['verify'] - phases['draft']:.2f}",
            f"{ms:.2f}",
            share(floors.get("round"), ms),
            *(f"{n / ms * 1e3:.0f}" for n in TOKENS_PER_ROUND),
            f"{4 * row['stock_ms'] / ms:.2f}",
            f"{4 * row['plain_ms'] / ms:.2f}",
        )
    console.print(table)
    for row in record["results"]:
        if "failed" in row:
            continue
        steps = "  ".join(f"{name} {ms:.3f}" for name, ms in row["steps_ms"].items())
        floor = row["floors_ms"]["draft pass"]
        console.print(
            f"{row['target']} + {row['draft']} {row['video']:,} {row['passes']}, ms: {steps}", highlight=False
        )
        stock = row["stock_kernels_ms"]
        console.print(
            f"   kernels of a stock token {stock:.2f} ms, {4 * stock / row['round_ms']:.2f} x at 4 tokens a round",
            highlight=False,
        )
        kernels = "  ".join(f"{name} {ms:.3f}" for name, ms in row["kernels_ms"].items())
        between, prepare = row["between_rounds_ms"], row["prepare_s"]
        console.print(
            f"   between rounds {between:.3f}  floor of a draft pass {'-' if floor is None else f'{floor:.2f}'}  "
            f"recording: plain {prepare['plain']:.1f} s, round {prepare['round']:.1f} s  "
            f"peak {row['peak_bytes'] / 2**30:.1f} GiB",
            highlight=False,
        )
        if wanted := WANTED.get((row["target"], row["draft"], row["video"])):
            level = max(ms for name, ms in row["steps_ms"].items() if name.startswith("draft"))
            got = row["plain_ms"], row["steps_ms"][step_names(sk.SPECVLM_TREE)[-3]], row["round_ms"], level
            names = ("plain token", "verification", "round", "longest draft pass")
            verdicts = [f"{n} {ms:.2f} (must {m}, goal {g})" for n, ms, (m, g) in zip(names, got, wanted)]
            console.print("   " + "  ".join(verdicts), highlight=False)
        if kernels:
            console.print(f"   kernels of one round, ms: {kernels}", highlight=False)
    for row in record["prefill"]:
        seconds = "  ".join(f"{phase} {1e3 * s:.2f}" for phase, s in row["seconds"].items())
        console.print(
            f"{row['target']} + {row['draft']} {row['video']:,} {row['passes']}, a request of {row['prompt_tokens']:,} "
            f"tokens with {row['rounds']} rounds, ms: {seconds}",
            highlight=False,
        )
    for label in record["not_run"]:
        console.print(f"not run for want of time: {label}", highlight=False)


def share(floor: float | None, ms: float) -> str:
    return "-" if floor is None else f"{100 * floor / ms:.0f}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench e2e", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", metavar="TARGET,DRAFT", help=f"two of: {', '.join(SIZES)}")
    parser.add_argument("--context", type=int, metavar="N", help="video tokens; default: 16384, 4096 and 65536")
    parser.add_argument("--passes", default="fused", help=f"comma-separated, of {', '.join(PASSES)} (default: fused)")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds of each kind (default 30)")
    parser.add_argument("--max-seconds", type=float, default=200, help="start nothing after this long (default 200)")
    parser.add_argument("--prefill", action="store_true", help="also run prompts: prefill, rating, pruning, recording")
    parser.add_argument("--gemms", action="store_true", help="only the matrix products")
    parser.add_argument("--sweep", action="store_true", help="only the configurations of skinny_gemm")
    parser.add_argument("--tiny-clips", type=int, metavar="N", help="only the trained tiny pair, on N held-out clips")
    parser.add_argument("--commit", help="the commit to record where the checkout has no .git")
    parser.add_argument("--json", metavar="OUT.json", help="write the record here")
    parser.add_argument("--timeline", metavar="OUT.png", help="draw one round of the first case here")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args(arguments)
    options.passes = options.passes.split(",")
    if unknown := set(options.passes) - set(PASSES):
        parser.error(f"--passes: expected any of {', '.join(PASSES)}, got {', '.join(sorted(unknown))}")
    options.pair = tuple(options.pair.split(",")) if options.pair else None
    if options.pair and (len(options.pair) != 2 or not set(options.pair) <= set(SIZES)):
        parser.error(f"--pair: expected two of {', '.join(SIZES)}, separated by a comma")
    if options.sweep and options.cpu_smoke:
        parser.error("--sweep: needs a GPU")
    if options.pair and SIZES[options.pair[0]].family != SIZES[options.pair[1]].family:
        parser.error("--pair: expected two models of one family")
    return options


def cases_of(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    cases = TINY if options.cpu_smoke else DEFAULT
    if options.pair:
        contexts = [options.context] if options.context else [16_384, 4096, 65_536]
        return [(*options.pair, context) for context in contexts]
    return [case for case in cases if options.context in (None, case[2])]


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.cpu_smoke and not torch.cuda.is_available():
        print("python -m bench e2e: no CUDA GPU here (--cpu-smoke tests the plumbing without one)", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    device = torch.device("cpu" if options.cpu_smoke else "cuda")
    if options.cpu_smoke:
        torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    timeline: list[Any] = []
    if options.tiny_clips:
        record = {"header": environment.header(device, options.commit)} | tiny_pair.run(
            options.tiny_clips, device, options.passes[0]
        )
        tiny_pair.print_record(record, console)
    elif options.sweep:
        record = {"header": environment.header(device, options.commit)} | gemms.sweep(device, options.max_seconds)
        gemms.print_sweep(record, console)
    elif options.gemms:
        record = {"header": environment.header(device, options.commit)} | gemms.run(device, options.max_seconds)
        gemms.print_record(record, console)
    else:
        bench = Bench(device, options.commit, options.rounds)
        timeline = bench.run(cases_of(options), options.passes, options.max_seconds, options.prefill)
        record = bench.record
        print_record(record, console)
    if options.json:
        report.save(record, options.json)
    if options.timeline and timeline:
        e2e_timeline.draw(timeline, options.timeline, record)
    failed = any("failed" in row for row in record.get("results", [])) or record.get("different", 0) > 0
    return 1 if failed else 0
