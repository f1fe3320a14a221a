"""Calls every op once on small shapes, for compute-sanitizer: `compute-sanitizer python -m bench.sanitize`.

Results are not looked at (tests do that); the sanitizer watches every access. PYTORCH_NO_CUDA_MEMORY_CACHING=1
gives every tensor an allocation of its own, so that an access past its end is seen.
"""

from __future__ import annotations

import argparse
import sys

import torch

import specvlm_kernels as sk
from specvlm_kernels import _env

from . import OPS
from .runner import Options, cases_of

# backend and newest architecture of its kernels; on Hopper some ops have one of its own, and one for all others
KERNELS = {"cuda": ("cuda", _env.CUDA_ARCH), "cuda-sm80": ("cuda", 80), "triton": ("triton", _env.CUDA_ARCH)}
SM80_TOO = ("tree_attention", "token_scores", "select_tokens")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="all by default")
    parser.add_argument("--backend", choices=KERNELS, action="append", help="default: all")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench.sanitize: no CUDA GPU here", file=sys.stderr)
        return 2
    device, called = torch.device("cuda"), 0
    for op in args.ops or OPS:
        options = Options([op], device, quick=True)
        small = dict.fromkeys(case.small().bare() for case in cases_of(op, options))
        for case in small:
            for kernel in args.backend or KERNELS:
                if kernel == "cuda-sm80" and op not in SM80_TOO:
                    continue
                backend, _env.CUDA_ARCH = KERNELS[kernel]
                try:
                    case.run(case.inputs(device, 0), backend)
                except sk.BackendUnavailableError as error:
                    print(f"not called: {error}")
                    continue
                torch.cuda.synchronize()
                called += 1
                print(f"called: {op} {kernel}: {case.label}")
    print(f"{called} calls")
    return 0 if called else 1


if __name__ == "__main__":
    sys.exit(main())
