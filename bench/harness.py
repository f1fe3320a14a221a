"""Timing: CUDA-graph replays with a cold L2, and the ceilings of the chip measured the same way.

One replay runs through several sets of inputs. Before each replay, outside of the timed region, the tensors that
calls advance (kv_lens) are put back and a buffer eight times the L2 is read. That fills the L2 with clean lines of
something else, and keeps the GPU busy while the host enqueues the graph, so no launch latency is timed. Within a
replay a set of inputs is used again only when the other sets together are more than twice the L2.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .cases import Call, Case, Thunk

MAX_SETS = 64
MIN_REPLAY_US = 300.0  # shorter replays would time the events
MIN_SAMPLES, MAX_SAMPLES = 5, 200


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile over `samples` replays of `calls` calls each.

    graph is False for calls that cannot be captured: those are timed one by one, the host's time included.
    """

    us: float
    p10: float
    p90: float
    samples: int
    calls: int
    graph: bool

    @classmethod
    def of(cls, per_call_us: Sequence[float], calls: int, graph: bool) -> Timing:
        deciles = statistics.quantiles(per_call_us, n=10, method="inclusive")
        return cls(statistics.median(per_call_us), deciles[0], deciles[-1], len(per_call_us), calls, graph)


class Chip:
    """The GPU that is measured: its L2, and the buffer that empties it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.ones(8 * self.l2_bytes // 4, device=device)

    def empty_l2(self) -> None:
        self._flush.sum()

    def ceilings(self) -> dict[str, float]:
        """Read bandwidth (torch.sum) in bytes/s and bf16 matrix product in flop/s."""
        free, _ = torch.cuda.mem_get_info(self.device)
        size = min(2 << 30, free // 4) // 4 * 4
        read_s = self._median_s(torch.randn(size // 4, device=self.device).sum)
        n = 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        matmul_s = self._median_s(lambda: a @ b)
        return {"read_bytes_per_s": size / read_s, "bf16_flop_per_s": 2 * n**3 / matmul_s}

    def _median_s(self, thunk: Thunk, samples: int = 20) -> float:
        thunk()
        pairs = [_timed(thunk) for _ in range(samples)]
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _timed(thunk: Thunk) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    thunk()
    end.record()
    return start, end


def make_sets(case: Case, chip: Chip) -> list[Call]:
    """Enough sets of inputs that all but one are more than twice the L2, at most 64 and half of the free memory."""
    before = torch.cuda.memory_allocated(chip.device)
    free, _ = torch.cuda.mem_get_info(chip.device)
    first = case.inputs(chip.device, 0)
    used = max(torch.cuda.memory_allocated(chip.device) - before, 1)
    count = min(MAX_SETS, _sets_past_l2(case, chip), free // 2 // used)
    return [first, *(case.inputs(chip.device, seed) for seed in range(1, count))]


def _sets_past_l2(case: Case, chip: Chip) -> int:
    return 1 + math.ceil(2 * chip.l2_bytes / case.work().bytes)


class Replay:
    """Calls captured in one CUDA graph, or kept as they are when they synchronise with the host."""

    def __init__(self, case: Case, calls: list[Call], thunks: list[Thunk], chip: Chip) -> None:
        self.chip = chip
        moving = [tensor for call in calls for tensor in call.moving]
        start = [tensor for call in calls for tensor in call.start]
        self.restore = partial(torch._foreach_copy_, moving, start) if moving else _nothing
        pass_us = self._warm_up(thunks)
        repeats = 1
        if not moving and len(thunks) >= _sets_past_l2(case, chip):
            repeats = max(1, min(32, math.ceil(MIN_REPLAY_US / pass_us)))
        self.thunks = thunks * repeats
        self.graph: torch.cuda.CUDAGraph | None = None
        if not self._synchronises(thunks[0]):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                for thunk in self.thunks:
                    thunk()
        self.cold()

    def _warm_up(self, thunks: list[Thunk]) -> float:
        """Runs every thunk twice on a side stream, as capture wants it; returns the microseconds of one pass."""
        stream = torch.cuda.Stream(self.chip.device)
        stream.wait_stream(torch.cuda.current_stream(self.chip.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.restore()
                start, end = _timed(lambda: [thunk() for thunk in thunks])
        torch.cuda.current_stream(self.chip.device).wait_stream(stream)
        torch.cuda.synchronize(self.chip.device)
        return start.elapsed_time(end) * 1e3

    def _synchronises(self, thunk: Thunk) -> bool:
        """A call that waits for the GPU would break the capture; PyTorch can say so beforehand."""
        self.restore()
        torch.cuda.set_sync_debug_mode("error")
        try:
            thunk()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def cold(self) -> None:
        """Puts the moving tensors back and empties the L2."""
        self.restore()
        self.chip.empty_l2()

    def run(self) -> None:
        if self.graph is None:
            for thunk in self.thunks:
                thunk()
        else:
            self.graph.replay()

    def measure(self, seconds: float) -> Timing:
        if self.graph is None:
            return self._measure_calls(seconds)
        per_replay = self._repeat(self.run, seconds)
        calls = len(self.thunks)
        return Timing.of([us / calls for us in per_replay], calls, graph=True)

    def _measure_calls(self, seconds: float) -> Timing:
        turn = itertools.cycle(self.thunks)
        return Timing.of(self._repeat(lambda: next(turn)(), seconds), 1, graph=False)

    def _repeat(self, thunk: Thunk, seconds: float) -> list[float]:
        """Microseconds of each run, as many as fit the time, every one from a cold L2."""
        began = time.perf_counter()
        self.cold()
        thunk()
        torch.cuda.synchronize(self.chip.device)
        each = max(time.perf_counter() - began, 1e-6)
        pairs = []
        for _ in range(max(MIN_SAMPLES, min(MAX_SAMPLES, int(seconds / each)))):
            self.cold()
            pairs.append(_timed(thunk))
        torch.cuda.synchronize(self.chip.device)
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _nothing() -> None:
    """For calls that move nothing on."""


def time_on_cpu(call: Call, thunk: Thunk, samples: int = 3) -> Timing:
    """For the smoke run without a GPU: wall time, nothing to be proud of."""
    times = []
    for _ in range(samples):
        call.restore()
        began = time.perf_counter()
        thunk()
        times.append((time.perf_counter() - began) * 1e6)
    return Timing.of(times, 1, graph=False)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
