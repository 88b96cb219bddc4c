"""Golden sets of families against transformers: logits, greedy tokens, state; three ways.

IS: the CPU in float32, the raw CUDA kernels by the SIMT shim, and the tapes by the reference of
each op, so that a wrong tape and a wrong kernel cannot cancel. Red when a formula of a family, or
what it keeps from token to token, is not what transformers computes.
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
from flashrt.core.region import DType
from flashrt.models import model_for
from flashrt.weights.checkpoint import open_checkpoint
from tests.families import SETS
from tests.golden.expected import assert_close
from tests.golden.tape_interpreter import TapeInterpreter
from tests.tolerances import LOGITS_RELATIVE

NAMES = sorted(p.parent.name for p in SETS.glob("*/expected.json"))
ODD = [name for name in NAMES if name.endswith("-odd")]


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """A checkpoint and what transformers computes from it, as tools/family_golden.py writes it."""

    folder: Path
    prompts: list[list[int]]
    greedy: list[list[int]]  # [prompts, 48]
    short: int  # the prompt with logits of every position
    cached: int  # the prompt with states
    arrays: dict[str, NDArray[np.float32]]
    drafts: list[int]  # of a draft head, behind prompt `cached` and a greedy token

    def assert_states(self, lane: dict[str, NDArray[np.generic]]) -> None:
        """Compare a lane after prompt `cached` with arrays `{layer}.{region}`, regions counting the
        layers that have one: keys and values [layers * Nk, positions, D], others [layers, ...].
        """
        seen: dict[str, int] = {}
        found = sorted((name for name in self.arrays if name[0].isdigit()), key=_layer_of)
        for name in found:
            want, region = self.arrays[name], name.split(".")[1]
            at = seen.get(region, 0)
            if region in ("keys", "values"):
                heads, n_rows, _ = want.shape
                assert_close(lane[region][at : at + heads, :n_rows], want, name)
                seen[region] = at + heads
            else:
                assert_close(lane[region][at], want, name)
                seen[region] = at + 1
        assert seen == {region: len(lane[region]) for region in seen}

    def regions(self) -> set[str]:
        """Names of the regions that have states."""
        return {name.split(".")[1] for name in self.arrays if name[0].isdigit()}


def _layer_of(name: str) -> int:
    return int(name.split(".", maxsplit=1)[0])


def read(name: str) -> GoldenSet:
    folder = SETS / name
    info = json.loads((folder / "expected.json").read_text())
    arrays = load_file(folder / "expected.safetensors")
    names = ("prompts", "greedy", "short", "cached")
    return GoldenSet(folder, *(info[n] for n in names), arrays, info.get("drafts", []))


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    return read(request.param)


@pytest.fixture(scope="module")
def engine(golden: GoldenSet) -> Iterator[flashrt.Engine]:
    made = flashrt.load(golden.folder, "cpu", max_positions=700, kv_dtype="float32")
    yield made
    made.close()


@pytest.mark.parametrize("prompt", range(6))
def test_logits_and_greedy_tokens(engine: flashrt.Engine, golden: GoldenSet, prompt: int) -> None:
    with engine.session() as session:
        check(session, golden, prompt)


def check(session: flashrt.Session, golden: GoldenSet, prompt: int) -> None:
    """The logits after a prompt, greedy tokens, and the logits that chose the last of them."""
    session.prefill(golden.prompts[prompt])
    assert_close(session.logits(), golden.arrays["logits_last"][prompt], "logits_last")
    assert list(session.generate(len(golden.greedy[prompt]))) == golden.greedy[prompt]
    session.rollback(session.position - 1)
    assert_close(session.logits(), golden.arrays["greedy_logits_last"][prompt], "greedy")


def test_every_position_and_the_state(engine: flashrt.Engine, golden: GoldenSet) -> None:
    with engine.session() as session:
        for position, token in enumerate(golden.prompts[golden.short]):
            session.prefill([token])
            assert_close(session.logits(), golden.arrays["logits_all"][position], str(position))
    with engine.session() as session:
        session.prefill(golden.prompts[golden.cached])
        golden.assert_states(lane_of(engine, session, golden))


def lane_of(
    engine: flashrt.Engine, session: flashrt.Session, golden: GoldenSet
) -> dict[str, NDArray[np.generic]]:
    """The lane's arrays that have expected values."""
    return {name: engine.lane_array(session.lane, name) for name in golden.regions()}


def test_drafts(engine: flashrt.Engine, golden: GoldenSet) -> None:
    """The chain of drafts behind a prompt and its first greedy token, where there is a head."""
    if golden.drafts:
        with engine.session() as session:
            session.prefill(golden.prompts[golden.cached])
            assert list(session.generate(1)) == golden.greedy[golden.cached][:1]
            for i, want in enumerate(golden.arrays["draft_logits"]):
                engine.draft(session.lane, 1 + i)
                got = engine.lane_array(session.lane, "draft_logits")[0]
                assert_close(got, want, f"draft {i}")
            drafted = engine.lane_array(session.lane, "drafted")[1 : 1 + len(golden.drafts)]
            assert drafted.tolist() == golden.drafts


@pytest.mark.parametrize("prompt", [1, 3])
def test_tapes(golden: GoldenSet, prompt: int) -> None:
    """The model's declaration, run by the references in float64."""
    checkpoint = open_checkpoint(golden.folder)
    model = model_for(
        checkpoint.config, max_positions=700, kv_dtype=DType.F32,
        is_tied="lm_head.weight" not in checkpoint.tensors,
    )  # fmt: skip
    lane = TapeInterpreter(model, checkpoint)
    lane.prefill(golden.prompts[prompt])
    if prompt == golden.cached:
        golden.assert_states(lane.lane)
    assert_close(lane.sample(), golden.arrays["logits_last"][prompt], "logits_last")
    tokens, logits = lane.greedy(len(golden.greedy[prompt]))
    assert tokens == golden.greedy[prompt]
    assert_close(logits, golden.arrays["greedy_logits_last"][prompt], "greedy")


@pytest.mark.parametrize("name", ODD)  # a set of a family for each precision: the shim is slow
def test_high_on_the_cuda_kernels(name: str) -> None:
    golden = read(name)
    engine = flashrt.load(
        golden.folder, "simt", max_positions=300, kv_dtype="float32", precision="high"
    )
    with engine.session() as session:
        check(session, golden, golden.cached)
        session.rollback(len(golden.prompts[golden.cached]))
        golden.assert_states(lane_of(engine, session, golden))
    engine.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ODD])
def test_bfloat16_on_the_cuda_kernels(name: str) -> None:
    """What the default precision rounds: red where a family lets it grow."""
    golden = read(name)
    engine, errors = flashrt.load(golden.folder, "simt", max_positions=300), []
    for prompt in range(4):
        with engine.session() as session:
            session.prefill(golden.prompts[prompt])
            want = golden.arrays["logits_last"][prompt]
            wrong = session.logits() - want
            errors.append(float(np.sqrt(np.mean(wrong**2) / np.mean(want**2))))
    engine.close()
    assert max(errors) <= LOGITS_RELATIVE, errors
