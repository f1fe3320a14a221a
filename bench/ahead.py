"""Compiling before anything is timed, in several processes: what they build stays in the caches on disk.

Triton takes 1 to 3 s a kernel, Inductor about as much a graph, FlashInfer's nvcc tens of seconds a module; one after
another that is most of a benchmark's time. The processes are gone before the first measurement.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

Task = tuple[Callable[..., None], tuple[Any, ...]]

MOST_JOBS = min(10, os.cpu_count() or 1)  # each holds a CUDA context and a set of inputs


def run(tasks: list[Task], jobs: int, seconds: float) -> list[bool]:
    """Runs tasks side by side for at most so long; says which ended. What fails is tried again where it counts.

    A process that dies takes its task with it, and the time limit ends the wait for it.
    """
    if not tasks:
        return []
    deadline = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(tasks))) as pool:
        results = [pool.apply_async(_quietly, task) for task in tasks]
        for result in results:
            result.wait(max(0.0, deadline - time.monotonic()))
        return [result.ready() for result in results]


def _quietly(task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(Exception):
        task(*arguments)
