"""compact_kv: move the accepted path's keys and values into place, in every layer at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import Tier, extension, misaligned, register
from ..launches import Launch, launched
from ..reference.compact_kv import compact_kv as reference

OP = register("compact_kv")

# caches as lists of layers, or as a list of one stacked tensor of 5 dims
Call = tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor | None]


def compact_kv(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    *,
    page_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Commits an accepted path: K/V of node path[i] (position kv_lens+path[i]) moves to kv_lens+1+i, i < length;
    then kv_lens += length+1, for the root and the path.

    Paths ascend, so a row never moves up and overlaps are safe. An entry that is not above i or not below N stays
    where it is; nothing outside the caches is touched, and kv_lens stays within the capacity.

    Args:
        k_caches, v_caches: all layers, mutated: stacked [L,B,S,Hkv,D] or a list of [B,S,Hkv,D]; with page_table
            [L,P,page_size,Hkv,D] or a list of [P,page_size,Hkv,D]. Any dtype, any strides but a contiguous last dim.
        kv_lens: int32 [B], context tokens before the tree, mutated.
        path: int32 [B,N], from a Verdict: accepted nodes without the root, ascending; entries past length are ignored.
        length: int32 [B], accepted nodes, 0..N-1.
        page_table: int32 [B,max_pages], for paged caches; a page belongs to one request.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.compact_kv. Source: SpecVLM, section 3.3 (cache update after acceptance).
    """
    keys, values = _each(k_caches), _each(v_caches)
    options = (isinstance(k_caches, Tensor), isinstance(v_caches, Tensor), len(keys), backend)
    seen = (path, kv_lens, length, page_table), options, (*keys, *values)
    if OP.again(seen):
        return
    call = prepare(k_caches, v_caches, kv_lens, path, length, page_table=page_table)
    if path.shape[0]:
        OP.run(call, (), backend, seen)


