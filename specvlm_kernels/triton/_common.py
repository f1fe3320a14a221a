"""What several Triton kernels share: cache addresses, an exact order of floats, facts about the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend

CPU_MULTIPROCESSORS = 8  # what TRITON_INTERPRET=1 pretends to run on: enough to exercise every split

NAN_OR_LOWEST = tl.constexpr(-0x7F800000)  # order_key of -inf


@triton.jit
def cache_rows(position, outer_stride, token_stride, request, page_table, table_stride, pages, PAGE_BITS):
    """int64 element offsets of cache positions, which must lie within the capacity."""
    if page_table is None:
        return request.to(tl.int64) * outer_stride + position.to(tl.int64) * token_stride
    else:
        page = tl.load(page_table + request.to(tl.int64) * table_stride + (position >> PAGE_BITS))
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        token = position & ((1 << PAGE_BITS) - 1)
        return page.to(tl.int64) * outer_stride + token.to(tl.int64) * token_stride


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32, a cast to b's type.

    "emulated" is for Triton's interpreter, which multiplies bf16 as raw integers and truncates when it casts to it.
    """
    if PRECISION == "emulated":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def order_key(x):
    """int32 that orders float32 values: NaN as -inf, -0.0 as 0.0. Integers, so denormals compare exactly."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, NAN_OR_LOWEST, key)


@triton.jit
def key_value(key):
    """The float32 behind an order_key."""
    bits = tl.where(key < 0, -key | -0x80000000, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_with_id(key, token_id):
    """int64: the larger order_key first, then the lower id."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - token_id).to(tl.int64)


