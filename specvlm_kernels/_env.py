"""Every environment variable the package reads at run time, read once at import.

SPECVLM_CHECK=1           check values that live on the device (lengths, indices) too; synchronises, for debugging
SPECVLM_CUDA_ARCHS        build time only, see setup.py
"""

import os

CHECK = os.environ.get("SPECVLM_CHECK", "0") not in ("", "0")
