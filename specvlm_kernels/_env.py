"""Every environment variable the package reads at run time, read once at import.

SPECVLM_CHECK=1           check values that live on the device (lengths, indices) too; synchronises, for debugging
SPECVLM_CUDA_ARCH=80      take CUDA kernels of this architecture at most (80: none of those for Hopper), for comparisons
SPECVLM_CUDA_ARCHS        build time only, see setup.py
"""

import os

CHECK = os.environ.get("SPECVLM_CHECK", "0") not in ("", "0")


def _cuda_arch() -> int:
    text = os.environ.get("SPECVLM_CUDA_ARCH", "") or "999"
    if not text.isdecimal() or int(text) < 80:
        raise ValueError(f"SPECVLM_CUDA_ARCH: expected a number of at least 80, such as 80 or 90, got {text!r}")
    return int(text)


CUDA_ARCH = _cuda_arch()