def _each(caches: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors that caches consist of; none of what prepare will not have."""
    return (caches,) if isinstance(caches, Tensor) else caches if isinstance(caches, (list, tuple)) else ()


def prepare(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    *,
    page_table: Tensor | None = None,
) -> Call:
    """The checked inputs as the tiers take them: caches as lists, a stacked one as a list of one tensor."""
    sizes: check.Sizes = {}
    check.tensor("path", path, "B N", check.INT32, sizes)
    if sizes["N"] == 0:
        raise ValueError("path: expected at least one node (the root), got N=0")
    device = path.device
    k_list, capacity = _layers("k_caches", k_caches, page_table, sizes, device)
    v_list, _ = _layers("v_caches", v_caches, page_table, sizes, device)
    k_layers, v_layers = _count(k_list), _count(v_list)
    if k_layers != v_layers:
        raise ValueError(f"v_caches: expected {k_layers} layers as in k_caches, got {v_layers}")
    check.tensor("kv_lens", kv_lens, "B", check.INT32, sizes, device)
    check.tensor("length", length, "B", check.INT32, sizes, device)
    check.device_values("kv_lens", kv_lens, 0, capacity - 1)
    check.device_values("length", length, 0, sizes["N"] - 1)
    if page_table is not None:
        check.device_values("page_table", page_table, 0, sizes["P"] - 1)
    return k_list, v_list, kv_lens, path, length, page_table


def _layers(
    name: str,
    caches: Tensor | Sequence[Tensor],
    page_table: Tensor | None,
    sizes: check.Sizes,
    device: torch.device,
) -> tuple[list[Tensor], int]:
    """The layers as a list and the capacity in tokens per request."""
    if isinstance(caches, Tensor):
        if caches.dim() != 5 or caches.shape[0] == 0:
            raise ValueError(
                f"{name}: expected a stacked [L, ...] tensor of 5 dims or a list, got {list(caches.shape)}"
            )
        layers = [caches]
    elif isinstance(caches, (list, tuple)):
        if not caches:
            raise ValueError(f"{name}: expected at least one layer, got an empty list")
        layers = list(caches)
    else:
        raise TypeError(f"{name}: expected a stacked tensor or a list of tensors, got {type(caches).__name__}")
    first = layers[0][0] if isinstance(caches, Tensor) else layers[0]
    capacity = check.cache(name, first, page_table, (first.dtype,), sizes, device)
    for i, layer in enumerate(layers[1:], 1):
        check.cache(f"{name}[{i}]", layer, page_table, (first.dtype,), sizes, device)
    return layers, capacity


def _count(layers: list[Tensor]) -> int:
    return layers[0].shape[0] if layers[0].dim() == 5 else len(layers)


def _run(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    page_table: Tensor | None,
    backend: str | None,
) -> None:
    call = (k_caches, v_caches, kv_lens, path, length, page_table)
    OP.pick(backend, path.device, call)(*call)


torch.library.custom_op("specvlm::compact_kv", _run, mutates_args=("k_caches", "v_caches", "kv_lens")).register_fake(
    lambda *_: None
)


def _torch(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    page_table: Tensor | None,
) -> None:
    k, v = (caches[0] if caches[0].dim() == 5 else caches for caches in (k_caches, v_caches))
    reference(k, v, kv_lens, path, length, page_table=page_table)


def pointers(caches: Sequence[Tensor]) -> list[int]:
    """The address of every layer."""
    first, step = caches[0], _layer_step(caches)
    if step is None:
        return [layer.data_ptr() for layer in caches]
    return [first.data_ptr() + i * step for i in range(first.shape[0])]


def _layer_step(caches: Sequence[Tensor]) -> int | None:
    """Bytes from layer to layer of a stacked cache, None for a list."""
    first = caches[0]
    return first.stride(0) * first.element_size() if first.dim() == 5 else None


def layer_strides(caches: Sequence[Tensor]) -> tuple[int, ...]:
    """Strides of one layer in elements, without the last dim."""
    return caches[0].stride()[-4:-1]


def uneven_strides(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], *_: object) -> str | None:
    """The GPU kernels describe all layers by one set of strides."""
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        if any(layer.stride() != caches[0].stride() for layer in caches):
            return f"the layers of {name} have different strides"
    return None


def _cuda_missing(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], *rest: object) -> str | None:
    layers = _count(list(k_caches))
    if layers > MAX_CUDA_LAYERS:
        return f"at most {MAX_CUDA_LAYERS} layers go into one launch, got {layers}"
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        for layer in caches:
            if reason := misaligned(name, layer):
                return reason
    return uneven_strides(k_caches, v_caches)


MAX_CUDA_LAYERS = 128  # csrc/include/specvlm/compact_kv.h


def _cuda(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    page_table: Tensor | None,
) -> Launch:
    k = k_caches[0]
    item = k.element_size()
    outer, tokens, heads, d = k.shape[-4:]
    if page_table is None:
        capacity, pages, shift = tokens, 0, 0
    else:
        capacity, pages, shift = page_table.shape[1] * tokens, outer, tokens.bit_length() - 1
    prepared = extension()[0].CompactKv(
        layers=_count(list(k_caches)),
        k_layer_stride=_layer_step(k_caches),
        v_layer_stride=_layer_step(v_caches),
        k_strides=tuple(item * s for s in layer_strides(k_caches)),
        v_strides=tuple(item * s for s in layer_strides(v_caches)),
        path_stride=path.stride(0),
        page_table_stride=page_table.stride(0) if page_table is not None else 0,
        batch=path.shape[0],
        nodes=path.shape[1],
        capacity=capacity,
        pages=pages,
        page_shift=shift,
        heads=heads,
        head_vectors=d * item // 16,
    )
    return launched(prepared.launch, 0, path, kv_lens, length, page_table, *k_caches, *v_caches)


def _triton(*call: Any) -> None:
    from ..triton.compact_kv import compact_kv as kernel

    kernel(*call)


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=uneven_strides, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
