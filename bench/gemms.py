"""The matrix products of a decoding pass at few rows: bytes of weights per second, cuBLAS against skinny_gemm."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .e2e_models import SIZES
from .harness import Chip, free_memory

MODELS = ("Qwen2.5-VL-32B", "Qwen2.5-VL-7B", "Qwen2.5-VL-3B")
ROWS = (1, 4, 26)


def run(device: torch.device, max_seconds: float) -> dict[str, Any]:
    """Every product of every model; weights rotate over more than twice the L2, so each call reads them from memory."""
    began = time.perf_counter()
    on_gpu = device.type == "cuda"
    chip = Chip(device) if on_gpu else None
    results: list[dict[str, Any]] = []
    models = MODELS if on_gpu else ("tiny Qwen2.5-VL",)
    for model in models:
        for name, (columns, depth) in SIZES[model].products().items():
            if time.perf_counter() - began > max_seconds:
                break
            results += [_row(model, name, rows, columns, depth, chip, device) for rows in ROWS]
            free_memory()
    return {"ceilings": chip.ceilings() if chip else None, "gemms": results}


def _row(
    model: str, name: str, rows: int, columns: int, depth: int, chip: Chip | None, device: torch.device
) -> dict[str, Any]:
    dtype = torch.bfloat16 if chip else torch.float32
    size = columns * depth * dtype.itemsize
    copies = 2 + 2 * chip.l2_bytes // size if chip else 1
    weights = [torch.randn(columns, depth, dtype=dtype, device=device) for _ in range(copies)]
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    exact = x.double() @ weights[0].double().T
    row: dict[str, Any] = {"model": model, "product": name, "rows": rows, "N": columns, "K": depth, "bytes": size}
    for label, linear in products(device).items():
        error = float((linear(x, weights[0]).double() - exact).norm() / exact.norm())
        row[label] = {"us": _us(linear, x, weights, chip), "error": error}
    return row


def products(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is compared; another candidate is one line."""
    choices: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cuBLAS": torch.nn.functional.linear}
    if device.type == "cuda":
        from specvlm_kernels.triton import skinny_gemm

        choices["skinny"] = skinny_gemm.linear
    return choices


def _us(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor], chip: Chip | None) -> float:
    """Median microseconds of a call, over graph replays of one call for each copy of the weights."""

    def calls() -> None:
        for weight in weights:
            linear(x, weight)

    if chip is None:
        started = time.perf_counter()
        calls()
        return (time.perf_counter() - started) * 1e6 / len(weights)
    side = torch.cuda.Stream(chip.device)
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize(chip.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    pairs = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        chip.empty_l2()
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(chip.device)
    return statistics.median(s.elapsed_time(e) for s, e in pairs) * 1e3 / len(weights)


SWEEP_BLOCKS = ((64, 128, 4, 4), (64, 64, 6, 4), (64, 256, 3, 4), (128, 64, 4, 4), (128, 64, 5, 8), (128, 128, 3, 8))
SWEEP_SPLITS = (1, 2, 3, 4, 6, 8)
SWEEP = (("Qwen2.5-VL-32B", 26), ("Qwen2.5-VL-7B", 4), ("Qwen2.5-VL-3B", 4))


def sweep(device: torch.device, max_seconds: float) -> dict[str, Any]:
    """Every product of the passes that a round is made of under every configuration of skinny_gemm.config."""
    from specvlm_kernels.triton import skinny_gemm

    began, results = time.perf_counter(), []
    chip, config = Chip(device), skinny_gemm.config
    try:
        for model, rows in SWEEP:
            for name, (columns, depth) in SIZES[model].products().items():
                copies = 2 + 2 * chip.l2_bytes // (columns * depth * 2)
                weights = [torch.randn(columns, depth, dtype=torch.bfloat16, device=device) for _ in range(copies)]
                x = torch.randn(rows, depth, dtype=torch.bfloat16, device=device)
                times = {"cuBLAS": _us(torch.nn.functional.linear, x, weights, chip)}
                for (n, k, stages, warps), splits in itertools.product(SWEEP_BLOCKS, SWEEP_SPLITS):
                    if time.perf_counter() - began > max_seconds:
                        break
                    chosen = dict(ROWS=16 if rows <= 16 else 32, BLOCK_N=n, BLOCK_K=k, SPLITS=splits)
                    chosen |= dict(num_stages=stages, num_warps=warps)
                    skinny_gemm.config = lambda *_, chosen=chosen: dict(chosen)
                    label = f"{n}x{k} stages {stages} warps {warps} splits {splits}"
                    times[label] = _us(skinny_gemm.linear, x, weights, chip)
                skinny_gemm.config = config
                times["config()"] = _us(skinny_gemm.linear, x, weights, chip)
                size = columns * depth * 2
                results.append({"model": model, "product": name, "rows": rows, "bytes": size, "us": times})
                free_memory()
    finally:
        skinny_gemm.config = config
    return {"ceilings": chip.ceilings(), "sweep": results}


def print_sweep(record: dict[str, Any], console: Console) -> None:
    for row in record["sweep"]:
        best = sorted(row["us"].items(), key=lambda item: item[1])[:4]
        known = [(name, row["us"][name]) for name in ("cuBLAS", "config()")]
        text = "; ".join(f"{name} {us:.1f} us {row['bytes'] / us / 1e3:.0f} GB/s" for name, us in [*known, *best])
        console.print(f"{row['model']} {row['product']} {row['rows']} rows: {text}", highlight=False)


def print_record(record: dict[str, Any], console: Console) -> None:
    labels = [key for key in record["gemms"][0] if isinstance(record["gemms"][0][key], dict)]
    table = Table("model", "product", "N x K", "rows", *(f"{label} us" for label in labels),
                  *(f"{label} GB/s" for label in labels), *(f"{label} error" for label in labels))  # fmt: skip
    for row in record["gemms"]:
        table.add_row(
            row["model"],
            row["product"],
            f"{row['N']} x {row['K']}",
            str(row["rows"]),
            *(f"{row[label]['us']:.1f}" for label in labels),
            *(f"{row['bytes'] / row[label]['us'] / 1e3:.0f}" for label in labels),
            *(f"{row[label]['error']:.1e}" for label in labels),
        )
    console.print(table)
