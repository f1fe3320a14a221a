"""Launches of the CUDA tier: checked and described to the extension once, then made again with addresses alone.

Checks, the choice of a tier and of a kernel, and whatever else the host decides follow from a call's signature: the
shapes, strides, dtypes and devices of its tensors, their addresses modulo 16, and its other arguments. An eager call
whose signature has been launched before (backend.Op.again) is therefore a look-up, the outputs' memory and the launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
# all of a call's arguments: the tensors that the CUDA tier reads, in its function's order; what is no tensor; and the
# outputs that the caller has allocated, which come before those that are to be made
Arguments = tuple[Tensors, tuple[Any, ...], Tensors]
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
PLAIN_OPTIONS = {bool, int, float, str, type(None)}
_ALREADY_THERE = contextlib.nullcontext()

# What compiled code of torch allocates with: torch.empty_strided(...) on the current device, at a quarter of the time.
empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


@dataclass
class Launch:
    """A kernel launch whose sizes and strides are settled.

    Args:
        function: takes the stream, the workspace's address, then the addresses of inputs and outputs.
        workspace: bytes, 0 for none.
        index: the CUDA device.
        addresses: of the tensors that it was first made with.
        made: the outputs that a call allocates, the last ones that function takes.
    """

    function: Callable[..., None]
    workspace: int
    index: int | None
    addresses: list[int]
    made: tuple[Layout, ...] = ()

    def __call__(self, addresses: list[int], given: Tensors) -> list[Any]:
        """Launches on tensors at these addresses, in the current stream; returns the outputs, given and made."""
        outputs = [*given]
        with on_device(self.index):
            for layout in self.made:
                output = empty(*layout)
                outputs.append(output)
                addresses.append(output.data_ptr())
            if self.workspace:
                workspace = empty((self.workspace,), (1,), torch.uint8)
                self.function(raw_stream(self.index), workspace.data_ptr(), *addresses)
            else:
                self.function(raw_stream(self.index), 0, *addresses)
        return outputs


def launched(function: Callable[..., None], workspace: int, first: Tensor, *others: Tensor | None) -> Launch:
    """Launches on these tensors, inputs before outputs; what comes back can be launched again."""
    addresses = [0 if x is None else x.data_ptr() for x in (first, *others)]
    launch = Launch(function, workspace, first.device.index, addresses)
    launch([*addresses], ())
    return launch


def describe(tensors: Tensors, given: Tensors) -> tuple[Hashable, list[int]] | None:
    """The layouts of a call's tensors and their addresses; None if there is more to one of them, or less.

    The extension has a faster one (backend.describer), for this takes most of the time of a call: 1 us a tensor.
    """
    layouts: list[Hashable] = []
    addresses = []
    try:
        for x in (*tensors, *given):
            if x is None:
                layouts.append(None)
                addresses.append(0)
            elif type(x) in PLAIN_TENSORS:
                address = x.data_ptr()
                layouts.append((type(x), x.shape, x.stride(), x.dtype, x.device, address % 16))
                addresses.append(address)
            else:
                return None
    except RuntimeError:  # without strides or memory of its own: sparse, or inside vmap
        return None
    return tuple(layouts), addresses


def on_device(index: int | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one. Where it already is, as nearly always, entering costs next to nothing."""
    return _ALREADY_THERE if index == torch._C._cuda_getDevice() else torch.cuda.device(index)


def raw_stream(index: int | None) -> int:
    """PyTorch's current stream as a number, without the Stream object of torch.cuda.current_stream."""
    return torch._C._cuda_getCurrentRawStream(index)  # type: ignore[arg-type]
