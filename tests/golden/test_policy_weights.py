"""Policies with a language model in them: weights in bfloat16, and quantised while they are loaded.

What a policy answers with rounded weights is held against what it answers with the same numbers in
float32, in which the other tests of this folder hold it against LeRobot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import flashrt
from flashrt.backends.choose import Precision
from flashrt.base.errors import PlanError
from flashrt.engine.numbers import Given
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.quantise import TARGETS, quantise
from tests.policy_families import FAMILIES, PI05, SMOLVLA_PLAIN, Family
from tests.policy_files import Values

# Of int8 weights with activations that are rounded to int16: 6e-5 was measured. The weights
# themselves move actions by 8e-3 and more.
ROUNDED = 2e-4
SEED = 11  # of what is observed, and of noise
Edit = Callable[[str, Values], NDArray[Any]]


TABLES = {SMOLVLA_PLAIN: "embed_tokens", PI05: "lm_head"}  # part of the embeddings' name


@pytest.fixture(params=TABLES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def written(family: Family, folder: Path, edit: Edit) -> Path:
    """The files of its policy, the tensors edited."""
    root = family.write(folder)
    file = root / "model.safetensors"
    save_file({n: edit(n, v) for n, v in load_file(file).items()}, file)
    return root


def chunk_of(family: Family, folder: Path, **options: Any) -> tuple[Values, int]:
    """What a policy answers, and how large its weights are."""
    with flashrt.load_policy(folder, device="cpu", **options) as engine:
        lane = engine.lanes[0]
        engine.observe(lane, family.observation(SEED))
        engine.plan(lane, given=Given(family.noise(SEED)))
        return engine.chunk(lane), engine.stats()["weights_bytes"]


def test_weights_in_bfloat16(family: Family, tmp_path: Path) -> None:
    """Fault: a matrix that is read as another dtype, or rounded once more."""
    stored = written(family, tmp_path / "a", lambda _, v: v.astype(ml_dtypes.bfloat16))
    plain = written(
        family, tmp_path / "b", lambda _, v: v.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    (found, less), (wanted, more) = chunk_of(family, stored), chunk_of(family, plain)
    assert np.array_equal(found, wanted) and less < 0.8 * more
    assert not np.array_equal(found, chunk_of(family, family.write(tmp_path / "c"))[0])


@pytest.mark.parametrize("precision", ["high", "bfloat16"])
def test_weights_that_are_quantised(family: Family, precision: Precision, tmp_path: Path) -> None:
    """A policy answers as the one whose matrices are what the codes stand for: to the bit where
    activations are not rounded. Fault: another matrix is quantised, or in other groups; what is
    computed while loading, as adaptive norms are, is computed from codes.
    """
    target = TARGETS["int8"]

    def decoded(name: str, values: Values) -> Values:
        is_matrix = values.ndim == 2 and values.shape[1] % target.groups.size == 0
        is_of_layers = ".layers." in name and "vision" not in name and ".dense." not in name
        if not is_matrix or not (is_of_layers or TABLES[family.name] in name):
            return values
        return dequantise(target.dtype, target.groups, quantise(values, target))

    whole, given = written(family, tmp_path / "a", decoded), family.write(tmp_path / "b")
    wanted, more = chunk_of(family, whole, precision=precision)
    found, less = chunk_of(family, given, precision=precision, weights="int8")
    assert np.abs(wanted - found).max() <= (0 if precision == "high" else ROUNDED)
    assert less < 0.7 * more
    assert np.abs(wanted - chunk_of(family, given)[0]).max() > 20 * ROUNDED


def test_what_cannot_be_quantised_is_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="weights='int8' is for policies of type smolvla and"):
        flashrt.load_policy("two-doors", device="cpu", weights="int8")
    with pytest.raises(PlanError, match="weights='int3'; choose one of"):
        chunk_of(family, family.write(tmp_path), weights="int3")
