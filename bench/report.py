"""What a record says: tables for the terminal, two records side by side, and the README's table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import OPS

Record = dict[str, Any]
Row = dict[str, Any]

BEGIN = "<!-- benchmark results: begin -->"
END = "<!-- benchmark results: end -->"


def load(path: str | Path) -> Record:
    return json.loads(Path(path).read_text())


def save(record: Record, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def failed_ops(record: Record) -> list[str]:
    """Ops with a wrong result: none of their speed-ups is printed."""
    return [op for op in OPS if any(row["op"] == op and row["status"] == "wrong" for row in record["results"])]


def is_failure(record: Record) -> bool:
    """A wrong result, or an op of ours that raised: missing support and missing memory are not failures."""
    return "aborted" in record or any(row["status"] in ("wrong", "error") for row in record["results"])


def best_peer(row: Row, whole: bool) -> tuple[str, float] | None:
    """The fastest peer that does all (or only part) of the op's work, and its time over ours.

    A peer that could not be captured in a CUDA graph pays the host's time, so it counts only where ours does too.
    """
    if row["status"] != "ok":
        return None
    timed = {name: peer for name, peer in row["peers"].items() if peer["status"] == "ok" and peer["whole"] == whole}
    times = {name: peer["us"] for name, peer in timed.items() if peer["graph"] or not row["graph"]}
    if not times:
        return None
    name = min(times, key=lambda n: times[n])
    return name, times[name] / row["us"]


def geomean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def print_record(record: Record, console: Console) -> None:
    """The header, one table per op, and what was left out."""
    console.print("  ".join(f"{key}: {value}" for key, value in record["header"].items()), highlight=False)
    if record["ceilings"] is None:
        console.print("no GPU: a smoke run of the plumbing; these times mean nothing and are compared with nothing")
    else:
        read, matmul = record["ceilings"]["read_bytes_per_s"], record["ceilings"]["bf16_flop_per_s"]
        console.print(f"ceilings: read {read / 1e12:.2f} TB/s, bf16 matrix product {matmul / 1e12:.0f} TFLOP/s")
    for op in OPS:
        rows = [row for row in record["results"] if row["op"] == op]
        if rows:
            _print_op(op, rows, record, console)
    for name, reason in record["missing_peers"].items():
        console.print(f"missing peer: {name}: {reason}")
    if "aborted" in record:
        console.print(f"[red]stopped early: {record['aborted']}")
    console.print(f"{record['wall_s']} s; ~ marks calls that cannot be captured in a CUDA graph (host time included)")


def _print_op(op: str, rows: list[Row], record: Record, console: Console) -> None:
    on_gpu, on_h200 = record["ceilings"] is not None, "H200" in record["header"]["gpu"]
    trusted = on_gpu and op not in failed_ops(record)
    table = Table(title=op, title_justify="left", title_style="bold")
    table.add_column("shape", no_wrap=True)
    table.add_column("backend")
    columns = ["us", "p10-p90", "GB/s", "TFLOP/s", "% of limit", "x best peer", "x part-only peer"]
    for name in columns + (["must", "goal"] if on_h200 else []):
        table.add_column(name, justify="right", no_wrap=name != "x part-only peer")
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["label"], row.get("backend", "-"), _problem(row["status"]), "see below")
            continue
        us = row["us"]
        cells = [
            row["label"],
            row["backend"],
            f"{us:.1f}{'' if row['graph'] else '~'}",
            f"{row['p10']:.1f}-{row['p90']:.1f}",
            f"{row['bytes'] / us / 1e3:,.0f}",
            f"{row['flops'] / us / 1e6:,.0f}" if row["flops"] else "",
            f"{100 * row['limit_us'] / us:.0f}" if on_gpu else "",
            _speedup(row, True) if trusted else "",
            _speedup(row, False) if trusted else "",
        ]
        if on_h200:
            cells += [_target(us, row["must"]), _target(us, row["goal"])]
        table.add_row(*cells)
    console.print(table)
    _print_notes(op, rows, trusted, on_gpu, console)


def _problem(status: str) -> str:
    return f"[red]{status}" if status in ("wrong", "error") else f"[yellow]{status}"


def _target(us: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"[green]{target:g}" if us <= target else f"[red]{target:g}"


def _speedup(row: Row, whole: bool) -> str:
    best = best_peer(row, whole)
    return f"{best[1]:.2f} {best[0]}" if best else ""


def _print_notes(op: str, rows: list[Row], trusted: bool, on_gpu: bool, console: Console) -> None:
    for row in rows:
        if row["status"] != "ok" and row.get("detail"):
            console.print(f"  {row['label']}: {_problem(row['status'])}[/]: {row['detail']}")
        for name, peer in row["peers"].items():
            if peer["status"] != "ok":
                console.print(f"  {row['label']}: peer {name}: {peer['status']}: {peer.get('detail', '')}")
    if on_gpu and not trusted:
        console.print(f"[red]  {op}: a correctness check failed, so no speed-up is printed")
    if not trusted:
        return
    for whole, what in ((True, "the best peer"), (False, "the fastest that does part of the work")):
        ratios = [best[1] for row in rows if (best := best_peer(row, whole))]
        if ratios:
            console.print(f"  {op}: geomean over {len(ratios)} shapes: {geomean(ratios):.2f} x {what}")


def print_comparison(a: Record, b: Record, console: Console) -> None:
    """Two records, row by row: b's time over a's, below 1 where b is faster."""
    for name, record in (("A", a), ("B", b)):
        console.print(f"{name}: " + "  ".join(f"{k}: {v}" for k, v in record["header"].items()), highlight=False)
    if a["header"]["gpu"] != b["header"]["gpu"]:
        console.print("[yellow]different GPUs: the ratios compare chips as well as code")
    old = {(row["op"], row["label"]): row for row in a["results"] if row["status"] == "ok"}
    table = Table("op", "shape", "A", "A us", "B", "B us", "B/A")
    ratios: dict[str, list[float]] = {}
    for row in b["results"]:
        before = old.pop((row["op"], row["label"]), None)
        if before is None or row["status"] != "ok":
            continue
        ratio = row["us"] / before["us"]
        ratios.setdefault(row["op"], []).append(ratio)
        cells = [before["backend"], f"{before['us']:.1f}", row["backend"], f"{row['us']:.1f}", f"{ratio:.2f}"]
        table.add_row(row["op"], row["label"], *cells)
    console.print(table)
    for op, values in ratios.items():
        console.print(f"{op}: geomean of B/A over {len(values)} shapes: {geomean(values):.2f}")
    if old:
        console.print(f"only in A: {', '.join(' '.join(key) for key in old)}")


def markdown(record: Record) -> str:
    """A record's table for the README."""
    of_e2e = bool(record["results"]) and "round_ms" in record["results"][0]
    return _markdown_e2e(record) if of_e2e else _markdown_ops(record)