@triton.jit
def id_of(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


def multiprocessors(x: Tensor) -> int:
    return backend.multiprocessors(x.device.index) if x.is_cuda else CPU_MULTIPROCESSORS


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dot_precision(x: Tensor) -> str:
    """PRECISION of `dot` for operands of x's dtype."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "emulated"
    return "ieee" if x.dtype == torch.float32 else "tf32"  # for half types the name has no effect


def page_layout(cache: Tensor, page_table: Tensor | None) -> tuple[int, int, int, int]:
    """(capacity in tokens per request, pages, log2(page size), stride of the page table)."""
    if page_table is None:
        return cache.shape[1], 0, 0, 0
    pages, size = cache.shape[:2]
    capacity = page_table.shape[1] * size if pages else 0
    return capacity, pages, size.bit_length() - 1, page_table.stride(0)


# ---- where a descending row reaches a count or a mass --------------------------------------------------------

# A search asks for the largest key such that the entries at or above it number `limit` or weigh `threshold`.
# Masses are integers, so every order of summation gives the same answer. One launch finds the extremes of each
# row, each further one cuts the interval of keys into WAYS parts and keeps one; the next launch reads which.

WAYS = tl.constexpr(16)
LARGE = tl.constexpr(0x7FFFFFFFFFFFFFFF)
SCORE_BITS = tl.constexpr(40)  # score_mass is below 2**40
PACK = tl.constexpr(51)  # the mass of a block of SEARCH_BLOCK entries is below 2**51; the count goes above it
ONE_PACKED = tl.constexpr(1 << 51)
P_BITS = tl.constexpr(24)  # top_p of select_tokens is a multiple of 2**-24
SEARCH_BLOCK = 1024
SEARCH_WARPS = 8
STATE = 8  # int64 per row: low, high, above_count, above_mass, limit, threshold, highest, count


@triton.jit
def score_mass(key, highest):
    """int64 floor(max(score, 0) * 2**(40-e)), 2**e the power of two above the row's highest score; in integers."""
    magnitude = tl.minimum(tl.maximum(key, 0), 0x7F7FFFFF)
    mantissa = (magnitude & 0x7FFFFF) | tl.where(magnitude >= 0x800000, 0x800000, 0)
    top = tl.minimum(tl.maximum(highest, 0), 0x7F7FFFFF)
    top_mantissa = (top & 0x7FFFFF) | tl.where(top >= 0x800000, 0x800000, 0)
    top_bits = (top_mantissa.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # 24, or fewer for a denormal
    up = (-tl.maximum(top_bits, 0) + SCORE_BITS).to(tl.int64)
    down = tl.maximum(top >> 23, 1) - tl.maximum(magnitude >> 23, 1)
    return (mantissa.to(tl.int64) << up) >> tl.minimum(tl.maximum(down, 0), 63).to(tl.int64)


@triton.jit
def exp_mass(key, highest, factor, factor_low):
    """int64 2**39 * exp2((x - highest) * (factor + factor_low)), rounded; 0 everywhere if the highest is infinite."""
    below = key_value(key) - key_value(highest)
    power = below * factor
    rest = tl.fma(below, factor, -power) + below * factor_low  # what the product's rounding lost
    p = tl.exp2(power) * (1.0 + rest * 0.6931471805599453)
    p = tl.where((power > -64.0) & (tl.abs(highest) < 0x7F800000), p, 0.0)
    return (p * 549755813888.0 + 0.5).to(tl.int64)


@triton.jit
def select_goal(count, total, keep, share):
    """(limit, threshold) of select_tokens' stage I; share is round(top_p * 2**24), -1 for top_p=1, -2 for top_p=0."""
    limit = tl.minimum(keep, count).to(tl.int64)
    threshold = share * (total >> P_BITS) + ((share * (total & 0xFFFFFF) + 0xFFFFFF) >> P_BITS)
    limit = tl.where((share >= 0) & (total == 0), tl.minimum(limit, 1), limit)
    none = (share == -2) | ((share >= 0) & (total > 0) & (threshold == 0))
    threshold = tl.where((share < 0) | (total == 0), LARGE, threshold)
    return tl.where(none, 0, limit), threshold


@triton.jit
def ties_wanted(limit, threshold, above_count, above_mass, tie_mass):
    """How many of the equal entries at the found key belong to the result."""
    by_mass = tl.where(tie_mass > 0, (threshold - above_mass - 1) // tl.maximum(tie_mass, 1) + 1, LARGE)
    return tl.where(limit > 0, tl.minimum(limit - above_count, by_mass), 0)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def load_keys(x, mask, i, size):
    """(order_key, live) of entries i of a row."""
    live = i < size
    key = order_key(tl.load(x + i, mask=live, other=float("-inf")).to(tl.float32))
    if mask is not None:
        live = live & (tl.load(mask + i, mask=live, other=0) != 0)
    return key, live


@triton.jit(do_not_specialize=["inner", "programs", "steps"])
def _extremes_kernel(
    x, mask, extremes, x_outer, x_inner, mask_stride, inner, size, programs, steps, BLOCK: tl.constexpr
):
    """extremes int64 [rows, 3, programs]: the highest and lowest live key, and how many are live."""
    row = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    x += row_offset(row, inner, x_outer, x_inner)
    if mask is not None:
        mask += row.to(tl.int64) * mask_stride
    highest = tl.full([], -0x7F800000, tl.int32)
    lowest = tl.full([], 0x7F800000, tl.int32)
    count = tl.full([], 0, tl.int32)
    for step in range(steps):
        i = (program * steps + step) * BLOCK + tl.arange(0, BLOCK)
        key, live = load_keys(x, mask, i, size)
        highest = tl.maximum(highest, tl.max(tl.where(live, key, -0x7F800000), 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(live, key, 0x7F800000), 0))
        count += tl.sum(live.to(tl.int32), 0)
    place = extremes + row.to(tl.int64) * 3 * programs + program
    tl.store(place, highest.to(tl.int64))
    tl.store(place + programs, lowest.to(tl.int64))
    tl.store(place + 2 * programs, count.to(tl.int64))


@triton.jit
def _goal(count, total, limit, share, share_low, base, row, EXP: tl.constexpr):
    """(limit, threshold); for EXP share is top_p, None for no threshold, of the row's mass or of that in `base`."""
    if EXP:
        if base is not None:
            total = tl.load(base + row)
        threshold = tl.full([], LARGE, tl.int64)
        if share is not None:
            whole = total.to(tl.float64)
            threshold = tl.maximum(tl.ceil(whole * share + whole * share_low).to(tl.int64), 1)
        return tl.minimum(limit, count).to(tl.int64), threshold
    else:
        return select_goal(count, total, limit, share)


@triton.jit
def narrowed(row, programs, state, counts, masses, limit, share, share_low, base, SECOND: tl.constexpr,
             EXP: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """A row's state after a launch, from the state before and the programs' sums; the part kept; counts by program."""
    before = state + row.to(tl.int64) * 8
    low = tl.load(before)
    high = tl.load(before + 1)
    above_count = tl.load(before + 2)
    above_mass = tl.load(before + 3)
    goal = tl.load(before + 4)
    threshold = tl.load(before + 5)
    way = tl.arange(0, WAYS)
    program = tl.arange(0, PROGRAMS)
    place = (row.to(tl.int64) * programs + program)[:, None] * WAYS + way[None, :]
    by_program = tl.load(counts + place, mask=(program < programs)[:, None], other=0)
    count = tl.sum(by_program, 0)
    mass = tl.sum(tl.load(masses + place, mask=(program < programs)[:, None], other=0), 0)
    if SECOND:  # the first part holds everything: its sums are the row's
        all_count = tl.sum(tl.where(way == 0, count, 0), 0)
        all_mass = tl.sum(tl.where(way == 0, mass, 0), 0)
        goal, threshold = _goal(all_count, all_mass, limit, share, share_low, base, row, EXP)
    width = (high - low + WAYS - 1) // WAYS
    reached = (above_count + count >= goal) | (above_mass + mass >= threshold)
    kept = tl.max(tl.where(reached, way, 0), 0)
    above_count += tl.sum(tl.where(way == kept + 1, count, 0), 0)
    above_mass += tl.sum(tl.where(way == kept + 1, mass, 0), 0)
    high = tl.minimum(high, low + (kept + 1) * width)
    low += kept * width
    return low, high, above_count, above_mass, goal, threshold, kept, by_program


@triton.jit(do_not_specialize=["inner", "programs", "steps", "limit", "share"])
def _search_kernel(
    x,
    mask,
    extremes,
    state,  # int64 [rows, STATE]; this launch reads the one before
    next_state,
    counts,  # int64 [rows, programs, WAYS]: entries at or above each part's low end, within the interval
    next_counts,
    masses,
    next_masses,
    above,  # int64 [rows, programs]: each program's entries above the interval
    next_above,
    base,
    x_outer,
    x_inner,
    mask_stride,
    inner,
    size,
    programs,
    steps,
    limit,
    share,
    share_low,
    factor,
    factor_low,
    LAUNCH: tl.constexpr,  # 0, 1, or 2 for all later ones
    EXP: tl.constexpr,
    UNIT: tl.constexpr,  # low bits of the keys that are always 0
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    mine = row.to(tl.int64) * programs + program
    way = tl.arange(0, WAYS)
    if LAUNCH == 0:
        every = tl.arange(0, PROGRAMS)
        place = extremes + row.to(tl.int64) * 3 * programs + every
        highest = tl.max(tl.load(place, mask=every < programs, other=-0x7F800000), 0)
        lowest = tl.min(tl.load(place + programs, mask=every < programs, other=0x7F800000), 0)
        live_count = tl.sum(tl.load(place + 2 * programs, mask=every < programs, other=0), 0)
        low = tl.minimum(lowest, highest) >> UNIT
        high = (highest >> UNIT) + 1
        above_count = tl.full([], 0, tl.int64)
        above_mass = tl.full([], 0, tl.int64)
        goal = tl.full([], 0, tl.int64)
        threshold = tl.full([], 0, tl.int64)
        tl.store(next_above + mine, 0)
    else:
        low, high, above_count, above_mass, goal, threshold, kept, _ = narrowed(
            row, programs, state, counts, masses, limit, share, share_low, base, LAUNCH == 1, EXP, PROGRAMS
        )
        highest = tl.load(state + row.to(tl.int64) * 8 + 6)
        live_count = tl.load(state + row.to(tl.int64) * 8 + 7)
        passed = tl.load(counts + mine * WAYS + kept + 1, mask=kept + 1 < WAYS, other=0)
        tl.store(next_above + mine, tl.load(above + mine) + passed)
    if program == 0:
        after = next_state + row.to(tl.int64) * 8
        tl.store(after, low)
        tl.store(after + 1, high)
        tl.store(after + 2, above_count)
        tl.store(after + 3, above_mass)
        tl.store(after + 4, goal)
        tl.store(after + 5, threshold)
        tl.store(after + 6, highest)
        tl.store(after + 7, live_count)

    x += row_offset(row, inner, x_outer, x_inner)
    if mask is not None:
        mask += row.to(tl.int64) * mask_stride
    low_key = low.to(tl.int32)
    high_key = high.to(tl.int32)
    width = ((high - low + WAYS - 1) // WAYS).to(tl.int32)
    count = tl.zeros([WAYS], tl.int64)
    mass = tl.zeros([WAYS], tl.int64)
    for step in range(steps):
        i = (program * steps + step) * BLOCK + tl.arange(0, BLOCK)
        key, live = load_keys(x, mask, i, size)
        unit_key = key >> UNIT
        live = live & (unit_key >= low_key) & (unit_key < high_key)
        if tl.max(live.to(tl.int32), 0) != 0:  # late in a search few blocks have entries in the interval
            if EXP:
                weight = exp_mass(key, highest.to(tl.int32), factor, factor_low)
            else:
                weight = score_mass(key, highest.to(tl.int32))
            weight = tl.where(live, weight + ONE_PACKED, 0)
            reach = unit_key[:, None] >= (low_key + way * width)[None, :]
            both = tl.sum(tl.where(reach, weight[:, None], 0), 0)
            count += both >> PACK
            mass += both & (ONE_PACKED - 1)
    tl.store(next_counts + mine * WAYS + way, count)
    tl.store(next_masses + mine * WAYS + way, mass)


@dataclass
class Search:
    """What a finished search leaves for `narrowed`, and how it split the rows."""

    extremes: Tensor
    state: Tensor
    counts: Tensor
    masses: Tensor
    above: Tensor
    programs: int
    steps: int


def row_extremes(
    x: Tensor, rows: int, inner: int, strides: tuple[int, int], mask: Tensor | None, most_programs: int
) -> tuple[Tensor, int, int]:
    """(extremes int64 [rows, 3, programs], programs per row, blocks per program) of x [..., size]."""
    blocks = triton.cdiv(x.shape[-1], SEARCH_BLOCK)
    steps = triton.cdiv(blocks, most_programs)
    programs = triton.cdiv(blocks, steps)
    extremes = torch.empty(rows, 3, programs, dtype=torch.int64, device=x.device)
    mask_stride = mask.stride(0) if mask is not None else 0
    _extremes_kernel[(rows * programs,)](
        x,
        mask,
        extremes,
        *strides,
        mask_stride,
        inner,
        x.shape[-1],
        programs,
        steps,
        BLOCK=SEARCH_BLOCK,
        num_warps=SEARCH_WARPS,
    )
    return extremes, programs, steps


def search(
    x: Tensor,
    rows: int,
    inner: int,
    strides: tuple[int, int],
    mask: Tensor | None,
    split: tuple[Tensor, int, int],
    goal: tuple[Any, ...],
    factor: tuple[float, float] | None = None,
) -> Search:
    """A search over the rows that `row_extremes` split; the caller's next kernel ends it with `narrowed`.

    goal is (limit, share, share_low, base), see _goal; factor, in two float32, selects exp_mass.
    """
    extremes, programs, steps = split
    limit, share, share_low, base = goal
    unit = key_unit(x)
    state = torch.empty(2, rows, STATE, dtype=torch.int64, device=x.device)
    sums = torch.empty(2, 2, rows, programs, WAYS.value, dtype=torch.int64, device=x.device)
    above = torch.empty(2, rows, programs, dtype=torch.int64, device=x.device)
    new = 0
    for launch in range(triton.cdiv(32 - unit, 4)):  # 4 bits each: WAYS parts
        new, old = launch % 2, 1 - launch % 2
        _search_kernel[(rows * programs,)](
            x,
            mask,
            extremes,
            state[old],
            state[new],
            sums[old, 0],
            sums[new, 0],
            sums[old, 1],
            sums[new, 1],
            above[old],
            above[new],
            base,
            *strides,
            mask.stride(0) if mask is not None else 0,
            inner,
            x.shape[-1],
            programs,
            steps,
            limit,
            share,
            share_low,
            *(factor or (0.0, 0.0)),
            LAUNCH=min(launch, 2),
            EXP=factor is not None,
            UNIT=unit,
            PROGRAMS=triton.next_power_of_2(programs),
            BLOCK=SEARCH_BLOCK,
            num_warps=SEARCH_WARPS,
        )
    return Search(extremes, state[new], sums[new, 0], sums[new, 1], above[new], programs, steps)


def key_unit(x: Tensor) -> int:
    """Low bits that are 0 in every order_key of x's values: half types need fewer launches."""
    return {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[x.dtype]
