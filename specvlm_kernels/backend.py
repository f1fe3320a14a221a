"""Which tier runs a call: CUDA kernels, Triton kernels or plain torch, and why.

Each op registers its tiers once (specvlm_kernels/ops/<op>.py). A tier says in one sentence what it misses for
a given call, or None when it can run it; `pick` takes the first that can, or exactly the one that was named. What
has run in the CUDA tier runs there again without being asked, see launches.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _env
from .launches import PLAIN_OPTIONS, PLAIN_TENSORS, Arguments, Launch, Tensors, describe

BACKENDS = ("cuda", "triton", "torch")
MOST_LAUNCHES = 4096  # kept per op, a few KB each: more than a process has shapes at a time


class BackendUnavailableError(NotImplementedError):
    """A backend was named that cannot run this call; the message says what is missing."""


@dataclass
class Tier:
    """One backend of one op: missing(*call) -> reason or None, run(*call, *outputs) -> what can be launched again."""

    missing: Callable[..., str | None]
    run: Callable[..., Launch | None]


@dataclass
class Op:
    """An op's name and its tiers; on a GPU they are tried in the order of BACKENDS."""

    name: str
    tiers: dict[str, Tier] = field(default_factory=dict)
    launches: dict[Hashable, Launch] = field(default_factory=dict)

    def again(self, seen: Arguments) -> list[Any] | None:
        """Makes an eager call that is like one before and returns its outputs, those given and those made; or returns
        None: then it is to be checked, and made by `run`."""
        if torch.compiler.is_compiling() or not self.launches or _env.CHECK or torch._C._len_torch_dispatch_stack():
            return None
        tensors, options, given = seen
        described = describer()(tensors, given)
        if described is None:
            return None
        try:
            launch = self.launches.get(_signature(described[0], options))
        except TypeError:  # an option that cannot be hashed
            return None
        return None if launch is None else launch(described[1], given)

    def run(
        self,
        call: tuple[Any, ...],
        outputs: tuple[Tensor | None, ...],
        backend: str | None,
        seen: Arguments | None,
    ) -> None:
        """Makes a checked call, and keeps its launch for `again`; seen is None if the next one is to be checked too."""
        if torch.compiler.is_compiling():
            getattr(torch.ops.specvlm, self.name)(*call, *outputs, backend)
            return
        launch = self.pick(backend, device_of(call), call)(*call, *outputs)
        if launch is None or seen is None:
            return
        tensors, options, given = seen
        described = describer()(tensors, given)
        if described is None or not PLAIN_OPTIONS.issuperset(map(type, options)):
            return
        layouts, addresses = described
        if addresses != launch.addresses[: len(addresses)]:  # the kernel read or wrote a copy
            return
        made = [x for x in outputs[len(given) :] if x is not None]
        launch.made = tuple((tuple(x.shape), x.stride(), x.dtype) for x in made)
        if len(self.launches) >= MOST_LAUNCHES:
            self.launches.clear()
        self.launches[_signature(layouts, options)] = launch

    def pick(self, backend: str | None, device: torch.device, call: tuple[Any, ...]) -> Callable[..., Launch | None]:
        """The function that runs this call on tensors of this device."""
        if backend is None:
            return self.tiers[self.best(device, call)].run  # it has just been asked whether it can
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = self.missing(backend, device, call)
        if reason is not None:
            raise BackendUnavailableError(f'{self.name}: backend="{backend}" cannot run this call: {reason}')
        return self.tiers[backend].run

    def best(self, device: torch.device, call: tuple[Any, ...]) -> str:
        """The first backend that can run this call; on the CPU Triton's interpreter only runs when named."""
        if device.type == "cuda":
            for name in BACKENDS:
                if self.missing(name, device, call) is None:
                    return name
        return "torch"

    def missing(self, backend: str, device: torch.device, call: tuple[Any, ...]) -> str | None:
        """Why a backend cannot run this call, or None."""
        tier = self.tiers.get(backend)
        if tier is None:
            return f"{self.name} has no {backend} kernel yet"
        return device_missing(backend, device.type, device.index) or tier.missing(*call)

    def explain(self, device: torch.device, call: tuple[Any, ...]) -> str:
        reasons = {name: self.missing(name, device, call) for name in BACKENDS}
        lines = [f"{self.name}: {self.best(device, call)} runs this call"]
        lines += [f"  {name}: {reason or 'supported'}" for name, reason in reasons.items()]
        return "\n".join(lines)


OPS: dict[str, Op] = {}


def _signature(layouts: Hashable, options: tuple[Any, ...]) -> Hashable:
    return layouts, options, *map(type, options), _env.CUDA_ARCH  # types: 1, 1.0 and True are equal


def register(name: str) -> Op:
    return OPS.setdefault(name, Op(name))


@functools.cache
def extension() -> tuple[Any, str | None]:
    """(the pybind11 module specvlm_kernels._C, None), or (None, why it cannot be used)."""
    try:
        return importlib.import_module("specvlm_kernels._C"), None
    except ImportError as error:
        reason = str(error)
    try:
        reason = importlib.import_module("specvlm_kernels._build_info").CUDA_SKIPPED or reason
    except ImportError:
        pass
    return None, f"the extension specvlm_kernels._C is not there ({reason})"