def _source(header: Row) -> str:
    return (
        f"{header['gpu']}, torch {header['torch']}, CUDA {header['cuda']}, commit {header['commit']}, {header['date']}."
    )


def _markdown_e2e(record: Record) -> str:
    """Decoding at full model size: milliseconds, and the round's speed-up at 4 tokens a round."""
    lines = [
        f"{_source(record['header'])} Random weights, acceptance simulated; in milliseconds. stock: a token of "
        "transformers' eager decoding, by the clock and its kernels alone; floor: weights and KV once at the measured "
        "read bandwidth.",
        "",
        "| pair | video tokens | stock (kernels) | plain token (floor) | verification, 26 nodes | draft, 5 passes "
        "(floor) | round | at 4 tokens a round: x stock (kernels), x plain |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["results"]:
        if "failed" in row:
            continue
        phases, floors, ms = row["phases_ms"], row["floors_ms"], row["round_ms"]
        stock, kernels, plain = row["stock_ms"], row["stock_kernels_ms"], row["plain_ms"]
        cells = [
            f"{row['target']} + {row['draft']}, {row['passes']}",
            f"{row['video']:,}",
            f"{stock:.1f} ({kernels:.1f})",
            f"{plain:.2f} ({floors['plain']:.2f})",
            f"{phases['verify']:.2f}",
            f"{phases['draft']:.2f} ({floors['round'] - floors['plain']:.2f})",
            f"{ms:.2f}",
            f"{4 * stock / ms:.2f} ({4 * kernels / ms:.2f}), {4 * plain / ms:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _markdown_ops(record: Record) -> str:
    """Every row that is not a point of a curve."""
    failed = failed_ops(record)
    lines = [
        f"{_source(record['header'])} Median over CUDA-graph replays with a cold L2, in microseconds; % of limit: "
        "against the larger of bytes over measured read bandwidth and flops over the measured bf16 matrix product.",
        "",
        "| op | shape | backend | us | % of limit | fastest peer | fastest that does part of the work |",
        "|---|---|---|--:|--:|---|---|",
    ]
    for row in record["results"]:
        if row["sweep"] or row["status"] != "ok" or row["op"] in failed or row["limit_us"] is None:
            continue
        cells = [
            row["op"],
            row["label"],
            row["backend"],
            f"{row['us']:.1f}",
            f"{100 * row['limit_us'] / row['us']:.0f}",
        ]
        cells += [_peer_cell(row, whole) for whole in (True, False)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _peer_cell(row: Row, whole: bool) -> str:
    best = best_peer(row, whole)
    return f"{best[0]}: {best[1] * row['us']:.1f} ({best[1]:.2f}x)" if best else ""


def update_readme(readme: str | Path, records: list[Record]) -> None:
    """Replaces what stands between the two marker comments of a README by the records' tables."""
    text = Path(readme).read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: expected one line {BEGIN!r} and, after it, one line {END!r}")
    before, rest = text.split(BEGIN)
    tables = "\n\n".join(map(markdown, records))
    Path(readme).write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}")
