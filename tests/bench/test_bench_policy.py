"""The bench of control loops measures what it says. No assertion depends on how fast it is."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from flashrt import cli
from flashrt.commands.bench import policy as module
from flashrt.commands.bench.policy import PolicyBenchOptions, bench_policy
from flashrt.commands.bench.report import bars
from flashrt.robot.loop import ControlLoop

SHORT = PolicyBenchOptions("random-tiny", "cpu", seconds=0.3, hz=200.0, repeats=6)


def run(path: Path, plot: Path | None = None) -> tuple[int, dict[str, Any]]:
    code = bench_policy(SHORT, path, plot)
    return code, json.loads(path.read_text())


def test_every_figure_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = tmp_path / "ticks.svg"
    code, document = run(tmp_path / "policy.json", svg)
    assert code == 0
    assert {"command", "date", "device", "threads", "machine", "versions"} <= set(document)
    assert document["ticks"] == 60 == sum(document["histogram"]["counts"])
    edges = document["histogram"]["edges_s"]
    assert edges[0] <= document["latency_p50_s"] <= document["latency_max_s"] <= edges[-1]
    for what in ("latency", "planning", "lateness", "restore", "snapshot", "fork"):
        quantiles = [document[f"{what}_{name}_s"] for name in ("p50", "p99", "p999", "max")]
        assert quantiles == sorted(quantiles) and quantiles[0] > 0
    assert [row["seconds"] for row in document["rewind"]] == [0.1, 0.5, 2.0]
    assert document["allocations"] == document["captures"] == document["compilations"] == 0
    for name, (limit, is_met) in document["targets"].items():
        assert is_met == (document[name] < limit)
    steps = document["policy"]["n_action_steps"]
    look = document["look"]
    assert len(look) == 3 * steps and sum(row["is_planned"] for row in look) == 3
    assert all(row["started_s"] < row["acted_s"] <= row["settled_s"] for row in look)
    printed = capsys.readouterr().out
    for label in ("observation to action", "rewind by 2 s", "go on to the bit: yes", "█"):
        assert label in printed
    root = ET.fromstring(svg.read_text())
    texts = "".join(root.itertext())
    assert "One line per tick" in texts and "p99.9" in texts and "Latency of 60 ticks" in texts


def test_a_state_that_differs_fails_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what goes on after a restore is compared, and decides the exit code."""
    restore = ControlLoop.restore

    def wrong(loop: ControlLoop, capsule: Any) -> None:
        restore(loop, capsule)
        loop.set_seed(5)

    monkeypatch.setattr(ControlLoop, "restore", wrong)
    code, document = run(tmp_path / "policy.json")
    assert (code, document["is_exact"]) == (1, False)


def test_an_allocation_fails_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = module._boundaries

    def allocating(loop: ControlLoop, *arguments: Any) -> Any:
        loop.engine.backend.counters.captures += 1
        return measured(loop, *arguments)

    monkeypatch.setattr(module, "_boundaries", allocating)
    code, document = run(tmp_path / "policy.json")
    assert (code, document["captures"], document["is_steady"]) == (1, 1, False)


def test_bars() -> None:
    assert [len(bar) for bar in bars([0, 1, 600, 1200])] == [0, 1, 30, 60]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["bench", "--device", "cpu", "--seconds", "0.2", "--hz", "150"]
    target = tmp_path / "p.json"
    assert cli.main([*common, "--policy", "random-tiny", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["ticks"] == 30
    assert cli.main([*common, "--policy", "none-such"]) == 2
    assert "two-doors, random-tiny" in capsys.readouterr().err
    assert cli.main([*common, "--policy", "random-tiny", "--hz", "1"]) == 2
    assert "have no tick" in capsys.readouterr().err
    assert cli.main([*common, "--policy", "random-tiny", "--lengths", "3"]) == 2
    assert "leave out --checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*common, "--policy", "--draft"])


def test_a_png_needs_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "ticks.png"
    run(tmp_path / "policy.json", png)
    assert png.read_bytes().startswith(b"\x89PNG")
