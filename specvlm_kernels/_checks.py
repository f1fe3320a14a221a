"""Argument checks: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _env

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
BOOL = (torch.bool,)

Sizes = dict[str, int]


def tensor(
    name: str,
    x: Any,
    dims: str,
    dtypes: tuple[torch.dtype, ...],
    sizes: Sizes,
    device: torch.device | None = None,
) -> Tensor:
    """Checks one tensor against dims such as "B N Hq D"; sizes maps the letters seen so far to numbers and grows."""
    # every eager call comes through here several times: each attribute of x is read once (0.1 to 0.3 us a read)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_one_of(dtypes)}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    letters, shape = dims.split(), x.shape
    if len(shape) != len(letters):
        raise ValueError(f"{name}: expected shape [{', '.join(letters)}], got {list(shape)}")
    size = 1
    for letter, size in zip(letters, shape):
        want = sizes.setdefault(letter, size)
        if want != size:
            raise ValueError(f"{name}: expected shape [{', '.join(letters)}] with {letter}={want}, got {list(shape)}")
    if size > 1 and not x.is_contiguous() and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dim (stride 1), got strides {tuple(x.stride())}")
    return x


def _one_of(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(d) for d in dtypes]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def integer(name: str, x: Any, low: int, high: int | None = None) -> int:
    """An int in low..high (inclusive)."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    if x < low or (high is not None and x > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}: expected at least {low}{upper}, got {x}")
    return x  # type: ignore[return-value]


def real(name: str, x: Any, low: float, high: float = math.inf, *, low_open: bool = False) -> float:
    """A finite float in [low, high], or (low, high] with low_open."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(x).__name__}")
    if not math.isfinite(x) or x < low or x > high or (low_open and x == low):
        raise ValueError(f"{name}: expected a finite value in {'(' if low_open else '['}{low}, {high}], got {x}")
    return float(x)


def cache(name: str, x: Any, page_table: Tensor | None, dtypes: Any, sizes: Sizes, device: torch.device) -> int:
    """A contiguous-batch or paged KV cache; returns its capacity in tokens per request."""
    if page_table is None:
        tensor(name, x, "B S Hkv D", dtypes, sizes, device)
        return sizes["S"]
    tensor("page_table", page_table, "B max_pages", INT32, sizes, device)
    tensor(name, x, "P page_size Hkv D", dtypes, sizes, device)
    size = sizes["page_size"]
    if size < 1 or size & (size - 1):
        raise ValueError(f"{name}: expected page_size to be a power of two, got {size}")
    return sizes["max_pages"] * size


def heads(sizes: Sizes) -> None:
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"q: expected Hq to be a multiple of Hkv={sizes['Hkv']}, got Hq={sizes['Hq']}")


def device_values(name: str, x: Tensor | None, low: int, high: int) -> None:
    """With SPECVLM_CHECK=1: every value of x in low..high. A no-op, and no synchronisation, otherwise."""
    if not _env.CHECK or x is None or x.numel() == 0 or torch.compiler.is_compiling():
        return
    least, most = int(x.min()), int(x.max())
    if least < low or most > high:
        raise ValueError(f"{name}: expected values in {low}..{high}, got {least}..{most}")
