"""Builds specvlm_kernels._C with CMake and ninja where nvcc is found; installs pure Python otherwise.

SPECVLM_CUDA_ARCHS   comma-separated, default "80,90a,100a,80+PTX" as far as this nvcc knows them; "none" skips CUDA
CUDACXX / CUDA_HOME  where nvcc is, if not on PATH
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

DEFAULT_ARCHS = "80,90a,100a,80+PTX"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    names = [os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc"]
    return next((name for name in names if name and Path(name).exists()), None)


def why_no_cuda() -> str | None:
    if os.environ.get("SPECVLM_CUDA_ARCHS", "").lower() == "none":
        return "it was installed with SPECVLM_CUDA_ARCHS=none"
    if find_nvcc() is None:
        return "nvcc was not found when it was installed: put it on PATH or set CUDA_HOME, and install again"
    return None


def architectures(nvcc: str) -> str:
    """What was asked for, or the default list as far as this compiler knows it."""
    asked = os.environ.get("SPECVLM_CUDA_ARCHS")
    if asked:
        return asked.replace(";", ",")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return ",".join(a for a in DEFAULT_ARCHS.split(",") if f"sm_{a.removesuffix('+PTX').rstrip('a')}" in known)


class CMakeBuild(build_ext):
    """One CMake build; the module is copied to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc = find_nvcc()
        assert nvcc is not None
        build_dir = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [
            "cmake",
            "--fresh",  # an isolated build leaves a cache that names its own, vanished ninja
            f"-S{Path(__file__).resolve().parent}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPECVLM_CUDA_ARCHS={architectures(nvcc)}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = build_dir.glob("_C*.so")
        shutil.copy2(built, target)


class BuildPy(build_py):
    """Writes down why the CUDA tier was left out, for `specvlm info`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            info = Path(self.build_lib) / "specvlm_kernels" / "_build_info.py"
            info.write_text(f'"""Written when the package was installed."""\n\nCUDA_SKIPPED = {SKIPPED!r}\n')


SKIPPED = why_no_cuda()
if SKIPPED:
    print(f"specvlm_kernels: no CUDA tier, {SKIPPED}", file=sys.stderr)

setup(
    packages=[
        "specvlm_kernels",
        "specvlm_kernels.integrations",
        "specvlm_kernels.ops",
        "specvlm_kernels.passes",
        "specvlm_kernels.reference",
        "specvlm_kernels.triton",
    ],
    package_dir={"specvlm_kernels.reference": "python_ref"},
    package_data={"specvlm_kernels": ["py.typed"]},
    ext_modules=[] if SKIPPED else [Extension("specvlm_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
