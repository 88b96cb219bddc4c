"""The GPU report without a GPU: every line of it runs on the simt device, at a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrt.base.errors import FlashrtError
from flashrt.commands.bench.gpu import run as module
from flashrt.commands.bench.gpu.run import SIMT_NOTE, GpuBenchOptions, gpu_bench
from flashrt.view.gpu_page import markdown, targets


def test_simt_figures_do_not_go_among_measurements(tmp_path: Path) -> None:
    with pytest.raises(FlashrtError, match="not speed"):
        gpu_bench(GpuBenchOptions("tiny", "simt", out=tmp_path / "docs" / "measured"))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench(GpuBenchOptions("tiny", "simt", out=tmp_path)) == 0
    assert SIMT_NOTE in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["is_exact"]
    assert document["is_verification_only"]
    assert not document["failed"]
    assert list(document["stage_s"]) == ["limits", "load", "device", "kernels", "session", "close"]
    assert all(value > 0 for value in document["limits"].values())
    (row,) = document["rows"]
    assert all(value > 0 for value in row["figures"].values())
    restored, ancestor = row["device"]["restore"], row["device"]["restore_ancestor"]
    assert restored["nbytes"] == row["session"]["restore_bytes"]
    assert 0 < ancestor["nbytes"] < restored["nbytes"]
    ops = {(k["phase"], k["op"]) for k in document["kernels"]}
    assert {("decode", "sample"), ("prefill", "attention"), ("decode", "delta_rule")} <= ops
    page = path.with_suffix(".md").read_text()
    assert page == markdown(document)
    assert "verification, not speed" in page
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_stage_that_fails_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(module.DeviceBench, "at_length", broken)
    assert gpu_bench(GpuBenchOptions("tiny", "simt", out=tmp_path)) == 1
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert document["failed"] == {"device": "RuntimeError: out of luck"}
    assert document["kernels"]
    assert document["rows"][0]["figures"]["ttft_ratio"] > 0


def test_targets_are_told_met_or_missed_where_they_are_set() -> None:
    document = {
        "shape": "27b", "device": "NVIDIA H200", "is_verification_only": False,
        "rows": [
            {"tokens": 2048, "figures": {"decode_weights_of_copy": 0.79}},
            {"tokens": 16384, "device": {"restore": {"us": 900.0}}, "figures": {}},
        ],
    }  # fmt: skip
    lines = [line for line in targets(document) if line.startswith("|")][2:]
    assert [line.split(" | ")[-1].strip("| ") for line in lines] == ["**missed**", "met", "", ""]
    assert sum("not measured" in line for line in lines) == 2
    assert targets({**document, "device": "NVIDIA H100"}) == []
    assert targets({**document, "is_verification_only": True}) == []
