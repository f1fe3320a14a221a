"""verify_sample in Triton: integer masses of all tokens at every node, then the walk and the draw in one program.

Probabilities become integers (exp_mass), so that taking the children out leaves exactly the rest. top_k and top_p
are searches for the last kept logit, over all nodes at once. The number of launches does not depend on the values.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    SEARCH_BLOCK,
    WAYS,
    Search,
    device_of,
    exp_mass,
    key_unit,
    load_keys,
    narrowed,
    order_key,
    row_extremes,
    row_offset,
    search,
    ties_wanted,
)

LOG2E = 1.4426950408889634


@triton.jit
def _kept(key, token, cut, row):
    """Whether tokens pass the filters; cut int32 [rows, 2] holds the last kept key and its last kept token."""
    if cut is None:
        return key == key
    else:
        last_key = tl.load(cut + 2 * row)
        return (key > last_key) | ((key == last_key) & (token <= tl.load(cut + 2 * row + 1)))


@triton.jit
def _row_highest(extremes, row, programs, PROGRAMS: tl.constexpr):
    program = tl.arange(0, PROGRAMS)
    keys = tl.load(extremes + row.to(tl.int64) * 3 * programs + program, mask=program < programs, other=-0x7F800000)
    return tl.max(keys, 0).to(tl.int32)


@triton.jit(do_not_specialize=["programs"])
def _base_kernel(base, state, counts, masses, programs, factor, factor_low, UNIT: tl.constexpr, PROGRAMS: tl.constexpr):
    """base int64 [rows]: the mass of what a finished search keeps."""
    row = tl.program_id(0)
    low, _, above_count, above_mass, goal, threshold, _, _ = narrowed(
        row, programs, state, counts, masses, 0, None, None, None, False, True, PROGRAMS
    )
    highest = tl.load(state + row.to(tl.int64) * 8 + 6).to(tl.int32)
    tie = exp_mass((low << UNIT).to(tl.int32), highest, factor, factor_low)
    tl.store(base + row, above_mass + ties_wanted(goal, threshold, above_count, above_mass, tie) * tie)


@triton.jit(do_not_specialize=["nodes", "programs", "steps", "blocks"])
def _mass_kernel(
    logits,
    tokens,
    parents,
    extremes,
    state,
    counts,
    masses,
    cut,
    block_mass,  # int64 [B*N, blocks]
    first_sibling,  # int8 [B*N]: no lower sibling has the same token
    l_b,
    l_n,
    t_b,
    p_b,
    p_n,
    nodes,
    vocab,
    programs,
    steps,
    blocks,
    factor,
    factor_low,
    UNIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
):
    row = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    highest = _row_highest(extremes, row, programs, PROGRAMS)
    if cut is not None:
        low, _, above_count, above_mass, goal, threshold, kept, by_program = narrowed(
            row, programs, state, counts, masses, 0, None, None, None, False, True, PROGRAMS
        )
        last_key = (low << UNIT).to(tl.int32)
        tie = exp_mass(last_key, highest, factor, factor_low)
        ties = ties_wanted(goal, threshold, above_count, above_mass, tie)
        way = tl.arange(0, WAYS)
        equal = tl.where((way == kept)[None, :], by_program, 0) - tl.where((way == kept + 1)[None, :], by_program, 0)
        earlier = tl.arange(0, PROGRAMS) < program
        equal_before = tl.sum(tl.where(earlier, tl.sum(equal, 1), 0), 0)
        if program == 0:
            tl.store(cut + 2 * row, last_key)
    x = logits + row_offset(row, nodes, l_b, l_n)
    for step in range(steps):
        block = program * steps + step
        token = block * BLOCK + tl.arange(0, BLOCK)
        key, live = load_keys(x, None, token, vocab)
        if cut is not None:
            tied = (live & (key == last_key)).to(tl.int64)
            rank = equal_before + tl.cumsum(tied, 0) - tied
            equal_before += tl.sum(tied, 0)
            tl.store(cut + 2 * row + 1 + token * 0, token, mask=(tied != 0) & (rank == ties - 1))
            live = live & ((key > last_key) | ((tied != 0) & (rank < ties)))
        mass = tl.sum(tl.where(live, exp_mass(key, highest, factor, factor_low), 0), 0)
        tl.store(block_mass + row.to(tl.int64) * blocks + block, mass, mask=block < blocks)

    if program == 0:
        node = row % nodes
        request = (row // nodes).to(tl.int64)
        parent = tl.load(parents + request * p_b + node.to(tl.int64) * p_n)
        mine = tl.load(tokens + request * t_b + node)
        same = tl.full([], 0, tl.int32)
        for start in range(0, node, NODES):
            i = start + tl.arange(0, NODES)
            other = tl.load(parents + request * p_b + i.to(tl.int64) * p_n, mask=i < node, other=-2)
            their = tl.load(tokens + request * t_b + i, mask=i < node, other=-1)
            same += tl.sum(((i < node) & (i > parent) & (other == parent) & (their == mine)).to(tl.int32), 0)
        tl.store(first_sibling + row, (same == 0).to(tl.int8))


@triton.jit
def _children(
    start, node, row, x, tokens, parents, first_sibling, cut, highest, factor, factor_low, p_n, nodes, vocab,
    NODES: tl.constexpr,
):  # fmt: skip
    """(nodes start .., their tokens, the mass of those that are children of `node`, 0 for all others)."""
    i = start + tl.arange(0, NODES)
    inside = (i < nodes) & (i > node)
    child = inside & (tl.load(parents + i.to(tl.int64) * p_n, mask=inside, other=-2) == node)
    token = tl.load(tokens + i, mask=child, other=-1)
    child = child & (token >= 0) & (token < vocab)
    child = child & (tl.load(first_sibling + i, mask=child, other=0) != 0)
    key = order_key(tl.load(x + token, mask=child, other=float("-inf")).to(tl.float32))
    child = child & _kept(key, token, cut, row)
    return i, token, tl.where(child, exp_mass(key, highest, factor, factor_low), 0)


@triton.jit
def _share_of(coin, total):
    """floor(coin * total) for a coin in [0,1); any other coin lies below everything or above it."""
    coin = tl.where(coin < 1.0, tl.maximum(coin, -1.0), 1.0)  # NaN counts as 1
    return tl.floor(coin.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit(do_not_specialize=["nodes", "programs", "blocks"])
def _walk_kernel(
    logits,
    tokens,
    parents,
    coins,
    extremes,
    cut,
    block_mass,
    first_sibling,
    path,
    length,
    next_token,
    l_b,
    l_n,
    t_b,
    p_b,
    p_n,
    c_b,
    path_b,
    nodes,
    vocab,
    programs,
    blocks,
    factor,
    factor_low,
    PROGRAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    first_row = request * nodes
    tokens += request * t_b
    parents += request * p_b
    coins += request * c_b
    path += request * path_b
    first_sibling += first_row
    for start in range(0, nodes, NODES):
        i = start + tl.arange(0, NODES)
        tl.store(path + i, tl.full([NODES], -1, tl.int32), mask=i < nodes)
    tl.debug_barrier()

    block = tl.arange(0, BLOCKS)
    count = tl.full([], 0, tl.int32)
    node = tl.full([], 0, tl.int32)
    walking = count == 0
    while walking:
        row = first_row + node
        x = logits + request * l_b + node.to(tl.int64) * l_n
        highest = _row_highest(extremes, row, programs, PROGRAMS)
        total = tl.sum(tl.load(block_mass + row * blocks + block, mask=block < blocks, other=0), 0)
        target = _share_of(tl.load(coins + node), total)
        below = tl.full([], 0, tl.int64)
        accepted = tl.full([], 0x7FFFFFFF, tl.int32)
        for start in range(0, nodes, NODES):
            i, _, mass = _children(
                start, node, row, x, tokens, parents, first_sibling, cut, highest, factor, factor_low, p_n, nodes,
                vocab, NODES,
            )  # fmt: skip
            reach = below + tl.cumsum(mass, 0)
            taken = (mass > 0) & ((reach > target) | (reach == total))
            accepted = tl.minimum(accepted, tl.min(tl.where(taken, i, 0x7FFFFFFF), 0))
            below += tl.sum(mass, 0)
        walking = accepted < nodes
        tl.store(path + count, accepted, mask=walking)
        count += walking.to(tl.int32)
        node = tl.where(walking, accepted, node)
    tl.store(length + request, count)

    # what is left of the last node's masses without its children: first by block, then within the block
    row = first_row + node
    x = logits + request * l_b + node.to(tl.int64) * l_n
    highest = _row_highest(extremes, row, programs, PROGRAMS)
    rest = tl.load(block_mass + row * blocks + block, mask=block < blocks, other=0)
    for start in range(0, nodes, NODES):
        _, token, mass = _children(
            start, node, row, x, tokens, parents, first_sibling, cut, highest, factor, factor_low, p_n, nodes,
            vocab, NODES,
        )  # fmt: skip
        rest -= tl.sum(tl.where((token // BLOCK)[:, None] == block[None, :], mass[:, None], 0), 0)
    target = _share_of(tl.load(coins + nodes), tl.sum(rest, 0))
    chosen = tl.min(tl.where(tl.cumsum(rest, 0) > target, block, BLOCKS), 0)
    before = tl.sum(tl.where(block < chosen, rest, 0), 0)
    one = chosen * BLOCK + tl.arange(0, BLOCK)
    key, live = load_keys(x, None, one, vocab)
    live = live & _kept(key, one, cut, row)
    for start in range(0, nodes, NODES):
        _, token, mass = _children(
            start, node, row, x, tokens, parents, first_sibling, cut, highest, factor, factor_low, p_n, nodes,
            vocab, NODES,
        )  # fmt: skip
        refused = tl.where((mass > 0) & (token // BLOCK == chosen), token, vocab)
        lowest = tl.min(refused, 0)
        while lowest < vocab:
            live = live & (one != lowest)
            refused = tl.where(refused == lowest, vocab, refused)
            lowest = tl.min(refused, 0)
    mass = tl.where(live, exp_mass(key, highest, factor, factor_low), 0)
    beyond = before + tl.cumsum(mass, 0) > target
    found = tl.min(tl.where(beyond & (mass > 0), one, vocab - 1), 0)
    tl.store(next_token + request, found.to(tl.int64))


def config(rows: int, nodes: int, vocab: int) -> dict[str, Any]:
    """How rows are split, by shape alone; a tuning script may replace this function.

    Returns programs (most programs per node), num_warps (of the masses), NODES (read at once), walk_warps.
    """
    return {"programs": max(2, min(64, 1024 // rows)), "num_warps": 8, "NODES": 32, "walk_warps": 4}


def verify_sample(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> None:
    b, n, vocab = logits.shape
    rows = b * n
    device = logits.device
    chosen = config(rows, n, vocab)
    strides = (logits.stride(0), logits.stride(1))
    factor = _two_floats(min(LOG2E / temperature, 1e30))
    unit = key_unit(logits)
    blocks = triton.cdiv(vocab, SEARCH_BLOCK)
    with device_of(logits):
        split = row_extremes(logits, rows, n, strides, None, chosen["programs"])
        extremes, programs, steps = split
        padded = triton.next_power_of_2(programs)
        found: Search | None = None
        base = None

        def filtered(limit: int, share: tuple[float | None, float | None]) -> Search:
            return search(logits, rows, n, strides, None, split, (limit, *share, base), factor)

        if top_k is not None and top_k < vocab:
            found = filtered(top_k, (None, None))
        if top_p is not None and top_p < 1:
            if found is not None:
                base = torch.empty(rows, dtype=torch.int64, device=device)
                _base_kernel[(rows,)](
                    base, found.state, found.counts, found.masses, programs, *factor, UNIT=unit, PROGRAMS=padded
                )
            found = filtered(vocab if found is None else top_k or vocab, _two_floats(top_p))
        cut = torch.empty(rows, 2, dtype=torch.int32, device=device) if found is not None else None
        block_mass = torch.empty(rows, blocks, dtype=torch.int64, device=device)
        first_sibling = torch.empty(rows, dtype=torch.int8, device=device)
        _mass_kernel[(rows * programs,)](
            logits,
            tokens,
            parents,
            extremes,
            *((found.state, found.counts, found.masses) if found is not None else (None, None, None)),
            cut,
            block_mass,
            first_sibling,
            *strides,
            tokens.stride(0),
            *parents.stride(),
            n,
            vocab,
            programs,
            steps,
            blocks,
            *factor,
            UNIT=unit,
            PROGRAMS=padded,
            BLOCK=SEARCH_BLOCK,
            NODES=chosen["NODES"],
            num_warps=chosen["num_warps"],
        )
        _walk_kernel[(b,)](
            logits,
            tokens,
            parents,
            coins,
            extremes,
            cut,
            block_mass,
            first_sibling,
            path,
            length,
            next_token,
            *strides,
            tokens.stride(0),
            *parents.stride(),
            coins.stride(0),
            path.stride(0),
            n,
            vocab,
            programs,
            blocks,
            *factor,
            PROGRAMS=padded,
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=SEARCH_BLOCK,
            NODES=chosen["NODES"],
            num_warps=chosen["walk_warps"],
        )


def _two_floats(x: float) -> tuple[float, float]:
    """x as the sum of two float32: kernel arguments have no more."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high
