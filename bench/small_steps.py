"""A round's small steps in one CUDA graph: everything between the model passes of a round with the paper's tree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console

from specvlm_kernels import SPECVLM_TREE

from . import environment
from .bench_compact_kv import CompactKV
from .bench_draft_topk import DraftTopk
from .bench_verify_greedy import VerifyGreedy
from .cases import Call, Case, Work
from .harness import Chip, Replay, make_sets, time_on_cpu
from .runner import Options

MUST_US = 60


@dataclass(frozen=True, kw_only=True)
class SmallSteps(Case):
    """Several ops' cases as one: their calls follow each other."""

    op = "small_steps"

    parts: tuple[Case, ...]

    @property
    def label(self) -> str:
        return ", ".join(f"{part.op} {part.label}" for part in self.parts)

    def inputs(self, device: torch.device, seed: int) -> Call:
        calls = tuple(part.inputs(device, seed) for part in self.parts)
        return Call(calls, moving=[tensor for call in calls for tensor in call.moving])

    def work(self) -> Work:
        works = [part.work() for part in self.parts]
        return Work(sum(work.bytes for work in works), sum(work.flops for work in works))

    def small(self) -> SmallSteps:
        return replace(self, parts=tuple(part.small() for part in self.parts))

    def run(self, call: Call, backend: str | None) -> None:
        for part, part_call in zip(self.parts, call.args):
            part.run(part_call, backend)


def a_round() -> SmallSteps:
    """draft_topk of every pass of the draft, acceptance, and the commit in a target's 64 and a draft's 28 layers."""
    widths = [1, *(len(level) for level in SPECVLM_TREE.levels[1:-1])]
    drafting = [DraftTopk(rows=rows) for rows in widths]
    commits = [CompactKV(layers=64), CompactKV(layers=28, kv_heads=4)]
    return SmallSteps(parts=(*drafting, VerifyGreedy(nodes=SPECVLM_TREE.num_nodes), *commits))


def measure(options: Options) -> dict[str, Any]:
    case = a_round()
    if options.device.type == "cuda":
        chip = Chip(options.device)
        calls = make_sets(case, chip)
        thunks = [lambda c=c: case.run(c, options.backend) for c in calls]
        timing = Replay(case, calls, thunks, chip).measure(options.seconds)
    else:
        case = case.small()
        call = case.inputs(options.device, 0)
        timing = time_on_cpu(call, lambda: case.run(call, options.backend))
    return {
        "header": environment.header(options.device, options.commit),
        "small_steps": {"label": case.label, "must": MUST_US, **asdict(timing)},
    }


def print_record(record: dict[str, Any], console: Console) -> None:
    console.print("  ".join(f"{key}: {value}" for key, value in record["header"].items()), highlight=False)
    row = record["small_steps"]
    color = "green" if row["us"] <= row["must"] else "red"
    console.print(f"{row['label']}", highlight=False)
    console.print(
        f"a round's small steps in one graph: [{color}]{row['us']:.1f} us[/] ({row['p10']:.1f}-{row['p90']:.1f}), "
        f"must {row['must']}",
        highlight=False,
    )
