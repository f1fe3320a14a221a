"""Settings for every test: no hub, Triton's interpreter where there is no GPU, and an honest count of GPU tests."""

import os
from collections import Counter

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


@pytest.fixture(autouse=True)
def limited_architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark cuda_arch(80) takes kernels of that architecture at most, as SPECVLM_CUDA_ARCH=80 does."""
    mark = request.node.get_closest_marker("cuda_arch")
    if mark is not None:
        monkeypatch.setattr("specvlm_kernels._env.CUDA_ARCH", mark.args[0])


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90a"])
def cuda_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test of the CUDA tier with the kernel of sm_80 and with the device's own."""
    monkeypatch.setattr("specvlm_kernels._env.CUDA_ARCH", request.param)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A backend's stated limits skip a test; any other refusal of a named backend fails it."""
    from kit import KNOWN_LIMITS

    from specvlm_kernels import BackendUnavailableError

    outcome = yield
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], BackendUnavailableError):
        reason = next((limit for limit in KNOWN_LIMITS if limit in str(outcome.excinfo[1])), None)
        if reason is not None:
            outcome.force_exception(pytest.skip.Exception(f"limit of the kernel: {reason}", _use_item_location=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    without_gpu = sum("no NVIDIA GPU" in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"GPU tests not run, for want of an NVIDIA GPU: {without_gpu}")
    others = Counter(_reason(report) for report in skipped if "no NVIDIA GPU" not in str(report.longrepr))
    for reason, count in others.most_common():
        terminalreporter.write_line(f"skipped, {count}: {reason}")


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, in one line; the place is left out, so that equal reasons are counted together."""
    text = report.longrepr[-1] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
    return text.removeprefix("Skipped: ").split("\n")[0]
