"""The bench of resuming: it measures what it says, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashrt
from flashrt.commands.bench.resume import measure
from flashrt.view.resume_plot import plot


def test_rows_and_plot(engine: flashrt.Engine, tmp_path: Path) -> None:
    seen: list[str] = []
    rows = measure(engine, tmp_path / "b", [64, 130], lambda what, done, total: seen.append(what))
    assert [r.tokens for r in rows] == [64, 130]
    assert rows[1].nbytes > rows[0].nbytes > engine.stats()["fixed_bytes"]
    for row in rows:
        assert min(row.cold_s, row.save_s, row.cached_s, row.restore_s, row.read_s) > 0
        assert row.restore_s < row.cached_s
    assert set(seen) == {"cold 64", "cold 130"}
    assert not (tmp_path / "b").exists()
    assert engine.stats()["capsules"] == engine.stats()["pool_used_bytes"] == 0
    document = {"model": "tiny", "device": "cpu", "rows": [row.row() for row in rows]}
    assert plot(document, tmp_path / "p.svg").stat().st_size > 1000
    with pytest.raises(flashrt.FlashrtError, match="cannot write"):
        plot(document, tmp_path / "absent" / "p.png")
