"""`python -m bench.tune [op ...]`: which configuration of each Triton kernel is fastest, shape by shape.

    python -m bench.tune --json OUT.json               all ops that have a config(...), about 3 minutes on an H200
    python -m bench.tune tree_attention token_scores   some ops
    python -m bench.tune --list                        shapes and candidates; needs no GPU
    python -m bench.tune draft_topk --cpu-smoke        the plumbing, in Triton's interpreter (TRITON_INTERPRET=1)

For every shape it times the present choice of specvlm_kernels/triton/<op>.py and the candidates of bench/spaces.py.
The candidates of an op's later stages change the best of the stages before. A candidate must give the present
choice's result, and one that wins must pass the benchmark's check too. Candidates that do not compile or do not fit
the chip are listed with the reason. Exits with 1 if the present choice itself failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import ahead, environment, report
from .cases import Call, Case, close
from .harness import Chip, Replay, Timing, free_memory, make_sets, time_on_cpu
from .runner import DeviceLostError, first_line
from .spaces import SPACES, Knobs, arguments_of, candidates, changed, compile_candidate, configured, shapes

SECONDS = 0.1  # of samples per candidate
NOISE = 0.98  # a candidate wins when its time is below this share of the present choice's

Row = dict[str, Any]


class OutOfTimeError(RuntimeError):
    """The time for the whole run is over."""


@dataclass
class Tuner:
    """One run: on a GPU, or (tiny) in Triton's interpreter."""

    device: torch.device
    deadline: float
    tiny: bool = False

    def __post_init__(self) -> None:
        self.chip = Chip(self.device) if self.device.type == "cuda" else None

    def tune(self, op: str, case: Case, row: Row) -> None:
        """Fills the row: the present choice, every candidate, and the best of them."""
        free_memory()
        calls = make_sets(case, self.chip) if self.chip else [case.inputs(self.device, 0)]
        out = calls[0].kwargs.get("out")
        self.blank = out.clone() if out is not None else None
        arguments = arguments_of(op, case, calls[0])
        row["arguments"] = list(arguments)
        problems = self._check(op, case, {})
        if problems:
            row.update(status="wrong", detail="; ".join(problems))
            return
        with configured(op, changed(op, {})):
            want = self._outputs(case, calls[0])
            present = self._time(case, calls)
        row["present"] = {"config": changed(op, {})(*arguments), **asdict(present)}
        best: tuple[float, Knobs] = (present.us, {})
        for stage in SPACES[op].stages:
            tried = candidates(op, arguments, best[1], stage)[: 2 if self.tiny else None]
            timed = [(self._try(op, case, calls, want, knobs, config, row), knobs) for knobs, config in tried]
            for us, knobs in sorted(((us, knobs) for us, knobs in timed if us), key=lambda pair: pair[0]):
                if us >= best[0] * NOISE:
                    break
                wrong = self._check(op, case, knobs)
                if not wrong:
                    best = (us, knobs)
                    break
                row["refused"].append({"config": changed(op, knobs)(*arguments), "reason": "; ".join(wrong)})
        row.update(status="ok", best={"config": changed(op, best[1])(*arguments), "us": best[0]})

    def _try(
        self, op: str, case: Case, calls: list[Call], want: list[Tensor], knobs: Knobs, config: Row, row: Row
    ) -> float | None:
        """Microseconds of one candidate, or None and an entry in the row that says why not."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError("the time for the whole run was over")
        try:
            with configured(op, changed(op, knobs)):
                got = self._outputs(case, calls[0])
                if not all(map(close, got, want)):
                    row["refused"].append({"config": config, "reason": "its result is not the present choice's"})
                    return None
                timing = self._time(case, calls)
        except Exception as error:
            row["refused"].append({"config": config, "reason": first_line(error)})
            self._require_device()
            return None
        row["candidates"].append({"config": config, **asdict(timing)})
        return timing.us

    def _outputs(self, case: Case, call: Call) -> list[Tensor]:
        """Copies of what a run from fresh outputs gives."""
        call.restore()
        if self.blank is not None:
            call.kwargs["out"].copy_(self.blank)
        return [x.clone() for x in case.outputs(call, case.run(call, "triton"))]

    def _check(self, op: str, case: Case, knobs: Knobs) -> list[str]:
        with configured(op, changed(op, knobs)):
            return case.small().bare().check(self.device, "triton")

    def _time(self, case: Case, calls: list[Call]) -> Timing:
        thunks = [lambda c=c: case.run(c, "triton") for c in calls]
        if self.chip:
            return Replay(case, calls, thunks, self.chip).measure(SECONDS)
        return time_on_cpu(calls[0], thunks[0], samples=2)

    def _require_device(self) -> None:
        if self.chip is None:
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLostError(first_line(error)) from error


def run(args: argparse.Namespace, ops: list[str]) -> Row:
    began = time.monotonic()
    deadline = began + args.max_seconds
    device = torch.device("cpu" if args.cpu_smoke else "cuda")
    record: Row = {"header": environment.header(device, args.commit), "results": []}
    if not args.cpu_smoke and args.jobs > 1:
        tasks = [(compile_candidate, (op, number)) for op in ops for number in range(len(SPACES[op].stages[0]))]
        ahead.run(tasks, args.jobs, args.max_seconds / 2)
        record["compiled_s"] = round(time.monotonic() - began, 1)
        print(f"compiled in {record['compiled_s']} s", file=sys.stderr, flush=True)
    tuner = Tuner(device, deadline, args.cpu_smoke)
    rows = [(op, case) for op in ops for case in shapes(op, args.cpu_smoke)]
    for op, case in rows:
        row: Row = {"op": op, "label": case.label, "status": "not run", "candidates": [], "refused": []}
        record["results"].append(row)
        if time.monotonic() > deadline:
            row["detail"] = "the time for the whole run was over"
            continue
        print(f"{op}: {case.label}", file=sys.stderr, flush=True)
        try:
            tuner.tune(op, case, row)
        except OutOfTimeError as error:
            row["detail"] = str(error)
        except DeviceLostError as error:
            row["detail"] = record["aborted"] = str(error)
            break
        except Exception as error:
            row.update(status="error", detail=first_line(error))
    record["wall_s"] = round(time.monotonic() - began, 1)
    return record


def _text(config: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def print_record(record: Row, console: Console) -> None:
    """What could not be used, then one table per op with the best configuration of every shape."""
    console.print("  ".join(f"{key}: {value}" for key, value in record["header"].items()), highlight=False)
    for row in record["results"]:
        for entry in row["refused"]:
            text = f"{row['op']}: {row['label']}: not usable: {_text(entry['config'])}: {entry['reason']}"
            console.print(text, highlight=False, markup=False)
    for op in dict.fromkeys(row["op"] for row in record["results"]):
        table = Table("shape", "present us", "best us", "gain", "best configuration", title=op, title_justify="left")
        for row in (row for row in record["results"] if row["op"] == op):
            if row["status"] != "ok":
                table.add_row(row["label"], row["status"], "", "", row.get("detail", ""))
                continue
            present, best = row["present"], row["best"]
            kept = best["config"] == present["config"]
            cells = [f"{present['us']:.1f}", f"{best['us']:.1f}", f"{present['us'] / best['us']:.2f}"]
            table.add_row(row["label"], *cells, f"{_text(best['config'])}{' (as it is)' if kept else ''}")
        console.print(table)
    if "aborted" in record:
        console.print(f"stopped early, the GPU failed: {record['aborted']}", markup=False)
    console.print(f"{record['wall_s']} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of {', '.join(SPACES)}; all by default")
    parser.add_argument("--max-seconds", type=float, default=240, help="for the whole run (default 240)")
    parser.add_argument("--jobs", type=int, default=ahead.MOST_JOBS, help="processes that compile")
    parser.add_argument("--json", metavar="OUT.json", help="write every time here")
    parser.add_argument("--commit", help="the commit to record where the checkout has no .git")
    parser.add_argument("--list", action="store_true", help="list shapes and candidates")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes, two candidates a stage, without a GPU")
    args = parser.parse_args(arguments)
    unknown = set(args.ops) - set(SPACES)
    if unknown:
        parser.error(f"no configurations of {', '.join(sorted(unknown))}; expected any of {', '.join(SPACES)}")
    ops = [op for op in SPACES if not args.ops or op in args.ops]
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.list:
        for op in ops:
            for case in shapes(op):
                console.print(f"{op}: {case.label}", highlight=False)
            for number, stage in enumerate(SPACES[op].stages, 1):
                for knobs in stage:
                    console.print(f"{op}: stage {number}: {_text(knobs)}", highlight=False)
        return 0
    if not args.cpu_smoke and not torch.cuda.is_available():
        print("python -m bench.tune: no CUDA GPU here (--cpu-smoke tests the plumbing without one)", file=sys.stderr)
        return 2
    record = run(args, ops)
    print_record(record, console)
    if args.json:
        report.save(record, args.json)
    return 1 if "aborted" in record or any(row["status"] in ("wrong", "error") for row in record["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
