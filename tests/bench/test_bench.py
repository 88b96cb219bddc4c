"""The bench measures what it says. No assertion here depends on how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt import cli
from flashrt.base.flags import Flags
from flashrt.commands.bench import draft, policy, resume, session
from flashrt.commands.bench.document import BenchOptions
from flashrt.commands.bench.session import bench
from flashrt.commands.checkpoints import EngineOptions
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.work import flop_of, streamed_bytes
from flashrt.view import figure

TINY = Path(__file__).parents[1] / "golden" / "tiny"


@pytest.fixture(scope="module")
def engine() -> flashrt.Engine:
    return flashrt.load(TINY, device="cpu", max_positions=320, draft=False)


def test_every_figure_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    pytest.importorskip("matplotlib")
    options = BenchOptions(
        checkpoint=TINY, lengths=[128, 64], repeats=1, engine=EngineOptions("cpu")
    )
    assert bench(options, path, picture) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert picture.read_text().lstrip().startswith("<?xml")
    assert [row["tokens"] for row in document["rows"]] == [64, 128]
    for row in document["rows"]:
        assert row["is_exact"]
        assert all(value > 0 for key, value in row.items() if key not in ("is_exact", "samples"))
        assert row["inter_token_p50_s"] <= row["inter_token_p99_s"]
        assert f"{row['tokens']:,}" in printed
    assert {"command", "date", "device", "threads", "machine", "versions", "limits"} <= set(
        document
    )
    assert all(value > 0 for value in document["limits"].values())
    assert "of FMA peak" in printed
    assert "of memcpy" in printed
    assert "TTFT of a turn" in printed
    assert document["reply_tokens"] and document["short_turn_tokens"]


def test_bytes_are_those_of_the_copy_plans(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(TINY), "--lengths", "64", "--repeats", "1", "--device", "cpu"]
    assert cli.main(["bench", *arguments, "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    # draft head and all, as bench does
    engine = flashrt.load(TINY, device="cpu", max_positions=320)
    one = engine.session()
    one.prefill(range(64))
    capsule = one.snapshot()
    fixed = engine.stats()["fixed_bytes"]
    assert row["restore_ancestor_bytes"] == fixed
    assert row["snapshot_bytes"] == row["restore_bytes"]
    assert fixed < row["restore_bytes"] <= capsule.nbytes
    assert row["snapshot_turn_bytes"] < row["snapshot_bytes"]


def test_work_counted_from_tapes_is_work_counted_by_hand(engine: flashrt.Engine) -> None:
    config = json.loads((TINY / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, k, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    hk, hv = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dk, dv = config["linear_key_head_dim"], config["linear_value_head_dim"]
    linear = hidden * (2 * hk * dk + 2 * hv * dv + 2 * hv) + hv * dv * hidden + 3 * hv * dk * dv
    full = hidden * (2 * q * d + 2 * k * d) + q * d * hidden
    kinds = config["layer_types"]
    n_linear, n_full = kinds.count("linear_attention"), kinds.count("full_attention")
    per_token = 2 * (n_linear * linear + n_full * full + len(kinds) * 3 * hidden * inner)
    for n in (1, 7, 100):
        pairs = n * (n + 1) // 2
        expected = per_token * n + n_full * 4 * q * d * pairs
        assert flop_of(engine.model.record(PREFILL, 1), n) == expected


def test_a_token_streams_all_weights_but_a_gathered_table(engine: flashrt.Engine) -> None:
    tied = streamed_bytes(engine.model.record(DECODE, 1), engine.backend)
    total = sum(slot.storage.nbytes for slot in engine.arena.weights.slots)
    assert tied == total  # the head of this checkpoint is the table, and is read in whole
    untied = flashrt.load(
        TINY.with_name("tiny-untied-odd"), device="cpu", max_positions=64, draft=False
    )
    total = sum(slot.storage.nbytes for slot in untied.arena.weights.slots)
    (table,) = [s for s in untied.arena.weights.slots if "embed" in s.region.name]
    assert (
        streamed_bytes(untied.model.record(DECODE, 1), untied.backend)
        == total - table.storage.nbytes
    )


@pytest.mark.parametrize("kind", [(), ("--resume",), ("--draft",), ("--policy",)])
def test_outputs_are_checked_before_anything_is_measured(
    kind: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Red when matplotlib, or a folder, is found missing only after minutes of measurement."""

    def measured(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it measures")

    for module in (session, resume, draft):
        monkeypatch.setattr(module, "checkpoint_of", measured)
    monkeypatch.setattr(policy, "load_policy", measured)
    monkeypatch.setattr(figure, "has_matplotlib", lambda: False)
    refused = {
        ("--json", str(tmp_path / "absent" / "x.json")): "there is no folder",
        ("--plot", str(tmp_path / "x.png")): "pip install 'flashrt[plot]'",
        ("--plot", str(tmp_path / "x.doc")): "ends in .png or .svg",
    }
    if kind == ("--draft",):
        refused = {k: v for k, v in refused.items() if k[0] == "--json"}
    for outputs, said in refused.items():
        assert cli.main(["bench", "--device", "cpu", *kind, *outputs]) == 2
        assert said in capsys.readouterr().err


def test_resume_from_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    cache = tmp_path / "cache"
    monkeypatch.setattr(resume, "flags", lambda: Flags(cache_dir=cache))
    path, picture = tmp_path / "resume.json", tmp_path / "resume.svg"
    arguments = ["--checkpoint", str(TINY), "--device", "cpu", "--lengths", "130,64"]
    outputs = ["--repeats", "1", "--json", str(path), "--plot", str(picture)]
    assert cli.main(["bench", "--resume", *arguments, *outputs]) == 0
    document = json.loads(path.read_text())
    assert [row["tokens"] for row in document["rows"]] == [64, 130]
    assert all(value > 0 for row in document["rows"] for value in row.values())
    assert {"command", "date", "device", "machine", "folder", "repeats"} <= set(document)
    assert picture.read_text().lstrip().startswith("<?xml")
    assert "First token after a restart" in capsys.readouterr().out
    assert not list(cache.iterdir())
