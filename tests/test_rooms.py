"""One name per op through every room of the layout; what is still to come is listed in kit.TO_COME and only shrinks."""

import inspect
import re
from pathlib import Path

import pytest
from kit import OPS, TO_COME

import specvlm_kernels as sk
from specvlm_kernels.backend import OPS as REGISTERED

ROOT = Path(__file__).parent.parent
ROOMS = {
    "csrc/include/specvlm/{}.h": "cuda",
    "csrc/{}/launch.cu": "cuda",
    "specvlm_kernels/ops/{}.py": None,
    "specvlm_kernels/triton/{}.py": "triton",
    "python_ref/{}.py": None,
    "tests/test_{}.py": None,
    "bench/bench_{}.py": None,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", ROOMS)
def test_the_room_is_there(op, room):
    tier = ROOMS[room]
    there = (ROOT / room.format(op)).exists()
    if tier and op in TO_COME[tier]:
        assert not there, f"{room.format(op)} is there: take {op} off kit.TO_COME[{tier!r}]"
    else:
        assert there, f"{op} has no {room.format(op)}"


@pytest.mark.parametrize("op", OPS)
def test_tiers_match_the_list(op):
    for tier in ("cuda", "triton"):
        assert (tier in REGISTERED[op].tiers) == (op not in TO_COME[tier]), f"{op}: tier {tier} against kit.TO_COME"
    assert "torch" in REGISTERED[op].tiers


@pytest.mark.parametrize("op", OPS)
def test_cuda_ops_are_built_and_bound(op):
    if op in TO_COME["cuda"]:
        return
    assert f"csrc/{op}/launch.cu" in (ROOT / "CMakeLists.txt").read_text()
    assert f"bind_{op}(m);" in (ROOT / "csrc/bindings.cpp").read_text()


@pytest.mark.parametrize("op", OPS)
def test_the_reference_takes_the_public_signature(op):
    public = list(inspect.signature(getattr(sk, op)).parameters)
    assert public[-1] == "backend"
    assert list(inspect.signature(getattr(sk.reference, op)).parameters) == public[:-1]


@pytest.mark.parametrize("op", OPS)
def test_docstrings_say_what_users_need(op):
    text = inspect.getdoc(getattr(sk, op))
    for part in ("Args:", "Raises:", "Reference: specvlm_kernels.reference." + op, "Source:", "backend:"):
        assert part in text
    for name in inspect.signature(getattr(sk, op)).parameters:
        assert re.search(rf"\b{name}\b.*:", text), f"{op}: {name} is not described"


def test_one_order_everywhere():
    names = [name for name in sk.__all__ if name in OPS]
    assert tuple(names) == OPS
    assert tuple(n for n in sk.reference.__all__ if n in OPS) == OPS


def test_no_torch_header_below_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path
