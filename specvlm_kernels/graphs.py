"""Runs the steps of a round over static tensors: as CUDA graphs, recorded once and replayed, or call by call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _env

Step = Callable[[], None]


def enabled(graphs: bool | None, device: torch.device) -> bool:
    """Whether to record graphs: as asked, or wherever it can be done."""
    refusal = None
    if device.type != "cuda":
        refusal = f"CUDA graphs need an NVIDIA GPU, the model is on {device}"
    elif _env.CHECK:
        refusal = "SPECVLM_CHECK=1 reads values on the host, which a CUDA graph cannot"
    if graphs and refusal:
        raise ValueError(f"graphs: {refusal}")
    return refusal is None if graphs is None else graphs


def record(step: Step, pool: Any) -> Step:
    """Records what a step launches into a CUDA graph, without running it; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        step()
    return graph.replay


def new_pool() -> Any:
    """Memory that graphs share when they are always replayed one after the other, in the order of recording."""
    return torch.cuda.graph_pool_handle()


class Program:
    """Steps in a fixed order over tensors that stay where they are, and a small result that the host reads.

    Steps only launch work: they read no value on the host, wait for nothing and always launch the same. What they
    hand on lives in tensors that outlive the recording.

    Args:
        steps: (phase, step) in order; neighbours of one phase become one graph.
        state: tensors that a run advances. Recording needs a warm-up run, after which these are put back.
        result: what the host reads after each run, one small tensor.
        graphs: record on the first `prepare`.
    """

    def __init__(self, steps: Sequence[tuple[str, Step]], state: Sequence[Tensor], result: Tensor, *, graphs: bool):
        self._steps = [
            (phase, [step for _, step in group]) for phase, group in itertools.groupby(steps, lambda pair: pair[0])
        ]
        self._state, self._result, self._graphs = list(state), result, graphs
        self._replays: list[tuple[str, Step]] = []
        on_gpu = result.device.type == "cuda"
        self._host = torch.empty(result.shape, dtype=result.dtype, pin_memory=on_gpu)
        self._marks: list[Any] = [_mark(on_gpu) for _ in range(len(self._steps) + 1)]
        self._read = _mark(on_gpu)

    def _device(self) -> AbstractContextManager[Any]:
        """Makes the result's GPU the current one: events and recordings belong to its streams."""
        return torch.cuda.device(self._result.device) if self._result.is_cuda else nullcontext()

    @property
    def ready(self) -> bool:
        return bool(self._replays)

    def prepare(self) -> None:
        """Makes the steps ready to run; with graphs, warms them up and records them. All or nothing."""
        if self.ready:
            return
        calls = [(phase, _together(steps)) for phase, steps in self._steps]
        if self._graphs:
            calls = self._recorded(calls)
        self._replays = calls

    def _recorded(self, calls: list[tuple[str, Step]]) -> list[tuple[str, Step]]:
        before = [tensor.clone() for tensor in self._state]
        try:
            with self._device():
                for _, call in calls:  # compiles kernels, loads modules, makes the libraries' handles and workspaces
                    call()
                pool = new_pool()
                return [(phase, record(call, pool)) for phase, call in calls]
        finally:
            for tensor, value in zip(self._state, before):
                tensor.copy_(value)

    def launch(self) -> None:
        """Starts one run; returns at once where the device is asynchronous."""
        with self._device():
            self._marks[0].record()
            for (_, replay), mark in zip(self._replays, self._marks[1:]):
                replay()
                mark.record()
            self._host.copy_(self._result, non_blocking=True)
            self._read.record()

    def wait(self, seconds: dict[str, float]) -> list[Any]:
        """The result of the run, once it is there; adds the device time of each phase to `seconds`."""
        self._read.synchronize()
        for (phase, _), start, end in zip(self._replays, self._marks, self._marks[1:]):
            seconds[phase] = seconds.get(phase, 0.0) + start.elapsed_time(end) / 1e3
        return self._host.tolist()


def _together(steps: Sequence[Step]) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def _mark(on_gpu: bool) -> Any:
    return torch.cuda.Event(enable_timing=True) if on_gpu else _HostMark()


class _HostMark:
    """A point in time where calls are synchronous, with the interface of torch.cuda.Event."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: _HostMark) -> float:
        return (end._at - self._at) * 1e3

    def synchronize(self) -> None:
        pass
