"""One round, kernel by kernel: where the device's time goes, as a sum by kind and as a picture."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from specvlm_kernels.graphs import Program

KINDS = (  # the first that fits a kernel's name
    ("matrix products", re.compile(r"gemm|gemv|cutlass|nvjet|cublas|splitk|skinny|xmma", re.I)),
    ("attention", re.compile(r"attention|combine|flash|fmha", re.I)),
    ("vocabulary", re.compile(r"topk|verify|argmax|walk", re.I)),
    ("copies", re.compile(r"memcpy|memset", re.I)),
    ("small kernels", re.compile("")),
)
COLOURS = dict(zip((name for name, _ in KINDS), ("C0", "C1", "C2", "C7", "C3")))


@dataclass
class Kernel:
    """start and duration in milliseconds from the first kernel of the round."""

    name: str
    kind: str
    start: float
    duration: float


def trace(program: Program, device: torch.device) -> list[Kernel]:
    """The kernels of one run of a program, in order; empty where the profiler sees none."""

    def run() -> None:
        program.launch()
        program.wait({})

    return kernels_of(run, device)


def kernels_of(call: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """The kernels of one call, in order; empty where the profiler sees none."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize(device)
        events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError as error:
        print(f"no timeline: the profiler failed: {error}", file=sys.stderr)
        return []
    events.sort(key=lambda event: event.time_range.start)
    if not events:
        print("no timeline: the profiler saw no kernels", file=sys.stderr)
        return []
    origin = events[0].time_range.start
    return [
        Kernel(e.name, kind_of(e.name), (e.time_range.start - origin) / 1e3, e.time_range.elapsed_us() / 1e3)
        for e in events
    ]


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS if pattern.search(name))


def summary(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds by kind, and of the gaps between kernels; the profiler itself widens the gaps."""
    if not kernels:
        return {}
    sums = dict.fromkeys(COLOURS, 0.0)
    for kernel in kernels:
        sums[kernel.kind] += kernel.duration
    gaps, end = 0.0, 0.0
    for kernel in kernels:
        gaps += max(0.0, kernel.start - end)
        end = max(end, kernel.start + kernel.duration)
    return sums | {"gaps": gaps, "kernels": float(len(kernels))}


def draw(kernels: list[Kernel], path: str, record: dict[str, Any]) -> None:
    """The round over time, a lane for each kind, and a window of it wide enough to see single kernels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in COLOURS if any(kernel.kind == kind for kernel in kernels)]
    figure, panels = pyplot.subplots(2, 1, figsize=(14, 6))
    end = max(kernel.start + kernel.duration for kernel in kernels)
    for axes, (low, high) in zip(panels, ((0, end), (0.75 * end, 0.75 * end + min(2.0, end / 4)))):
        for lane, kind in enumerate(kinds):
            bars = [(k.start, k.duration) for k in kernels if k.kind == kind and low <= k.start <= high]
            axes.broken_barh(bars, (lane - 0.4, 0.8), color=COLOURS[kind])
        axes.set(xlim=(low, high), yticks=range(len(kinds)), yticklabels=kinds, xlabel="ms")
        axes.grid(axis="x", alpha=0.3)
    row, header = record["results"][0], record["header"]
    figure.suptitle(
        f"one round, {row['target']} + {row['draft']}, {row['video']:,} video tokens, passes {row['passes']}; "
        f"{header['gpu']}, commit {header['commit']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
