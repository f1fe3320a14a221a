"""What a benchmark case is: inputs, work, a correctness check and peers. bench/bench_<op>.py fills it in."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import specvlm_kernels as sk
from specvlm_kernels import reference

Thunk = Callable[[], Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Call:
    """The arguments of one call; `moving` lists the tensors that a call advances, and restore puts them back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    moving: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = [tensor.clone() for tensor in self.moving]

    def restore(self) -> None:
        if self.moving:
            torch._foreach_copy_(self.moving, self.start)


@dataclass(frozen=True)
class Work:
    """Each input read once, each output written once, and the multiply-adds (two each) of the matrix products."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of an op's table. must and goal: microseconds on an H200, from the first measurements of the peers.

    Args:
        sweep: "context" or "nodes" puts the row on that curve of the plot (and after all other rows).
        quick: runs with --quick too.
    """

    op: ClassVar[str]
    COMMON: ClassVar[tuple[str, ...]] = ("must", "goal", "sweep", "quick")

    must: float | None = None
    goal: float | None = None
    sweep: str = ""
    quick: bool = False

    @property
    def label(self) -> str:
        """The row's name; with the op it identifies the row in every record."""
        raise NotImplementedError

    @property
    def shape(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.COMMON}

    @property
    def x_values(self) -> dict[str, int]:
        """Where the row lies on the curve of its sweep."""
        return {}

    def inputs(self, device: torch.device, seed: int) -> Call:
        """Random inputs: contents vary with the seed, lengths and indices do not."""
        raise NotImplementedError

    def work(self) -> Work:
        raise NotImplementedError

    def peers(self) -> list[Peer]:
        return []

    def small(self) -> Case:
        """The same kind of call at a size that the dense reference takes in its stride."""
        raise NotImplementedError

    def bare(self) -> Case:
        """The case without its place in the tables: equal for two rows that are one check."""
        return replace(self, must=None, goal=None, sweep="", quick=False)

    def outputs(self, call: Call, returned: Any) -> list[Tensor]:
        """What a call has produced, for comparison."""
        return [returned] if isinstance(returned, Tensor) else list(returned)

    def run(self, call: Call, backend: str | None) -> Any:
        return getattr(sk, self.op)(*call.args, **call.kwargs, backend=backend)

    def reference(self, call: Call) -> Any:
        return getattr(reference, self.op)(*call.args, **call.kwargs)

    def fresh(self, call: Call) -> list[Tensor]:
        """What the best backend gives for a call, in new tensors; not for ops that change their inputs."""
        kwargs = {name: value for name, value in call.kwargs.items() if name != "out"}
        return self.outputs(call, self.run(Call(call.args, kwargs), None))

    def check(self, device: torch.device, backend: str) -> list[str]:
        """What is wrong with this case's results, by the reference; index results must be bitwise equal."""
        call, twin = self.inputs(device, 0), self.inputs(device, 0)
        got = self.outputs(call, self.run(call, backend))
        want = self.outputs(twin, self.reference(twin))
        return [
            f"output {i}: {int((g != w).sum())} of {w.numel()} values differ from the reference"
            for i, (g, w) in enumerate(zip(got, want))
            if not torch.equal(g, w)
        ]

    def agrees(self, peer: Peer, device: torch.device) -> bool:
        """Whether a peer computes the same thing, up to rounding, as the reference."""
        call, twin = self.inputs(device, 0), self.inputs(device, 0)
        got = self.outputs(call, peer.build(self, [call])[0]())
        want = self.outputs(twin, self.reference(twin))
        return all(close(g, w) for g, w in zip(got, want))


@dataclass(frozen=True)
class Peer:
    """Somebody else's way of doing the work.

    Args:
        build: (case, calls) -> one thunk per call; setup that a server would do once stays outside of the thunks.
        whole: whether it does all of the op's work; if not, `name` says what it leaves out.
        module: what must be importable.
        slow: takes long to compile; only with --all-peers.
        compiled: torch.compile, once per row: on the rows with a target, on others only with --all-peers.
        curve: also on the rows of a curve; other peers only with --all-peers.
        fits: (case) -> why it cannot run this case, or None.
    """

    name: str
    build: Callable[[Any, list[Call]], list[Thunk]]
    whole: bool = True
    module: str | None = None
    slow: bool = False
    compiled: bool = False
    curve: bool = False
    fits: Callable[[Any], str | None] = lambda _: None

    def missing(self) -> str | None:
        """Why the peer cannot be had on this machine, or None."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def close(got: Tensor, want: Tensor) -> bool:
    """Equal integers, or floats that differ by rounding."""
    if not want.is_floating_point():
        return torch.equal(got.to(want.dtype), want)
    got, want = got.double().reshape(want.shape), want.double()
    return bool((got - want).norm() <= 3e-2 * want.norm())


def rounding_problems(outputs: Iterable[tuple[str, Tensor, Tensor, Tensor]]) -> list[str]:
    """The float rule, for (name, got, float64 reference, plain PyTorch in the inputs' dtype): an error of at most
    twice plain PyTorch's own, plus one rounding of the output."""
    problems = []
    for name, got, want, plain in outputs:
        error = (got.double() - want).abs().max().item()
        plain_error = (plain.double() - want).abs().max().item()
        allowed = 2 * plain_error + torch.finfo(got.dtype).eps * want.abs().max().item()
        if math.isnan(error) or error > allowed:
            problems.append(f"{name}: error {error:.2e} against float64, allowed {allowed:.2e}")
    return problems
