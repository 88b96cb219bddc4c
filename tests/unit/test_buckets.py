"""The largest launch of a prompt: the rule that chooses it, and what it takes.

IS: sizes of models against their scratch, counted by the planner. IS NOT: results, see
tests/property/test_large_buckets.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import PlanError
from flashrt.cli import main
from flashrt.core.backend import Backend
from flashrt.core.planner import plan_arena, plan_band
from flashrt.engine.buckets import SCRATCH_SHARE, prefill_rows
from flashrt.models import TokenModel, model_for
from flashrt.models.model import PREFILL
from flashrt.weights.random_checkpoint import shape_config

TINY = Path(__file__).parents[1] / "golden" / "tiny"
# (shape, max_positions) -> rows on simt, as on cuda.
CHOSEN = {
    ("tiny", 4096): 256,  # its weights take less than its scratch
    ("mini", 4096): 256,
    ("0.8b", 4096): 2048,
    ("27b", 4096): 2048,
    ("27b", 2047): 1024,
    ("27b", 1024): 1024,
    ("27b", 1000): 256,  # no lane holds so many
    ("27b", 8): 256,
}


@pytest.fixture(scope="module")
def simt() -> Backend:
    return SimtDevice()


def model(shape: str, max_positions: int, rows: int = 256) -> TokenModel:
    return model_for(shape_config(shape), max_positions=max_positions, prefill_rows=rows)


@pytest.mark.parametrize(("shape", "max_positions"), CHOSEN, ids=str)
def test_rows_by_lane_and_scratch(simt: Backend, shape: str, max_positions: int) -> None:
    """Red: a bucket that no lane fills, or scratch out of proportion to the model."""
    chosen = prefill_rows(model(shape, max_positions), simt, max_positions)
    assert chosen == CHOSEN[shape, max_positions]
    made = model(shape, max_positions, chosen)
    assert made.buckets[-1] == chosen
    if chosen > 256:
        assert scratch_of(made, simt, chosen) <= SCRATCH_SHARE * weights_of(made, simt) * 1.01


def test_docs_show_the_scratch(simt: Backend) -> None:
    """Red: a table in docs/cuda.md that is not what the planner counts and the rule chooses."""
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    for shape in ("mini", "0.8b", "4b", "27b"):
        usual, wide = (scratch_of(model(shape, 4096, rows), simt, rows) for rows in (256, 2048))
        weights = weights_of(model(shape, 4096), simt)
        chosen = prefill_rows(model(shape, 4096), simt, 4096)
        share = f"{wide / weights:.2f}" if wide > weights else f"{wide / weights:.3f}"
        line = f"| {shape} | {usual / 1e6:.1f} | {wide / 1e6:.1f} | {share} | {chosen:,} |"
        assert line in text, line


def scratch_of(model: TokenModel, backend: Backend, rows: int) -> int:
    """Bytes of scratch of the prefill of so many rows."""
    tape = model.record(PREFILL, rows)
    plan = plan_arena(model.lane_regions, (tape,), backend.storage, lanes=1, pool_nbytes=0)
    return plan.scratch.nbytes


def weights_of(model: TokenModel, backend: Backend) -> int:
    return plan_band([rule.region for rule in model.weights], backend.storage).nbytes


def test_the_cpu_keeps_its_buckets() -> None:
    assert prefill_rows(model("27b", 4096), CpuDevice(), 4096) == 256


def test_what_is_loaded_by_default_and_on_request() -> None:
    """Red: a choice that does not reach the engine."""
    usual = flashrt.load(TINY, device="cpu", max_positions=64)
    assert usual.model.buckets == (1, 8, 64, 256)
    usual.close()
    wide = flashrt.load(TINY, device="cpu", max_positions=64, prefill_rows=1024)
    assert wide.model.buckets == (1, 8, 64, 256, 1024)
    assert list(wide.chunks(2000)) == [(0, 1024), (1024, 2000)]
    wide.close()


@pytest.mark.parametrize("rows", [0, 100, 4096, True, "256"])
def test_other_numbers_of_rows_are_refused(rows: int) -> None:
    with pytest.raises(PlanError, match=r"prefill_rows is .*; choose one of 64, 256, 1024, 2048"):
        flashrt.load(TINY, device="cpu", max_positions=64, prefill_rows=rows)


def test_plan_shows_the_scratch(capsys: pytest.CaptureFixture[str]) -> None:
    """Red: a plan of other buckets than those asked for."""
    scratch = {}
    for rows in (256, 2048):
        assert main(["plan", "--shape", "0.8b", "--prefill-rows", str(rows), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        scratch[rows] = document["scratch_bytes"]
        assert max(t["rows"] for t in document["tapes"]) == rows
    assert scratch[2048] == pytest.approx(8 * scratch[256], rel=0.01)
