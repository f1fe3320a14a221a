"""Settings for every test: no hub, Triton's interpreter where there is no GPU, and an honest count of GPU tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process per core already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    without_gpu = sum("no NVIDIA GPU" in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"GPU tests not run, for want of an NVIDIA GPU: {without_gpu}")
