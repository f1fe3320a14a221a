"""A CUDA graph on the CPU: records what a step launches, and replays it on the same tensors.

Like a CUDA graph it freezes what Python decided and where every tensor lies, and refuses what a capture refuses:
reading a value on the host, shapes that depend on values, tensors made from host values. Ops of the package are
single nodes, as they are tested on their own; their torch tier reads values where the GPU kernels do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from specvlm_kernels import backend, graphs

aten = torch.ops.aten
REFUSED = {
    "_local_scalar_dense": "reads a value on the host",
    "equal": "reads a value on the host",
    "is_nonzero": "reads a value on the host",
    "nonzero": "has a shape that depends on values",
    "masked_select": "has a shape that depends on values",
    "repeat_interleave": "has a shape that depends on values",
    "lift_fresh": "makes a tensor from host values",
}
REFUSED_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


class CaptureError(RuntimeError):
    """What a CUDA graph could not record."""


class Recording(TorchDispatchMode):
    current: Recording | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise CaptureError(f"{func} {REFUSED[name]}")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise CaptureError(f"{func} with a bool index has a shape that depends on values")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def op(self, run: Callable) -> Callable:
        def node(*args):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                run(*args)
            self.calls.append((run, args, {}, None))

        return node

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _NoHostReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in REFUSED_METHODS:
            raise CaptureError(f"{func.__name__} reads a value on the host")
        return func(*args, **(kwargs or {}))


def record(step: Callable[[], None], pool: object) -> Callable[[], None]:
    recording = Recording()
    Recording.current = recording
    try:
        with _NoHostReads(), recording:
            step()
    finally:
        Recording.current = None
    return recording.replay


@contextmanager
def recorded_graphs(monkeypatch) -> Iterator[list]:
    """Decoders made inside record their rounds; yields the list of what was recorded."""
    made: list = []

    def counted(step, pool):
        replay = record(step, pool)
        made.append(replay)
        return replay

    pick = backend.Op.pick

    def pick_node(self, *args):
        run = pick(self, *args)
        return run if Recording.current is None else Recording.current.op(run)

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "record", counted)
        patch.setattr(graphs, "new_pool", lambda: None)
        patch.setattr(graphs, "enabled", lambda wanted, device: wanted is not False)
        patch.setattr(backend.Op, "pick", pick_node)
        yield made
