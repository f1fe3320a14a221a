"""The header of every record: where and with what it was measured."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import specvlm_kernels as sk

ROOT = Path(__file__).resolve().parent.parent


def header(device: torch.device, commit: str | None) -> dict[str, str]:
    """GPU, driver, versions, commit and date, as strings."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({platform.processor() or 'CPU'})"
    return {
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "specvlm_kernels": sk.__version__,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _commit() -> str:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = commit != "unknown" and _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") != ""
    return f"{commit}-dirty" if changed else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
