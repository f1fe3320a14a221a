"""The benchmark's own behaviour; what it measures is not tested here."""

import torch

from bench import report
from bench.runner import Options, Runner


def test_an_interrupted_benchmark_keeps_what_it_measured(monkeypatch, tmp_path):
    runner = Runner(Options(["compact_kv"], torch.device("cpu"), backend="torch", seconds=0.01, tiny=True, peers=False))
    measure, rows = runner._run_case, []

    def interrupted(case, row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt
        measure(case, row)

    monkeypatch.setattr(runner, "_run_case", interrupted)
    record = runner.run()
    assert record["aborted"] == "interrupted" and report.is_failure(record)
    assert record["results"][0]["status"] == "ok" and record["results"][0]["us"] > 0
    assert {row["status"] for row in record["results"][1:]} == {"not run"}
    report.save(record, str(tmp_path / "record.json"))
    assert report.load(str(tmp_path / "record.json")) == record
