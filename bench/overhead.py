"""What a call costs the CPU in eager mode: checks, dispatch and launches, without waiting for the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import specvlm_kernels as sk

from . import environment
from .cases import Call, Thunk
from .runner import Options, cases_of

MUST_US = 15
CALLS = 10  # between two waits: at most 20 launches a call, far below the 1,024 after which a launch blocks
BATCHES = 40
YARDSTICK = "x.add_(1), 16 numbers: how fast this host is"


def cpu_us(thunk: Thunk, restore: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """(mean, fastest batch) in microseconds of one call of several hundred."""
    batches = BATCHES if device.type == "cuda" else 2
    per_call = []
    for batch in range(batches + 2):
        restore()
        _wait(device)
        began = time.perf_counter()
        for _ in range(CALLS):
            thunk()
        ended = time.perf_counter()
        if batch >= 2:
            per_call.append((ended - began) / CALLS * 1e6)
    _wait(device)
    return statistics.mean(per_call), min(per_call)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: Options) -> dict[str, Any]:
    """A record with one entry per op and backend, None being the call's own choice; for each op's first shape.

    The first entry is a yardstick for the host: one small op of torch's own.
    """
    x = torch.zeros(16, device=options.device)
    mean, fastest = cpu_us(lambda: x.add_(1), Call((x,)).restore, options.device)
    entries = [{"op": "torch", "label": YARDSTICK, "backend": "torch", "mean_us": mean, "fastest_us": fastest}]
    for op in options.ops:
        case = cases_of(op, options)[0]
        call = case.inputs(options.device, 0)
        named = ("torch",) if options.device.type == "cpu" else ("cuda", "triton")
        for backend in (options.backend,) if options.backend else (None, *named):
            try:
                mean, fastest = cpu_us(partial(case.run, call, backend), call.restore, options.device)
            except sk.BackendUnavailableError:
                continue
            entries.append({"op": op, "label": case.label, "backend": backend, "mean_us": mean, "fastest_us": fastest})
    return {"header": environment.header(options.device, options.commit), "overhead": entries}


def print_record(record: dict[str, Any], console: Console) -> None:
    console.print("  ".join(f"{key}: {value}" for key, value in record["header"].items()), highlight=False)
    table = Table("op", "shape", "backend", "mean us", "fastest us", title="CPU time of an eager call")
    for entry in record["overhead"]:
        color = "green" if entry["mean_us"] <= MUST_US else "red"
        cells = [f"[{color}]{entry['mean_us']:.1f}", f"{entry['fastest_us']:.1f}"]
        table.add_row(entry["op"], entry["label"], entry["backend"] or "default", *cells)
    console.print(table)
    console.print(f"must: {MUST_US} us; means over {CALLS * BATCHES} calls, a wait for the GPU after every {CALLS}")
