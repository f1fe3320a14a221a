"""pytest-benchmark over the same cases, for those who want its tooling, and tests of the benchmark itself.

python -m pytest bench --benchmark-json=OUT.json
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import specvlm_kernels as sk

from . import OPS, ahead, bench_draft_topk, bench_select_tokens, plot, report, tune
from .__main__ import main
from .cases import Case, Peer
from .harness import Chip, Replay, free_memory, make_sets
from .runner import Options, Runner, cases_of, compile_own, compile_peer, peers_of, tasks_ahead
from .spaces import SPACES, Space, candidates

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
CPU = Options(list(OPS), torch.device("cpu"), backend="torch", tiny=True)


def _params(options: Options) -> list[Any]:
    return [pytest.param(case, id=f"{op}: {case.label}") for op in OPS for case in cases_of(op, options)]


@pytest.fixture(scope="module")
def chip() -> Chip:
    return Chip(GPU)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", _params(Options(list(OPS), GPU)))
def test_gpu(benchmark: Any, chip: Chip, case: Case, backend: str) -> None:
    """One round is one graph replay from a cold L2; extra_info has the time per call."""
    free_memory()
    small = case.small().bare()
    try:
        assert small.check(GPU, backend) == []
        calls = make_sets(case, chip)
        replay = Replay(case, calls, [lambda c=c: case.run(c, backend) for c in calls], chip)
    except sk.BackendUnavailableError as error:
        pytest.skip(str(error))

    def cold() -> None:
        replay.cold()
        torch.cuda.synchronize()

    def run() -> None:
        replay.run()
        torch.cuda.synchronize()

    benchmark.pedantic(run, setup=cold, rounds=20, warmup_rounds=2)
    benchmark.extra_info["calls"] = len(replay.thunks)
    benchmark.extra_info["us_per_call"] = replay.measure(0.1).us


@pytest.mark.parametrize("case", _params(CPU))
def test_cpu_smoke(benchmark: Any, case: Case) -> None:
    """The same cases, tiny, in the torch backend."""
    assert case.small().bare().check(CPU.device, "torch") == []
    call = case.inputs(CPU.device, 0)
    benchmark.pedantic(case.run, args=(call, "torch"), setup=call.restore, rounds=2)


@pytest.mark.parametrize("case", _params(CPU))
def test_peers_do_the_same_work(case: Case) -> None:
    for peer in case.peers():
        if peer.whole and not (peer.slow or peer.compiled) and not peer.missing() and peer.fits(case) is None:
            assert case.agrees(peer, CPU.device), peer.name


@pytest.mark.parametrize("op", OPS)
def test_rows_are_told_apart_by_their_label(op: str) -> None:
    labels = [case.label for case in cases_of(op, Options([op], CPU.device))]
    assert len(set(labels)) == len(labels)


def _record() -> report.Record:
    """A record of a GPU run, put together by hand: two rows, one peer of each kind."""
    peers = {
        "slow": {"whole": True, "status": "ok", "us": 40.0, "graph": True},
        "host-bound": {"whole": True, "status": "ok", "us": 30.0, "graph": False},
        "part": {"whole": False, "status": "ok", "us": 15.0, "graph": True},
        "broken": {"whole": True, "status": "error", "detail": "RuntimeError: no"},
    }
    row = {"op": "select_tokens", "label": "V10", "backend": "cuda", "status": "ok", "sweep": "", "peers": peers}
    row |= {"us": 10.0, "p10": 9.0, "p90": 11.0, "graph": True, "bytes": 1000, "flops": 0, "limit_us": 5.0}
    row |= {"must": 12, "goal": 7, "x": {}, "shape": {}}
    header = dict.fromkeys(("gpu", "torch", "cuda", "commit", "date"), "NVIDIA H200")
    ceilings = {"read_bytes_per_s": 4e12, "bf16_flop_per_s": 7e14}
    results = [row, {**copy.deepcopy(row), "label": "V20"}]
    return {"header": header, "ceilings": ceilings, "missing_peers": {}, "results": results, "wall_s": 1.0}


def _printed(record: report.Record) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_record(record, console)
    return console.export_text()


def test_speedups_count_peers_timed_alike() -> None:
    record = _record()
    assert report.best_peer(record["results"][0], whole=True) == ("slow", 4.0)
    assert report.best_peer(record["results"][0], whole=False) == ("part", 1.5)
    text = _printed(record)
    assert "4.00 slow" in text and "geomean over 2 shapes: 4.00" in text and "RuntimeError: no" in text
    assert not report.is_failure(record)


def test_a_wrong_result_withholds_every_speedup_of_the_op() -> None:
    record = _record()
    record["results"][1].update(status="wrong", detail="output 0: 3 of 10 values differ from the reference")
    text = _printed(record)
    assert report.is_failure(record)
    assert "slow" not in text and "geomean" not in text and "3 of 10 values differ" in text
    assert "V10" not in report.markdown(record)


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    good = sk.select_tokens

    def off_by_one(*args: Any, **kwargs: Any) -> Any:
        selection = good(*args, **kwargs)
        return selection._replace(indices=selection.indices + 1)

    monkeypatch.setattr(bench_select_tokens.SelectTokens, "run", lambda _, call, backend: off_by_one(*call.args))
    record = Runner(Options(["select_tokens"], CPU.device, backend="torch", tiny=True)).run()
    assert {row["status"] for row in record["results"]} == {"wrong"}
    assert report.is_failure(record)


def test_compiled_peers_are_checked_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(_: Case, calls: list[Any]) -> list[Any]:
        return [lambda c=c: sk.select_tokens(*c.args, **c.kwargs) for c in calls]

    def wrong(_: Case, calls: list[Any]) -> list[Any]:
        return [lambda c=c: sk.select_tokens(c.args[0] + 1, *c.args[1:], **c.kwargs) for c in calls]

    peers = [Peer("right", right, compiled=True), Peer("wrong", wrong, compiled=True)]
    monkeypatch.setattr(bench_select_tokens.SelectTokens, "peers", lambda _: peers)
    monkeypatch.setattr(bench_select_tokens, "TINY", [bench_select_tokens.SelectTokens(tokens=199, must=1.0)])
    options = Options(["select_tokens"], CPU.device, backend="torch", tiny=True)
    (row,) = Runner(options).run()["results"]
    assert {name: peer["status"] for name, peer in row["peers"].items()} == {"right": "ok", "wrong": "wrong"}
    (row,) = Runner(replace(options, compile_seconds=0.0)).run()["results"]
    assert all(peer["status"] == "not run" and "were over" in peer["detail"] for peer in row["peers"].values())


def test_which_rows_have_which_peers() -> None:
    options = Options(list(OPS), CPU.device)
    names = {
        (op, case.label): {peer.name for peer in peers_of(case, options)}
        for op in OPS
        for case in cases_of(op, options)
        if case.must or case.sweep
    }
    for (op, label), found in names.items():
        assert "FlexAttention" not in found
        if op == "select_tokens":
            assert {"torch.compile", "torch.topk alone"} <= found, label
    text = names["token_scores", "Qwen2.5-VL-32B Hq40 Hkv8 T48 S25,088"]
    assert text == {"published code (materialised)", "torch.compile"}
    assert names["token_scores", "Qwen2.5-VL-32B Hq40 Hkv8 T512 S25,088"] == set()
    assert "FlashInfer paged" in names["tree_attention", "Qwen2.5-VL-32B Hq40 Hkv8 n8 S16,384"]
    everything = replace(options, all_peers=True)
    assert all(peers_of(c, everything) == c.peers() for op in OPS for c in cases_of(op, everything))


def test_ahead_of_time_work_is_bounded_and_quiet(tmp_path: Path) -> None:
    done = tmp_path / "done"
    tasks = [(Path.write_text, (done, "x")), (Path.read_text, (tmp_path / "missing",)), (time.sleep, (600,))]
    began = time.monotonic()
    assert ahead.run(tasks, 2, 10.0) == [True, True, False] and done.read_text() == "x"
    assert time.monotonic() - began < 60 and ahead.run([], 2, 10.0) == []
    tasks = [task for _, task in tasks_ahead(Options(["select_tokens"], CPU.device))]
    assert {task for task, _ in tasks} == {compile_peer, compile_own}
    rows = [row for task, arguments in tasks if task is compile_own for row in arguments[1]]
    assert sorted(rows) == list(range(len(bench_select_tokens.CASES)))
    for _, (task, arguments) in tasks_ahead(replace(CPU, ops=["verify_greedy"])):
        task(*arguments)


def test_a_peer_that_was_not_built_in_time_is_named_and_left_out() -> None:
    options = replace(CPU, ops=["compact_kv"], seconds=0.01, ahead_seconds=7.0)
    first = peers_of(cases_of("compact_kv", options)[0], options)[0].name
    record = Runner(options, unbuilt={first}).run()
    assert record["missing_peers"][first] == "not built within 7 s"
    assert all(first not in row["peers"] for row in record["results"])


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(replace(CPU, ops=["compact_kv"], seconds=0.01, peers=False))
    measure, rows = runner._run_case, []

    def interrupted(case: Case, row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt
        measure(case, row)

    monkeypatch.setattr(runner, "_run_case", interrupted)
    record = runner.run()
    assert record["aborted"] == "interrupted" and report.is_failure(record)
    assert record["results"][0]["status"] == "ok" and record["results"][0]["us"] > 0
    assert {row["status"] for row in record["results"][1:]} == {"not run"}


def test_an_interruption_among_the_compiled_peers_keeps_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(replace(CPU, ops=["select_tokens"], seconds=0.01, all_peers=True))
    time_peers = runner._time_peers

    def interrupted(case: Case, row: dict[str, Any], calls: list[Any], compiled: bool) -> None:
        if compiled:
            raise KeyboardInterrupt
        time_peers(case, row, calls, compiled)

    monkeypatch.setattr(runner, "_time_peers", interrupted)
    record = runner.run()
    assert record["aborted"] == "interrupted"
    assert {row["status"] for row in record["results"]} == {"ok"}


def test_a_record_of_decoding_has_a_table_of_its_own() -> None:
    row = {
        "target": "big",
        "draft": "small",
        "passes": "fused",
        "video": 16_384,
        "stock_ms": 40.0,
        "stock_kernels_ms": 30.0,
        "plain_ms": 20.0,
        "round_ms": 32.0,
        "phases_ms": {"verify": 21.0, "draft": 10.5},
        "floors_ms": {"plain": 16.0, "draft pass": 1.5, "round": 23.5},
    }
    table = report.markdown({"header": _record()["header"], "results": [row, row | {"failed": "out of memory"}]})
    assert table.count("big + small, fused") == 1
    assert "| 40.0 (30.0) | 20.00 (16.00) | 21.00 | 10.50 (7.50) | 32.00 | 5.00 (3.75), 2.50 |" in table


def test_readme_table_is_replaced_between_its_markers(tmp_path: Any) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.update_readme(readme, [_record()])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert text.count("| select_tokens | V10 | cuda | 10.0 | 50 | slow: 40.0 (4.00x) | part: 15.0 (1.50x) |") == 1
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark results"):
        report.update_readme(readme, [_record()])


def test_smoke_run_writes_a_record_and_compares(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "record.json")
    assert main(["select_tokens", "--quick", "--cpu-smoke", "--json", out]) == 0
    assert main(["--compare", out, out]) == 0
    assert "geomean of B/A over 2 shapes: 1.00" in capsys.readouterr().out


def test_overhead_names_every_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    assert main(["--overhead", "--cpu-smoke", "--json", str(out)]) == 0
    entries = json.loads(out.read_text())["overhead"]
    assert [entry["op"] for entry in entries] == ["torch", *OPS]
    assert all(0 < entry["fastest_us"] <= entry["mean_us"] for entry in entries)
    assert "must: 15 us" in capsys.readouterr().out


def test_small_steps_are_one_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    assert main(["--small-steps", "--cpu-smoke", "--json", str(out)]) == 0
    row = json.loads(out.read_text())["small_steps"]
    assert [row["label"].count(op) for op in ("draft_topk", "verify_greedy", "compact_kv")] == [5, 1, 2]
    assert row["us"] > 0 and "must 60" in capsys.readouterr().out


def test_curves_are_drawn(tmp_path: Any) -> None:
    record = _record()
    record["results"] = []
    for case in cases_of("tree_attention", Options(["tree_attention"], CPU.device)):
        row = copy.deepcopy(_record()["results"][0])
        row.update(op=case.op, label=case.label, shape=case.shape, sweep=case.sweep, x=case.x_values)
        record["results"].append(row)
    assert plot.plot(record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not plot.plot(_record(), tmp_path / "none.png")


def test_tuning_runs_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    command = [sys.executable, "-m", "bench.tune", "draft_topk", "--cpu-smoke", "--json", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["results"]
    assert row["status"] == "ok" and row["refused"] == [] and len(row["candidates"]) >= 3
    configs = [entry["config"] for entry in (row["present"], *row["candidates"])]
    assert row["best"]["config"] in configs and len({str(config) for config in configs}) == len(configs)


def test_tuning_takes_the_fastest_right_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp count does not compile, one gives wrong tokens, one is right and faster than the present choice."""
    good = bench_draft_topk.DraftTopk.reference
    module = importlib.import_module("specvlm_kernels.triton.draft_topk")
    monkeypatch.setattr(module, "config", lambda *_: {"num_warps": 1})
    space = Space([[{"num_warps": n} for n in (2, 3, 4, 5)]], lambda present, _, knobs: {**present, **knobs})
    monkeypatch.setitem(SPACES, "draft_topk", space)

    def run(case: Case, call: Any, backend: str) -> Any:
        warps = module.config(*call.args[0].shape, call.args[1])["num_warps"]
        if warps == 2:
            raise RuntimeError("out of resource: shared memory")
        time.sleep({1: 0.02, 3: 0.0, 4: 0.01, 5: 0.03}[warps])
        log_probs, ids = good(case, call)
        return log_probs, ids + (warps == 3)

    monkeypatch.setattr(bench_draft_topk.DraftTopk, "run", run)
    row: dict[str, Any] = {"op": "draft_topk", "label": "", "candidates": [], "refused": []}
    tuner = tune.Tuner(CPU.device, time.monotonic() + 60)
    tuner.tune("draft_topk", bench_draft_topk.TINY[0], row)
    assert row["best"]["config"] == {"num_warps": 4} and row["best"]["us"] < row["present"]["us"]
    assert [entry["config"]["num_warps"] for entry in row["candidates"]] == [4, 5]
    reasons = [entry["reason"] for entry in row["refused"]]
    assert reasons == ["RuntimeError: out of resource: shared memory", "its result is not the present choice's"]
    tuner.deadline = time.monotonic() - 1
    with pytest.raises(tune.OutOfTimeError):
        tuner.tune("draft_topk", bench_draft_topk.TINY[0], row)


def test_tuning_lists_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["select_tokens", "--list"]) == 0
    out = capsys.readouterr().out
    assert "select_tokens: V4,096" in out and "stage 1: one_program=False programs=64" in out


def test_candidates_fit_their_shape() -> None:
    space = SPACES["tree_attention"]
    few, many = ((1, n, 5, 8, 16384, 128, 2, 132) for n in (1, 64))
    for arguments, blocks in ((few, {16, 32, 64}), (many, {64, 128})):
        found = candidates("tree_attention", arguments, {}, space.stages[0])
        assert {config["BLOCK_M"] for _, config in found} <= blocks
        assert all(config["splits"] >= 1 and "resident" not in config for _, config in found)
    select = [config for _, config in candidates("select_tokens", (1, 131072), {}, SPACES["select_tokens"].stages[0])]
    assert select and not any(config["one_program"] for config in select)
