"""Time against context length and against N, with the limit and the best peer, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import failed_ops

AXES = {"context": "context length (tokens)", "nodes": "tree nodes or text queries"}


def plot(record: dict[str, Any], path: str | Path) -> bool:
    """Draws the curves that the record has, one row of panels per op; False when there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["results"] if row["status"] == "ok" and row["op"] not in failed_ops(record)]
    panels = _panels(rows)
    if not panels or record["ceilings"] is None:
        return False
    ops = list(dict.fromkeys(op for op, _ in panels))
    figure, grid = pyplot.subplots(len(ops), len(AXES), figsize=(12, 4.5 * len(ops)), squeeze=False)
    for line, op in enumerate(ops):
        for axes, sweep in zip(grid[line], AXES):
            _draw(axes, op, sweep, panels.get((op, sweep), []))
    header = record["header"]
    figure.suptitle(f"{header['gpu']}, torch {header['torch']}, commit {header['commit']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _panels(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of each curve, by x; rows of the main table that lie on a curve (same shape but for x) belong to it."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["sweep"]:
            panels.setdefault((row["op"], row["sweep"]), []).append(row)
    for (op, sweep), points in panels.items():
        points += [row for row in rows if not row["sweep"] and row["op"] == op and _same(row, points[0], sweep)]
        points.sort(key=lambda row: row["x"][sweep])
    return panels


def _same(row: dict[str, Any], other: dict[str, Any], sweep: str) -> bool:
    varying = {"context": "contexts", "nodes": "nodes"}[sweep]
    a, b = ({k: v for k, v in r["shape"].items() if k not in (varying, "causal")} for r in (row, other))
    return a == b and len(row["shape"]["contexts"]) == 1


def _draw(axes: Any, op: str, sweep: str, points: list[dict[str, Any]]) -> None:
    if not points:
        axes.set_visible(False)
        return
    x = [row["x"][sweep] for row in points]
    axes.fill_between(x, [row["p10"] for row in points], [row["p90"] for row in points], alpha=0.2, color="C0")
    axes.plot(x, [row["us"] for row in points], "o-", color="C0", label=f"{op} ({points[0]['backend']})")
    axes.plot(x, [row["limit_us"] for row in points], "k--", linewidth=1, label="limit")
    for color, name in enumerate(dict.fromkeys(name for row in points for name in row["peers"]), 1):
        timed = [(row["x"][sweep], row["peers"][name]) for row in points if name in row["peers"]]
        timed = [(at, peer["us"]) for at, peer in timed if peer["status"] == "ok"]
        if timed:
            axes.plot(*zip(*timed), ".-", color=f"C{color}", linewidth=1, label=name)
    axes.set(yscale="log", xlabel=AXES[sweep], ylabel="us")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="both", which="both", labelsize=7)
    axes.set_title(points[0]["shape"]["model"], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
