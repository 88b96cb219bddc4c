"""Random checkpoints: a model loads them, seeds decide the bytes, and text from them is lively."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashrt.base.errors import CheckpointError
from flashrt.core.region import DType
from flashrt.models import Model, model_for
from flashrt.weights import random_checkpoint
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.loader import check_sources
from flashrt.weights.random_checkpoint import SHAPES, Shape, shape_config, write_random_checkpoint
from tests.golden.tape_interpreter import TapeInterpreter


def parts(path: Path, **options: bool) -> tuple[Checkpoint, Model]:
    checkpoint = open_checkpoint(path)
    return checkpoint, model_for(
        checkpoint.config, max_positions=512, kv_dtype=DType.F32, **options
    )


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("has_draft_head", [True, False])
@pytest.mark.parametrize("ssm_dtype", ["F32", "BF16"])
def test_rules_fit(tmp_path: Path, is_tied: bool, has_draft_head: bool, ssm_dtype: str) -> None:
    path = write_random_checkpoint(
        tmp_path / "c", is_tied=is_tied, has_draft_head=has_draft_head, ssm_dtype=ssm_dtype
    )
    checkpoint, model = parts(path, has_draft_head=has_draft_head)
    check_sources(model.weights, checkpoint)
    dtypes = {t.dtype for n, t in checkpoint.tensors.items() if n.endswith("A_log")}
    assert dtypes == {ssm_dtype}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_shape_of_the_released_small_model() -> None:
    config = shape_config("0.8b")
    model = model_for(config, max_positions=4096)
    names = {s.name: s.shape for rule in model.weights for s in rule.sources}
    assert names == dict(random_checkpoint.tensor_shapes(SHAPES["0.8b"], True, False))
    assert sum(np.prod(shape) for shape in names.values()) == 752_393_024


@pytest.mark.parametrize(
    ("shape", "n_weights"), [("35b-a3b", 34_660_610_688), ("122b-a10b", 122_111_526_912)]
)
def test_shapes_of_the_released_models_with_experts(shape: str, n_weights: int) -> None:
    model = model_for(shape_config(shape), max_positions=64)
    names = {s.name: s.shape for rule in model.weights for s in rule.sources}
    assert names == dict(random_checkpoint.tensor_shapes(SHAPES[shape], False, False))
    assert sum(np.prod(extents) for extents in names.values()) == n_weights


def test_a_model_with_experts(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "c", "tiny-moe", has_draft_head=True)
    checkpoint, model = parts(path, has_draft_head=True)
    check_sources(model.weights, checkpoint)


def test_seed_decides_the_bytes_and_chunks_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, seed: int) -> bytes:
        path = write_random_checkpoint(tmp_path / name, seed=seed)
        return (path / "model.safetensors").read_bytes()

    first = weights("a", 1)
    assert weights("b", 2) != first
    monkeypatch.setattr(random_checkpoint, "CHUNK_SIZE", 1 << 10)
    assert weights("c", 1) == first


def test_text_does_not_loop_and_the_state_matters(tmp_path: Path) -> None:
    checkpoint, model = parts(write_random_checkpoint(tmp_path / "c"))
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, 20).tolist()
    lane = TapeInterpreter(model, checkpoint)
    lane.prefill(prompt)
    tokens, _ = lane.greedy(64)
    assert len(set(tokens)) >= 32
    changed = 0
    for length in (5, 10, 15, 20):
        lane = TapeInterpreter(model, checkpoint)
        lane.prefill(prompt[:length])
        lane.sample()
        before = {name: array.copy() for name, array in lane.lane.items()}
        lane.decode()
        right = int(lane.lane["cursor"][2])
        for name, array in before.items():
            lane.lane[name][...] = array
        lane.lane["state"][...] = 0
        lane.decode()
        changed += int(lane.lane["cursor"][2]) != right
    assert changed >= 3


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    path = write_random_checkpoint(tmp_path / "c", progress=lambda *call: calls.append(call))
    size = (path / "model.safetensors").stat().st_size
    what, done, total = calls[-1]
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert (what, done) == ("random weights", total) and total == size - 8 - header


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown shape 'huge'; shapes: tiny, mini"):
        write_random_checkpoint(tmp_path / "c", "huge")
    path = write_random_checkpoint(tmp_path / "c")
    before = (path / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        write_random_checkpoint(tmp_path / "c", seed=2)
    assert (path / "config.json").read_bytes() == before

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        write_random_checkpoint(tmp_path / "d", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_any_shape(tmp_path: Path) -> None:
    shape = Shape(48, 5, 40, (3, 1, 16), (2, 4, 8), 100)
    checkpoint, model = parts(write_random_checkpoint(tmp_path / "c", shape))
    check_sources(model.weights, checkpoint)
    assert json.loads((tmp_path / "c" / "generation_config.json").read_text())["use_cache"] is True
