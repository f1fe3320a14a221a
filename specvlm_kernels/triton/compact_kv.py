"""compact_kv in Triton: one program moves a block of columns of one layer's K or V for one request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.compact_kv import layer_strides, pointers

ROWS = 8  # rows in flight: paths of static trees are rarely longer
COLUMNS = 512


@triton.jit
def _offset(page_table, page_table_stride, request, position, s_outer, s_token, pages, page_size, PAGED: tl.constexpr):
    if PAGED:
        page = tl.load(page_table + request * page_table_stride + position // page_size)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        return page.to(tl.int64) * s_outer + (position % page_size).to(tl.int64) * s_token
    else:
        return request.to(tl.int64) * s_outer + position.to(tl.int64) * s_token


@triton.jit
def _compact_kv_kernel(
    addresses,  # int64 [2L]: keys of all layers, then values
    kv_lens,
    path,
    length,
    page_table,
    like,  # any tensor of the caches' dtype
    k_outer,
    k_token,
    k_head,
    v_outer,
    v_token,
    v_head,
    path_stride,
    page_table_stride,
    layers,
    nodes,
    capacity,
    pages,
    page_size,
    columns,
    head_dim,
    PAGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(2)
    is_value = tl.program_id(1) >= layers
    s_outer = tl.where(is_value, v_outer, k_outer).to(tl.int64)
    s_token = tl.where(is_value, v_token, k_token).to(tl.int64)
    s_head = tl.where(is_value, v_head, k_head).to(tl.int64)
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(like.dtype.element_ty))

    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_offset = (column // head_dim) * s_head + column % head_dim
    context = tl.minimum(tl.maximum(tl.load(kv_lens + request), 0), capacity)
    accepted = tl.minimum(tl.maximum(tl.load(length + request), 0), nodes - 1)
    for first in range(0, accepted, ROWS):
        i = first + tl.arange(0, ROWS)
        node = tl.load(path + request * path_stride + i, mask=i < accepted, other=0)
        moves = (node > i + 1) & (node < nodes) & (node < capacity - context)
        source = tl.where(moves, context + node, 0)
        target = tl.where(moves, context + 1 + i, 0)
        from_row = _offset(page_table, page_table_stride, request, source, s_outer, s_token, pages, page_size, PAGED)
        to_row = _offset(page_table, page_table_stride, request, target, s_outer, s_token, pages, page_size, PAGED)
        live = moves[:, None] & (column < columns)[None, :]
        data = tl.load(cache + from_row[:, None] + column_offset[None, :], mask=live)
        tl.debug_barrier()  # a row may be another row's target: every load comes before any store
        tl.store(cache + to_row[:, None] + column_offset[None, :], data, mask=live)


@triton.jit
def _advance_kernel(kv_lens, length, batch, nodes, capacity, BLOCK: tl.constexpr):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    context = tl.minimum(tl.maximum(tl.load(kv_lens + b, mask=b < batch, other=0), 0), capacity)
    accepted = tl.minimum(tl.maximum(tl.load(length + b, mask=b < batch, other=0), 0), nodes - 1)
    room = capacity - context
    tl.store(kv_lens + b, context + tl.minimum(accepted + 1, room), mask=b < batch)


_tables: OrderedDict[tuple, Tensor] = OrderedDict()  # least recently used first
_captured_tables: dict[tuple, Tensor] = {}  # graphs keep their addresses for good
_MAX_TABLES = 64


def _address_table(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 [2L] on the device. A kernel argument cannot hold a list, so tables are copied once and kept."""
    key = (device, *pointers(k_caches), *pointers(v_caches))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _captured_tables.get(key)
    if table is None:
        table = _tables.pop(key, None)
    if table is None:
        if capturing:
            raise RuntimeError("compact_kv: call it once on these caches before capturing it in a graph")
        table = torch.tensor(key[1:], dtype=torch.int64, device=device)
    if capturing:
        _captured_tables[key] = table
    else:
        _tables[key] = table
        while len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    return table


def compact_kv(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    kv_lens: Tensor,
    path: Tensor,
    length: Tensor,
    page_table: Tensor | None,
) -> None:
    k = k_caches[0]
    layers = k.shape[0] if k.dim() == 5 else len(k_caches)
    outer, tokens, heads, d = k.shape[-4:]
    b, n = path.shape
    paged = page_table is not None
    capacity = tokens * (page_table.shape[1] if page_table is not None else 1)
    grid = (triton.cdiv(heads * d, COLUMNS), 2 * layers, b)
    _compact_kv_kernel[grid](
        _address_table(k_caches, v_caches, path.device),
        kv_lens,
        path,
        length,
        page_table if page_table is not None else path,
        k,
        *layer_strides(k_caches),
        *layer_strides(v_caches),
        path.stride(0),
        page_table.stride(0) if page_table is not None else 0,
        layers,
        n,
        capacity,
        outer,
        tokens,
        heads * d,
        d,
        PAGED=paged,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    _advance_kernel[(triton.cdiv(b, 128),)](kv_lens, length, b, n, capacity, BLOCK=128, num_warps=4)
