"""Keys and values as codes of one byte: near what they stand for, and the same on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.core.region import DType
from tests.backend.cases import attention, rope_append
from tests.backend.runner import Case, Runner
from tests.reference import REFERENCE, Operands
from tests.tolerances import tolerance

Array = NDArray[Any]
CODES = {DType.I8: (np.int8, 127), DType.E4M3: (ml_dtypes.float8_e4m3fn, 448)}
FORM = (0, 1, 1.0)


def values_of(codes: Array, scales: Array, dtype: DType) -> Array:
    """In float64."""
    return codes.view(CODES[dtype][0]).astype(np.float64) * scales.astype(np.float64)


def coded(x: Array, dtype: DType) -> tuple[Array, Array]:
    """The definition: codes, as the region's array has them, and scales."""
    kind, most = CODES[dtype]
    scales = (np.abs(x).max(-1, keepdims=True) / np.float32(most)).astype(np.float32)
    q = np.where(scales > 0, x / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    codes = np.rint(q).astype(np.int8) if dtype is DType.I8 else q.astype(kind).view(np.uint8)
    return codes, scales


def with_codes(case: Case, dtype: DType) -> Case:
    return replace(case, dtypes={**case.dtypes, "keys": dtype, "values": dtype})


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(7, 5, (4, 2), 32), (64, 33, (3, 1), 80)])
def test_rows_become_codes(runner: Runner, dtype: DType, shape: tuple[Any, ...]) -> None:
    """Red when the scale is another, codes are cut instead of rounded, or a row is not its own."""
    T, n, heads, D = shape
    case = rope_append(T, n, heads, D, D // 2, 250, 330, "f32", form=FORM)
    plain, after = runner.run(case), runner.run(with_codes(case, dtype))
    for name in ("keys", "values"):
        wanted = plain[name][:, 250 : 250 + n]
        codes, scales = coded(wanted, dtype)
        got = after[name][:, 250 : 250 + n]
        got_scales = after[f"{name[:-1]}_scales"][:, 250 : 250 + n]
        assert np.array_equal(got_scales, scales), name
        assert np.array_equal(got.view(np.uint8), codes.view(np.uint8)), name
        untouched = np.delete(after[name], np.s_[250 : 250 + n], axis=1)
        assert (untouched.view(np.uint8) == 0xFF).all()
    assert np.array_equal(after["q"], plain["q"], equal_nan=True)


@pytest.mark.parametrize("dtype", CODES)
def test_rows_that_no_scale_fits(runner: Runner, dtype: DType) -> None:
    """Zeros stay zeros; a row with an infinite or missing value is NaN, and says so."""
    case = rope_append(7, 4, (2, 1), 32, 16, 5, 77, "f32", form=(0, 0, 1.0))
    u = np.array(case.operands["u"])
    u[0, 96:], u[1, 100], u[2, 127], u[3, 96:] = 0, np.nan, -np.inf, 1e-37
    after = runner.run(with_codes(case.but(u=u), dtype))
    assert np.isnan(after["value_scales"][0, 6:8]).all()
    assert (after["value_scales"][0, [5, 8]] == 0).all()
    assert (after["values"][0, [5, 8]].view(np.uint8) == 0).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(
    "case",
    [
        attention(3, 2, (4, 2), 32, 250, 700, "f32", gated=0),
        attention(64, 33, (7, 1), 96, 300, 600, "f32"),
        attention(7, 7, (2, 2), 80, 250, 700, "f32", shift=253),
    ],
    ids=["few", "many", "shifted"],
)
def test_attention_over_codes(runner: Runner, dtype: DType, case: Case) -> None:
    """Red when codes are read without their scale, or with another row's."""
    operands: dict[str, Any] = {}
    real: dict[str, Array] = {}
    for name in ("keys", "values"):
        x = np.array(case.operands[name])
        x *= np.logspace(-2, 1, x.shape[1], dtype=np.float32)[:, None]  # scales that differ
        is_set = ~np.isnan(x).any(-1, keepdims=True)
        codes, scales = coded(np.where(is_set, x, 0), dtype)
        operands[name] = np.where(is_set, codes, np.array(-1).astype(codes.dtype))
        operands[f"{name[:-1]}_scales"] = np.where(is_set, scales, np.nan).astype(np.float32)
        real[name] = values_of(operands[name], operands[f"{name[:-1]}_scales"], dtype)
    after = runner.run(with_codes(case.but(**operands), dtype))
    arrays = {n: a for n, a in case.operands.items() if isinstance(a, np.ndarray)}
    shapes = {n: np.empty(a) for n, a in case.operands.items() if isinstance(a, tuple)}
    with np.errstate(all="ignore"):
        wanted = REFERENCE["attention"](Operands(shapes | arrays | real, case.attrs))["y"]
    is_set = ~np.isnan(wanted)
    off, size = (np.mean(x[is_set] ** 2) for x in (after["y"] - wanted, wanted))
    error = np.sqrt(off / size)
    backend, stored = runner.backend, runner.dtype(case, "y")
    is_gpu = backend.name == "cuda"
    assert error <= tolerance("attention", backend.acts.narrow, stored, is_gpu=is_gpu)
