"""The bench of drafting measures what it says. No assertion depends on how fast anything is."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt import cli
from flashrt.commands.bench import draft as module
from flashrt.commands.bench.document import BenchOptions
from flashrt.commands.bench.draft import FORCED, LENGTHS, REPLAYS, bench_draft, measure
from flashrt.commands.checkpoints import EngineOptions
from flashrt.weights.random_checkpoint import write_random_checkpoint

KINDS = [("decode", 1), ("draft", 1), *(("verify", n) for n in range(2, 10)), ("commit", 4)]
TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("c") / "c", has_draft_head=True)


def run(checkpoint: Path, path: Path, repeats: int = 1) -> tuple[int, dict[str, Any]]:
    options = BenchOptions(
        checkpoint=checkpoint, lengths=[40], repeats=repeats, engine=EngineOptions("cpu")
    )
    code = bench_draft(options, path, TOKENS)
    return code, json.loads(path.read_text())


@pytest.mark.slow
def test_every_figure_is_there(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = run(checkpoint, tmp_path / "draft.json", repeats=2)
    assert code == 0
    assert {"command", "date", "device", "threads", "machine", "versions"} <= set(document)
    (row,) = document["rows"]
    assert (row["position"], row["tokens"], row["is_exact"]) == (40, TOKENS, True)
    assert [(cost["what"], cost["rows"]) for cost in row["costs"]] == KINDS
    decode_s = row["costs"][0]["median_s"]
    for cost in row["costs"]:
        assert len(cost["samples_s"]) == document["replays"] == 2 * REPLAYS
        assert cost["median_s"] == statistics.median(cost["samples_s"]) > 0
        assert cost["of_decode"] == cost["median_s"] / decode_s
    assert [(s["forced"], s["draft"]) for s in row["speeds"]] == [
        (forced, draft) for forced in FORCED for draft in LENGTHS
    ]
    for speed in row["speeds"]:
        assert len(speed["samples_s"]) == document["repeats"] == 2
        assert speed["tokens_per_s"] == TOKENS / statistics.median(speed["samples_s"])
    printed = capsys.readouterr().out
    assert "One replay at position 40, median of 10" in printed
    assert f"{TOKENS} tokens from position 40, median of 2" in printed
    for label in ("as the model agrees", "forced: 0.6", "forced: 0.8", "forced: 1.0", "verify"):
        assert label in printed


def test_forced_agreement_is_what_its_label_says(checkpoint: Path, tmp_path: Path) -> None:
    (row,) = run(checkpoint, tmp_path / "draft.json")[1]["rows"]
    speeds = {(s["forced"], s["draft"]): s for s in row["speeds"]}
    for (forced, draft), speed in speeds.items():
        if draft == 0:
            assert speed["verifies"] == 0
            assert speed["acceptance"] is speed["mean_accepted"] is None
        elif draft != "auto":
            assert speed["drafted"] >= speed["verifies"] > 0
            assert speed["acceptance"] == speed["accepted"] / speed["drafted"]
            assert (speed["acceptance"] == 1) == (forced == 1)
            # each verify yields one token more than it accepts, and the last token is not fed
            assert speed["verifies"] + speed["accepted"] in (TOKENS, TOKENS - 1)
    assert speeds[None, 3]["acceptance"] < speeds[0.8, 3]["acceptance"]


def test_a_token_that_differs_fails_the_bench(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the comparison of tokens is made, and decides the exit code."""
    generate = module._generate

    def wrong(*arguments: Any) -> list[int]:
        tokens = generate(*arguments)
        return tokens if arguments[-1].draft != 2 else [*tokens[:-1], tokens[-1] ^ 1]

    monkeypatch.setattr(module, "_generate", wrong)
    code, document = run(checkpoint, tmp_path / "draft.json")
    assert code == 1
    assert not document["rows"][0]["is_exact"]


@pytest.mark.slow
def test_the_engine_is_as_before(checkpoint: Path) -> None:
    engine = flashrt.load(checkpoint, device="cpu", max_positions=80)
    (row,) = measure(engine, [40], TOKENS, 1, lambda *_: None)
    assert row.is_exact
    assert engine.stats()["capsules"] == engine.stats()["pool_used_bytes"] == 0
    assert "draft" not in vars(engine)
    engine.session().close()
    engine.arena.check_guards()


def test_what_does_not_draft_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = flashrt.load(checkpoint, device="cpu", max_positions=80, draft=False)
    with pytest.raises(flashrt.FlashrtError, match="does not draft; it takes a checkpoint with"):
        measure(engine, [40], TOKENS, 1, lambda *_: None)
    headless = write_random_checkpoint(tmp_path / "headless")
    arguments = ["bench", "--device", "cpu", "--checkpoint"]
    assert cli.main([*arguments, str(headless), "--draft"]) == 2
    assert "draft head (mtp.*)" in capsys.readouterr().err
    assert cli.main([*arguments, str(checkpoint), "--draft", "--plot", "x.svg"]) == 2
    assert "draws no plot" in capsys.readouterr().err
