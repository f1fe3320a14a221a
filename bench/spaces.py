"""The candidates of `python -m bench.tune`: what may be turned in each Triton kernel's configuration, and where."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .bench_select_tokens import SelectTokens
from .bench_token_scores import TokenScores
from .bench_verify_greedy import VerifyGreedy
from .bench_verify_sample import VerifySample
from .cases import Call, Case
from .harness import free_memory
from .runner import Options, cases_of
from .shapes import QWEN_32B

Config = dict[str, Any]
Knobs = dict[str, Any]
Configure = Callable[..., Config]


@dataclass(frozen=True)
class Space:
    """An op's candidates: stages of knobs, how knobs change a configuration, and shapes besides the benchmark's.

    apply takes (present configuration, config's arguments, knobs) and returns None where the knobs make no sense.
    """

    stages: list[list[Knobs]]
    apply: Callable[[Config, tuple[Any, ...], Knobs], Config | None]
    extra: list[Case] = field(default_factory=list)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _knobs(names: str, *rows: tuple[Any, ...]) -> list[Knobs]:
    return [dict(zip(names.split(), row)) for row in rows]


def _attention(present: Config, arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    """`resident` programs per multiprocessor decide the splits; few packed rows need no large blocks."""
    from specvlm_kernels.triton.tree_attention import best_splits

    batch, nodes, group, kv_heads, capacity, _, _, sms = arguments
    chosen = {**present, **knobs}
    block_m, rows = chosen["BLOCK_M"], nodes * group
    padded = _power_of_2(rows)
    if not (64 if padded > 64 else padded // 2) <= block_m <= max(64, padded):
        return None
    resident = chosen.pop("resident", 1 if block_m >= 128 else 2)
    base = batch * kv_heads * math.ceil(rows / block_m)
    return {**chosen, "splits": best_splits(base, math.ceil(capacity / chosen["BLOCK_N"]), sms * resident)}


def _scores(present: Config, arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    chosen = {**present, **knobs}
    return chosen if chosen["BLOCK_M"] <= max(16, _power_of_2(arguments[0])) else None


def _select(present: Config, arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    chosen = {**present, **knobs}
    return None if chosen["one_program"] and arguments[1] > 32768 else chosen


def _segments(present: Config, arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    """The merge holds at most 4096 maxima."""
    chosen = {**present, **knobs}
    return chosen if chosen["SEGMENT"] * 4096 >= arguments[1] else None


def _chunks(present: Config, arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    """As many chunks as the walk can reduce, unless the knobs say so themselves."""
    from specvlm_kernels.triton.verify_greedy import MAX_PARTS, MAX_WALK

    _, nodes, vocab = arguments
    chosen = {**present, **knobs}
    most = min(math.ceil(vocab / chosen["BLOCK"]), MAX_PARTS, MAX_WALK // _power_of_2(nodes))
    wanted = chosen["chunks"] if "BLOCK" not in knobs or "chunks" in knobs else most
    return {**chosen, "chunks": max(1, min(wanted, most))}


def _any(present: Config, _arguments: tuple[Any, ...], knobs: Knobs) -> Config | None:
    return {**present, **knobs}


BLOCKS = "BLOCK_M BLOCK_N num_warps num_stages"

SPACES: dict[str, Space] = {
    "tree_attention": Space(
        [
            _knobs(
                BLOCKS,
                *((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 3)),
                *((64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 3), (64, 32, 4, 4)),
                *((32, 64, 4, 3), (32, 128, 4, 3), (16, 64, 4, 3), (16, 128, 4, 3)),
            ),
            _knobs("resident", (1,), (2,), (3,), (4,)),
            _knobs("combine_warps", (1,), (2,), (8,)),
        ],
        _attention,
    ),
    "token_scores": Space(
        [
            _knobs(
                BLOCKS,
                *((32, 128, 4, 3), (32, 128, 4, 2), (32, 128, 4, 4), (32, 128, 8, 3), (32, 64, 4, 3)),
                *((32, 256, 8, 3), (32, 256, 8, 2), (16, 128, 4, 3), (16, 256, 8, 3)),
                *((64, 128, 4, 2), (64, 128, 8, 3), (64, 256, 8, 3), (128, 64, 4, 2)),
            )
        ],
        _scores,
        [TokenScores(model=QWEN_32B, nodes=t, contexts=(25_088,)) for t in (1, 512)],
    ),
    "select_tokens": Space(
        [
            [
                *_knobs(
                    "one_program BLOCK num_warps",
                    *((True, 4096, 8), (True, 4096, 16), (True, 4096, 32)),
                    *((True, 2048, 8), (True, 2048, 16), (True, 8192, 32)),
                ),
                *_knobs("one_program programs", (False, 128), (False, 64), (False, 32), (False, 16), (False, 256)),
            ],
        ],
        _select,
        [SelectTokens(tokens=1 << bits) for bits in (12, 13, 14, 15)],  # where the paths cross
    ),
    "draft_topk": Space(
        [
            _knobs(
                "SEGMENT PER_PROGRAM num_warps",
                *((256, 16, 4), (256, 16, 8), (256, 8, 4), (256, 32, 8), (128, 32, 4), (128, 16, 4)),
                *((512, 8, 4), (512, 16, 8), (1024, 4, 4)),
            ),
            _knobs("merge_warps", (2,), (4,), (8,), (16,)),
        ],
        _segments,
    ),
    "verify_greedy": Space(
        [
            _knobs("BLOCK num_warps", (8192, 8), (8192, 16), (8192, 4), (4096, 4), (4096, 8), (16384, 16), (2048, 4)),
            _knobs("chunks", (4,), (8,), (16,)),
            _knobs("walk_warps", (1,), (2,), (4,), (8,)),
        ],
        _chunks,
        [VerifyGreedy(nodes=26, batch=16)],
    ),
    "verify_sample": Space(
        [
            _knobs("programs", (8,), (16,), (32,), (64,), (128,)),
            _knobs("num_warps", (4,), (8,), (16,)),
            _knobs("walk_warps", (2,), (4,), (8,)),
        ],
        _any,
        [VerifySample(nodes=26, batch=16)],
    ),
}


def shapes(op: str, tiny: bool = False) -> list[Case]:
    """The measured shapes of an op, those with a target or in --quick, and the space's own."""
    options = Options([op], torch.device("cpu"), tiny=tiny)
    cases = [case for case in cases_of(op, options) if not case.sweep and (tiny or case.must or case.quick)]
    return cases if tiny else [replace(case, must=None, goal=None) for case in cases] + SPACES[op].extra


@contextlib.contextmanager
def configured(op: str, configure: Configure) -> Iterator[None]:
    """The op's Triton kernel takes its configuration from `configure` instead of its module's config."""
    module = importlib.import_module(f"specvlm_kernels.triton.{op}")
    present = module.config
    module.config = configure
    try:
        yield
    finally:
        module.config = present


def present_config(op: str) -> Configure:
    return importlib.import_module(f"specvlm_kernels.triton.{op}").config


def changed(op: str, knobs: Knobs) -> Configure:
    """The present configuration with some knobs turned."""
    present, apply = present_config(op), SPACES[op].apply

    def configure(*arguments: Any) -> Config:
        base = present(*arguments)
        return (apply(base, arguments, knobs) or base) if knobs else base

    return configure


def arguments_of(op: str, case: Case, call: Call) -> tuple[Any, ...]:
    """What config is asked for this call."""
    seen: list[tuple[Any, ...]] = []
    present = present_config(op)

    def record(*arguments: Any) -> Config:
        seen.append(arguments)
        return present(*arguments)

    with configured(op, record):
        case.run(call, "triton")
    call.restore()
    return seen[0]


def candidates(op: str, arguments: tuple[Any, ...], base: Knobs, stage: list[Knobs]) -> list[tuple[Knobs, Config]]:
    """(knobs, configuration) of a stage on top of `base`, each configuration once and without the base's own."""
    found: list[tuple[Knobs, Config]] = []
    present = present_config(op)(*arguments)
    known = [changed(op, base)(*arguments)]
    for knobs in ({**base, **one} for one in stage):
        config = SPACES[op].apply(present, arguments, knobs)
        if config is not None and config not in known:
            known.append(config)
            found.append((knobs, config))
    return found


def compile_candidate(op: str, number: int) -> None:
    """Runs every shape of an op once with one candidate of the first stage: Triton keeps the binaries on disk.

    For processes that compile side by side; what fails here fails again, with its reason, where it is timed.
    """
    knobs = SPACES[op].stages[0][number]
    for case in shapes(op):
        call = case.inputs(torch.device("cuda"), 0)
        arguments = arguments_of(op, case, call)
        for one, _ in candidates(op, arguments, {}, [knobs]):
            with contextlib.suppress(Exception), configured(op, changed(op, one)):
                case.run(call, "triton")
        free_memory()