@functools.cache
def describer() -> Callable[[Tensors, Tensors], tuple[Hashable, list[int]] | None]:
    """launches.describe, in C where torch lets C read its tensors (2.13 does)."""
    return extension()[0].describer(getattr(Tensor, "__dlpack_c_exchange_api__", None), PLAIN_TENSORS) or describe


@functools.cache
def triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


@functools.cache
def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on the CPU too."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def device_missing(backend: str, kind: str, index: int | None) -> str | None:
    """Why a tier cannot run on this device at all, or None."""
    if backend == "torch":
        return None
    if backend == "triton":
        if triton_missing():
            return triton_missing()
        if kind == "cpu" and not triton_interprets():
            return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
        return None if kind in ("cuda", "cpu") else f"the tensors are on {kind}"
    if kind != "cuda":
        return f"the tensors are on {kind}"
    module, reason = extension()
    if module is None:
        return reason
    capability = torch.cuda.get_device_capability(index)
    built = module.architectures()
    if not any(_runs_on(arch, capability) for arch in built):
        name = torch.cuda.get_device_name(index)
        return f"built for sm_{', sm_'.join(built)}, and {name} is sm_{capability[0]}{capability[1]}"
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture ("80", "90a", "80+PTX") runs on a device of this compute capability."""
    number = arch.removesuffix("+PTX")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if arch.endswith("+PTX"):
        return (major, minor) <= capability
    if arch[-1] == "a":
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


@functools.cache
def _built_architecture(index: int | None) -> int:
    """90 where kernels of sm_90a are built in and run on this CUDA device, otherwise 80."""
    hopper = torch.cuda.get_device_capability(index) == (9, 0) and "90a" in extension()[0].architectures()
    return 90 if hopper else 80


def architecture(index: int | None) -> int:
    """Which generation of CUDA kernels a device gets: 90 for Hopper's own, 80 for those that run on all."""
    return min(_built_architecture(index), _env.CUDA_ARCH)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Says which backend a call would take and what each of the others misses.

    Args:
        op: an op's name or function, such as "tree_attention" or specvlm_kernels.tree_attention.
        *args, **kwargs: the call's own arguments (nothing is run or written).

    Returns:
        One line for the choice, one for each backend.

    Raises:
        ValueError: no such op, or arguments that the op itself would refuse.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name!r}")
    prepare = importlib.import_module(f"specvlm_kernels.ops.{name}").prepare
    kwargs.pop("backend", None)
    call = prepare(*args, **kwargs)
    return OPS[name].explain(device_of(call), call)


def device_of(call: tuple[Any, ...]) -> torch.device:
    """The device of a call's first tensor."""
    first = call[0]
    return first.device if isinstance(first, Tensor) else first[0].device


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a multiprocessor of a CUDA device has."""
    return extension()[0].shared_memory(torch.cuda.current_device() if index is None else index)


def not_for_triton(x: Tensor, *, head_dim: int = 16) -> str | None:
    """What every Triton kernel says of float64, and the attention kernels of an odd head dim."""
    if x.dtype == torch.float64:
        return "the kernel takes bf16, fp16 and fp32, got torch.float64"
    return None if head_dim % 16 == 0 and head_dim <= 256 else f"D must be a multiple of 16 up to 256, got {head_dim}"


def misaligned(name: str, x: Tensor) -> str | None:
    """The CUDA kernels read 16 bytes at a time: base, strides and rows must be multiples of that."""
    sizes = x.shape[-1]
    for stride in x.stride()[:-1]:
        sizes |= stride
    if x.data_ptr() % 16 or sizes * x.element_size() % 16:
        return (
            f"{name} is not aligned to 16 bytes (address {x.data_ptr():#x}, shape {list(x.shape)}, "
            f"strides {tuple(x.stride())})"
        )
    return None


def not_for_cuda_logits(logits: Tensor, *, batch: int) -> str | None:
    """What the CUDA kernels over the vocabulary cannot take."""
    if logits.dtype == torch.float64:
        return "the kernel takes bf16, fp16 and fp32, got torch.float64"
    if logits.shape[-1] > 1 << 20:
        return f"at most {1 << 20} tokens in the vocabulary, got {logits.shape[-1]}"
    return None if batch <= 4096 else f"at most 4096 rows or requests in a call, got {batch}"


def logits_type(logits: Tensor) -> Any:
    """The extension's name of a dtype of logits."""
    names = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT32"}
    return getattr(extension()[0].LogitsType, names[logits.dtype])


def rows_aligned(logits: Tensor) -> bool:
    """Whether every row of logits starts at a multiple of 16 bytes; the kernels take any rows, these in fewer CTAs."""
    unit = 16 // logits.element_size()
    return logits.data_ptr() % 16 == 0 and not any(stride % unit for stride in logits.stride()[:-1])
