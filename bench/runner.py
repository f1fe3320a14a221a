"""Runs cases: first an op's checks, then the times of the op and its peers. The outcome is a plain dict for JSON."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import specvlm_kernels as sk

from . import ahead, environment
from .cases import Call, Case, Peer, Thunk, close
from .harness import Chip, Replay, free_memory, make_sets, time_on_cpu

Row = dict[str, Any]

OWN_TASKS = 3  # processes that share the compilation of an op's rows


class DeviceLostError(RuntimeError):
    """The GPU answers nothing any more (an illegal access, say): whatever follows would fail for that reason."""


@dataclass
class Options:
    """What the command line chose."""

    ops: list[str]
    device: torch.device
    backend: str | None = None
    seconds: float = 0.2  # of samples per row; a peer gets half of it
    max_seconds: float = 330.0
    ahead_seconds: float = 110.0  # for compiling in `jobs` processes before anything is timed
    compile_seconds: float = 60.0  # for torch.compile's peers, all together, of what is left then
    jobs: int = 1
    quick: bool = False
    tiny: bool = False
    peers: bool = True
    all_peers: bool = False
    commit: str | None = None


def cases_of(op: str, options: Options) -> list[Case]:
    module = importlib.import_module(f"bench.bench_{op}")
    if options.tiny:
        return module.TINY
    return [case for case in module.CASES if case.quick or not options.quick]


def peers_of(case: Case, options: Options) -> list[Peer]:
    """The peers that a row is compared with by default, or all of them."""
    if not options.peers:
        return []
    if options.all_peers:
        return case.peers()
    wanted = [peer for peer in case.peers() if not peer.slow and (peer.curve or not case.sweep)]
    return [peer for peer in wanted if not peer.compiled or case.must is not None]


@dataclass
class Runner:
    """One run and its record; small shapes that several cases share are checked once."""

    options: Options
    record: dict[str, Any] = field(default_factory=dict)
    checked: dict[Any, list[str]] = field(default_factory=dict)
    agreed: dict[Any, bool] = field(default_factory=dict)
    unbuilt: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        options = self.options
        self.compile_left = options.compile_seconds
        self.chip = Chip(options.device) if options.device.type == "cuda" else None
        self.record = {
            "header": environment.header(options.device, options.commit),
            "ceilings": self.chip.ceilings() if self.chip else None,
            "missing_peers": {},
            "results": [],
        }
        free_memory()

    def run(self) -> dict[str, Any]:
        """Compiles, then checks and times everything; rows past the time limit are listed as not run."""
        began = time.perf_counter()
        if self.chip and self.options.jobs > 1:
            tasks = tasks_ahead(self.options)
            ended = ahead.run([task for _, task in tasks], self.options.jobs, self.options.ahead_seconds)
            self.unbuilt = {peer for (peer, _), done in zip(tasks, ended) if peer and not done}
            self.record["compiled_s"] = round(time.perf_counter() - began, 1)
            print(f"compiled for {self.record['compiled_s']} s", file=sys.stderr, flush=True)
        rows = [(case, self._new_row(case)) for op in self.options.ops for case in cases_of(op, self.options)]
        self.record["results"] = [row for _, row in rows]
        rows.sort(key=lambda pair: pair[0].sweep != "")
        try:
            for case, row in rows:
                if time.perf_counter() - began > self.options.max_seconds:
                    row["detail"] = f"the {self.options.max_seconds:.0f} s for the whole run were over"
                    continue
                self._run_case(case, row)
            # What torch.compile makes of a peer can bring the GPU down with it (an index out of bounds is a device-side
            # assert): last, when there is nothing else to lose.
            with contextlib.suppress(DeviceLostError):
                for case, row in rows:
                    if row["status"] == "ok" and any(peer.compiled for peer in peers_of(case, self.options)):
                        if time.perf_counter() - began > self.options.max_seconds:
                            break
                        free_memory()
                        self._time_peers(case, row, self._sets(case), compiled=True)
        except DeviceLostError as error:
            self.record["aborted"] = str(error)
        except KeyboardInterrupt:  # from a time limit outside, say: what was measured is kept
            self.record["aborted"] = "interrupted"
        self.record["wall_s"] = round(time.perf_counter() - began, 1)
        return self.record

    def _new_row(self, case: Case) -> Row:
        work = case.work()
        return {
            "op": case.op,
            "label": case.label,
            "shape": case.shape,
            "sweep": case.sweep,
            "x": case.x_values,
            "must": case.must,
            "goal": case.goal,
            "bytes": work.bytes,
            "flops": work.flops,
            "limit_us": self._limit_us(work.bytes, work.flops),
            "status": "not run",
            "peers": {},
        }

    def _limit_us(self, size: int, flops: int) -> float | None:
        ceilings = self.record["ceilings"]
        if ceilings is None:
            return None
        return 1e6 * max(size / ceilings["read_bytes_per_s"], flops / ceilings["bf16_flop_per_s"])

    def _run_case(self, case: Case, row: Row) -> None:
        print(f"{case.op}: {case.label}", file=sys.stderr, flush=True)
        free_memory()
        calls: list[Call] = []
        self._guard(row, lambda: self._time_op(case, row, calls))
        if row["status"] != "wrong" and calls:
            self._time_peers(case, row, calls, compiled=False)

    def _sets(self, case: Case) -> list[Call]:
        return make_sets(case, self.chip) if self.chip else [case.inputs(self.options.device, 0)]

    def _guard(self, row: Row, action: Callable[[], None]) -> None:
        """Runs an action; an exception goes into the row by its first line."""
        try:
            action()
        except sk.BackendUnavailableError as error:
            row.update(status="unsupported", detail=str(error))
        except torch.OutOfMemoryError:
            row.update(status="out of memory", detail="the GPU's memory did not suffice")
        except Exception as error:
            row.update(status="error", detail=first_line(error))
            self._require_device()

    def _require_device(self) -> None:
        if self.chip is None:
            return
        try:
            torch.cuda.synchronize(self.chip.device)
        except RuntimeError as error:
            raise DeviceLostError(first_line(error)) from error

    def _time_op(self, case: Case, row: Row, calls: list[Call]) -> None:
        """Fills calls, for the peers to share."""
        device = self.options.device
        calls += self._sets(case)
        backend = row["backend"] = self.options.backend or _best_backend(case, calls[0])
        small = case.small().bare()
        key = (small, backend)
        if key not in self.checked:
            self.checked[key] = small.check(device, backend)
        row["check"] = self.checked[key]
        if row["check"]:
            row.update(status="wrong", detail="; ".join(row["check"]))
            return
        thunks = [lambda c=c: case.run(c, backend) for c in calls]
        row.update(status="ok", **self._time(case, calls, thunks, self.options.seconds))

    def _time(self, case: Case, calls: list[Call], thunks: list[Thunk], seconds: float) -> dict[str, Any]:
        if self.chip:
            return asdict(Replay(case, calls, thunks, self.chip).measure(seconds))
        return asdict(time_on_cpu(calls[0], thunks[0]))

    def _time_peers(self, case: Case, row: Row, calls: list[Call], compiled: bool) -> None:
        for peer in peers_of(case, self.options):
            if peer.compiled != compiled:
                continue
            missing = peer.missing()
            if not missing and peer.name in self.unbuilt:  # minutes, once more, in the middle of the measurements
                missing = f"not built within {self.options.ahead_seconds:.0f} s"
            if missing:
                self.record["missing_peers"][peer.name] = missing
            elif peer.fits(case) is None:
                free_memory()
                entry: Row = {"whole": peer.whole, "status": "not run"}
                row["peers"][peer.name] = entry
                self._guard(entry, lambda p=peer, e=entry: self._time_peer(case, p, e, calls))

    def _time_peer(self, case: Case, peer: Peer, entry: Row, calls: list[Call]) -> None:
        thunks = self._compiled(case, peer, entry, calls) if peer.compiled else self._built(case, peer, entry, calls)
        if thunks:
            entry.update(status="ok", **self._time(case, calls, thunks, self.options.seconds / 2))

    def _compiled(self, case: Case, peer: Peer, entry: Row, calls: list[Call]) -> list[Thunk]:
        """Checked at its full size against our own, checked result: every other shape would be one more compilation."""
        if self.compile_left <= 0:
            entry["detail"] = f"the {self.options.compile_seconds:.0f} s for torch.compile were over"
            return []
        began = time.perf_counter()
        thunks = peer.build(case, calls)
        got = case.outputs(calls[0], thunks[0]())
        want = case.fresh(calls[0])[: len(got)]
        same = all(map(close, got, want))
        self.compile_left -= time.perf_counter() - began
        if not same:
            entry.update(status="wrong", detail="its result is not ours")
        return thunks if same else []

    def _built(self, case: Case, peer: Peer, entry: Row, calls: list[Call]) -> list[Thunk]:
        small = case.small().bare()
        key = (small, peer.name)
        if peer.whole and key not in self.agreed:
            self.agreed[key] = small.agrees(peer, self.options.device)
        if peer.whole and not self.agreed[key]:
            entry.update(status="wrong", detail="its result is not the reference's")
            return []
        return peer.build(case, calls)


def tasks_ahead(options: Options) -> list[tuple[str, ahead.Task]]:
    """What is worth compiling in other processes, the longest first: modules of peers, graphs, then our own kernels.

    A module comes with the name of its peer, everything else with "".
    """
    modules: dict[tuple[str, str], ahead.Task] = {}
    graphs: list[ahead.Task] = []
    own: list[ahead.Task] = []
    for op in options.ops:
        cases = cases_of(op, options)
        for i, case in enumerate(cases):
            for peer in peers_of(case, options):
                if peer.missing() or peer.fits(case):
                    continue
                if peer.module:
                    modules.setdefault((op, peer.name), (compile_peer, (op, i, peer.name, options)))
                elif peer.compiled:
                    graphs.append((compile_peer, (op, i, peer.name, options)))
        rows = [i for i, case in enumerate(cases) if not case.sweep]
        own += [(compile_own, (op, rows[first::OWN_TASKS], options)) for first in range(OWN_TASKS)]
    named = [(peer, task) for (_, peer), task in modules.items()]
    return [*named, *(("", task) for task in [*graphs, *own])]


def compile_peer(op: str, index: int, name: str, options: Options) -> None:
    case = cases_of(op, options)[index]
    peer = next(peer for peer in case.peers() if peer.name == name)
    case = case if peer.compiled else case.small().bare()
    peer.build(case, [case.inputs(options.device, 0)])[0]()


def compile_own(op: str, rows: list[int], options: Options) -> None:
    for case in (cases_of(op, options)[i] for i in rows):
        call = case.inputs(options.device, 0)
        backend = options.backend or _best_backend(case, call)
        with contextlib.suppress(sk.BackendUnavailableError):
            case.run(call, backend)
            case.small().bare().check(options.device, backend)
        free_memory()


def _best_backend(case: Case, call: Call) -> str:
    """The backend that this call takes by itself."""
    said = sk.explain(case.op, *call.args, **call.kwargs)
    found = re.match(rf"{case.op}: (\w+) runs this call", said)
    if found is None:
        raise RuntimeError(f"no backend runs this call: {said}")
    return found[1]


def first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"
