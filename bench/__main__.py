"""`python -m bench [op ...]`: times every op against its peers and against what the chip allows.

    python -m bench                                    all ops, the best backend of each call
    python -m bench tree_attention --backend triton    one op, one backend
    python -m bench --json OUT.json --plot OUT.png     a record, and curves over context length and tree size
    python -m bench --compare A.json B.json            two records side by side
    python -m bench --readme README.md RECORD.json     the README's table, from a record
    python -m bench --overhead                         the CPU time of one eager call of each op
    python -m bench --small-steps                      a round's small steps in one CUDA graph
    python -m bench --list                             the cases; needs no GPU
    python -m bench --quick --cpu-smoke                the plumbing, on the CPU
    python -m bench e2e [--help]                       the decoding loop at full model size

Exits with 1 if a result was wrong or a call of ours failed; then no speed-up of that op is printed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from . import OPS, ahead, overhead, plot, report, small_steps
from .runner import Options, Runner, cases_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of {', '.join(OPS)}; all by default")
    parser.add_argument("--backend", choices=("cuda", "triton", "torch"), help="default: the best one for each call")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument(
        "--all-peers", action="store_true", help="every peer on every row, slow ones too; raise --max-seconds"
    )
    parser.add_argument("--no-peers", action="store_true", help="our own ops only")
    parser.add_argument("--max-seconds", type=float, default=330, help="start no case after this long (default 330)")
    parser.add_argument("--jobs", type=int, default=ahead.MOST_JOBS, help="processes that compile before the first row")
    parser.add_argument("--commit", help="the commit to record where the checkout has no .git")
    parser.add_argument("--json", metavar="OUT.json", help="write the record here")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the curves here")
    parser.add_argument("--from", dest="source", metavar="RECORD.json", help="show or plot a record; run nothing")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="two records side by side")
    parser.add_argument(
        "--readme", nargs="+", metavar=("README.md", "RECORD.json"), help="rewrite the README's tables, one a record"
    )
    parser.add_argument("--overhead", action="store_true", help="CPU time of eager calls instead of GPU time")
    parser.add_argument("--small-steps", action="store_true", help="a round's small steps in one CUDA graph")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny cases in the torch backend, without a GPU")
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(OPS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; expected any of {', '.join(OPS)}")
    return options


def options_of(args: argparse.Namespace) -> Options:
    return Options(
        ops=[op for op in OPS if not args.ops or op in args.ops],
        device=torch.device("cpu" if args.cpu_smoke or args.list else "cuda"),
        backend="torch" if args.cpu_smoke else args.backend,
        seconds=0.05 if args.quick else 0.2,
        max_seconds=args.max_seconds,
        ahead_seconds=args.max_seconds / 3,
        jobs=args.jobs,
        quick=args.quick,
        tiny=args.cpu_smoke,
        peers=not args.no_peers,
        all_peers=args.all_peers,
        commit=args.commit,
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["e2e"]:
        from . import e2e  # needs transformers

        return e2e.main(given[1:])
    args = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.compare:
        report.print_comparison(*map(report.load, args.compare), console)
        return 0
    if args.readme:
        try:
            report.update_readme(args.readme[0], list(map(report.load, args.readme[1:])))
        except ValueError as error:
            print(f"python -m bench: {error}", file=sys.stderr)
            return 2
        return 0
    options = options_of(args)
    if args.list:
        for op in options.ops:
            for case in cases_of(op, options):
                console.print(f"{op}: {case.label}", highlight=False)
        return 0
    if args.source:
        record = report.load(args.source)
    elif options.device.type == "cuda" and not torch.cuda.is_available():
        print("python -m bench: no CUDA GPU here (--cpu-smoke tests the plumbing without one)", file=sys.stderr)
        return 2
    else:
        if args.cpu_smoke:
            torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
        if args.overhead or args.small_steps:
            kind = overhead if args.overhead else small_steps
            record = kind.measure(options)
            kind.print_record(record, console)
            if args.json:
                report.save(record, args.json)
            return 0
        record = Runner(options).run()
    report.print_record(record, console)
    if args.json:
        report.save(record, args.json)
    if args.plot and not plot.plot(record, args.plot):
        console.print("nothing to plot: the record has no curve (they are left out by --quick and without a GPU)")
    return 1 if report.is_failure(record) else 0


if __name__ == "__main__":
    sys.exit(main())
