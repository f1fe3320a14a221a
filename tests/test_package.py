"""The wheel: pure Python without nvcc, and it says why the CUDA tier is missing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def wheel(folder: Path, **env: str) -> zipfile.ZipFile:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, env={**os.environ, **env}, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.parametrize(
    "env,reason",
    [
        ({"SPECVLM_CUDA_ARCHS": "none"}, "SPECVLM_CUDA_ARCHS=none"),
        (
            {"SPECVLM_CUDA_ARCHS": "", "PATH": str(Path(sys.executable).parent), "CUDA_HOME": "/nowhere"},
            "nvcc was not found",
        ),
    ],
    ids=["switched off", "no nvcc"],
)
def test_a_pure_wheel_holds_everything_and_says_why(env, reason, tmp_path):
    built = wheel(tmp_path, **env)
    assert built.filename is not None and built.filename.endswith("py3-none-any.whl")
    names = set(built.namelist())
    packages = {"specvlm_kernels": ROOT / "specvlm_kernels", "specvlm_kernels/reference": ROOT / "python_ref"}
    for prefix, folder in packages.items():
        for path in folder.rglob("*.py"):
            if path.name != "_build_info.py":
                assert f"{prefix}/{path.relative_to(folder)}" in names
    assert {"specvlm_kernels/py.typed"} <= names
    assert reason in built.read("specvlm_kernels/_build_info.py").decode()


def test_cmake_knows_every_source():
    text = (ROOT / "CMakeLists.txt").read_text()
    for path in (ROOT / "csrc").rglob("*.c*"):
        if path.suffix in (".cu", ".cpp"):
            assert str(path.relative_to(ROOT)) in text, f"{path} is not built"
