"""Models that see against transformers: patches, embeddings, logits and greedy tokens.

One to three images of odd sizes, one of them twice, as tools/vision_golden.py recorded them. On the
CPU in float32, and on the raw CUDA kernels by the SIMT shim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import flashrt
from flashrt.engine.sight import Sight
from flashrt.models.qwen35.patches import fitted, patches_of
from flashrt.vision.pixels import pixels_of
from tests.golden.expected import assert_close
from tests.tolerances import LOGITS_RELATIVE

FOLDER = Path(__file__).parent / "vision"
NAMES = ("qwen35", "qwen35-odd")
MOST_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """A checkpoint, images, and what transformers computes from them."""

    folder: Path
    info: dict[str, Any]
    arrays: dict[str, NDArray[np.float32]]

    def tokens(self, engine: flashrt.Engine, prompt: int) -> NDArray[np.int32]:
        """A prompt as a session takes it."""
        parts = [
            [part] if isinstance(part, int) else engine.image(self.folder / f"{part}.png").tokens
            for part in self.info["prompts"][prompt]
        ]
        return np.concatenate(parts).astype(np.int32)


def read(name: str) -> GoldenSet:
    folder = FOLDER / name
    info = json.loads((folder / "expected.json").read_text())
    return GoldenSet(folder, info, load_file(folder / "expected.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    return read(request.param)


@pytest.fixture(scope="module")
def engine(golden: GoldenSet) -> Iterator[flashrt.Engine]:
    made = flashrt.load(
        golden.folder, "cpu", max_positions=MOST_POSITIONS, kv_dtype="float32", images=True
    )
    yield made
    made.close()


def sight_of(engine: flashrt.Engine) -> Sight:
    assert engine.sight is not None
    return engine.sight


def test_patches_and_embeddings(engine: flashrt.Engine, golden: GoldenSet) -> None:
    """Patches to the bit. Fault: another resampling, order of patches, place or weight."""
    tower = sight_of(engine).tower
    config = tower.model.config
    for name, grid in golden.info["grids"].items():
        pixels = pixels_of(
            (golden.folder / f"{name}.png").read_bytes(), lambda h, w: fitted(config, h, w, 1 << 30)
        )
        patches = patches_of(config, pixels)
        assert [1, patches.height, patches.width] == [1, *(n // config.merge for n in grid[1:])]
        digest = hashlib.sha256(patches.values.tobytes()).hexdigest()
        assert digest == golden.info["patches"][name]
        assert_close(tower.see(patches), golden.arrays[f"embeddings.{name}"], name)


@pytest.mark.parametrize("prompt", range(4))
def test_logits_and_greedy_tokens(engine: flashrt.Engine, golden: GoldenSet, prompt: int) -> None:
    with engine.session() as session:
        check(engine, session, golden, prompt)


def check(engine: flashrt.Engine, session: flashrt.Session, golden: GoldenSet, prompt: int) -> None:
    """The logits after a prompt, greedy tokens, and the logits that chose the last of them."""
    session.prefill(golden.tokens(engine, prompt))
    assert_close(session.logits(), golden.arrays["logits_last"][prompt], "logits_last")
    greedy = golden.info["greedy"][prompt]
    assert list(session.generate(len(greedy))) == greedy
    session.rollback(session.position - 1)
    assert_close(session.logits(), golden.arrays["greedy_logits_last"][prompt], "greedy")


def test_on_the_cuda_kernels() -> None:
    """The small image, in precision high and in what the default rounds."""
    golden, prompt = read("qwen35-odd"), 1
    want = golden.arrays["logits_last"][prompt]
    for precision in ("high", "bfloat16"):
        engine = flashrt.load(
            golden.folder, "simt", max_positions=64, kv_dtype="float32", precision=precision,
            images=True, prefill_rows=64,
        )  # fmt: skip
        with engine, engine.session() as session:
            session.prefill(golden.tokens(engine, prompt))
            wrong = session.logits() - want
            if precision == "high":
                assert_close(session.logits(), want, "logits_last")
                greedy = golden.info["greedy"][prompt][:8]
                assert list(session.generate(len(greedy))) == greedy
            else:
                assert np.sqrt(np.mean(wrong**2) / np.mean(want**2)) <= LOGITS_RELATIVE
