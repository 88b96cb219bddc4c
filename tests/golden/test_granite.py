"""Granite-4.0-H without experts against transformers in float32: logits, and 48 greedy tokens.

Red when a multiplier, a bias, a group, a limit of a time step or a rotary position is left out or
applied elsewhere; see tests/granite_models for what the two models have, and
tools/granite_golden.py for what made the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import flashrt
from tests import granite_models
from tests.golden.expected import assert_close
from tests.tolerances import LOGITS_RELATIVE

RECORDED = Path(__file__).parent / "granite"
PROMPTS = granite_models.prompts()


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint and what was recorded of it."""

    folder: Path
    greedy: list[list[int]]
    arrays: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module", params=granite_models.CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    folder = tmp_path_factory.mktemp("granite") / name
    granite_models.write(folder, granite_models.CONFIGS[name])
    info = json.loads((RECORDED / f"{name}.json").read_text())
    return Case(folder, info["greedy"], load_file(RECORDED / f"{name}.safetensors"))


@pytest.fixture(scope="module")
def engine(case: Case) -> Iterator[flashrt.Engine]:
    engine = flashrt.load(
        case.folder, "cpu", max_positions=700, kv_dtype="float32", precision="high"
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("prompt", range(len(PROMPTS)), ids=lambda i: f"{len(PROMPTS[i])} tokens")
def test_logits_and_greedy_tokens(engine: flashrt.Engine, case: Case, prompt: int) -> None:
    with engine.session() as session:
        session.prefill(PROMPTS[prompt])
        assert_close(session.logits(), case.arrays["logits_last"][prompt], "logits_last")
        tokens = list(session.generate(48))
        assert tokens == case.greedy[prompt]
        session.rollback(session.position - 1)  # the logits that chose the last of them
        assert_close(session.logits(), case.arrays["greedy_logits_last"][prompt], "greedy")


@pytest.mark.parametrize("precision", ["high", "bfloat16"])
def test_the_cuda_kernels(case: Case, precision: str) -> None:
    """The same on the shim: "high" is held to the tolerance of float32."""
    engine = flashrt.load(
        case.folder, "simt", max_positions=128, kv_dtype="float32", precision=precision
    )
    for prompt in (1, 3):
        with engine.session() as session:
            session.prefill(PROMPTS[prompt])
            got, wanted = session.logits(), case.arrays["logits_last"][prompt]
            if precision == "high":
                assert_close(got, wanted, "logits_last")
                assert list(session.generate(9)) == case.greedy[prompt][:9]
            else:
                error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
                assert LOGITS_RELATIVE / 20 < error <= LOGITS_RELATIVE, f"relative {error:.2e}"
    engine.close()
