"""The reference dequantiser: values of every (dtype, groups), as core.groups defines them.

IS: what kernels and formats are compared with, in numpy, to the bit. IS NOT: fast enough for a
step, nor a way round a backend that lacks a format.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import CODE_DTYPES, DType

Floats = NDArray[np.float32]

# Of unsigned codes: half the range, which a code without a minimum has subtracted.
ZERO = {DType.U4: 8, DType.U5: 16, DType.U6: 32}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; bit 3 is the sign
E2M1_VALUES: Floats = np.array([*_MAGNITUDES, *(-v for v in _MAGNITUDES)], np.float32)
E4M3_VALUES: Floats = (
    np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
)
_CODE_BITS = {DType.I8: 8, DType.U4: 4, DType.U5: 5, DType.U6: 6, DType.E4M3: 4, DType.E2M1: 3}
_SCALE_BITS = {Scales.F16_MIN: 11, Scales.TWO_LEVEL_MIN: 11 + 8, Scales.F32_MIN: 24}


def dequantise(dtype: DType, groups: Groups | None, rows: NDArray[np.generic] | Planes) -> Floats:
    """Rows [n, K] as float32. Raises PlanError where dtype, groups and rows do not belong together.

    `rows` as StoredMatrix.read gives them: values (bfloat16 as bits), or planes where there are
    groups. A scale that is infinite or NaN makes values that are.
    """
    if isinstance(rows, Planes):
        if groups is None or dtype not in CODE_DTYPES:
            raise PlanError(f"planes of {dtype} with groups {groups}: codes need groups")
        return _of_codes(dtype, groups, rows)
    if groups is not None:
        raise PlanError(f"values of {dtype} with groups {groups}: groups need codes")
    if dtype not in (DType.BF16, DType.F16, DType.F32):
        raise PlanError(f"values of {dtype}: bfloat16, float16 or float32 are expected")
    values: Floats = (rows.view(ml_dtypes.bfloat16) if dtype is DType.BF16 else rows).astype(
        np.float32
    )
    return values


def _of_codes(dtype: DType, groups: Groups, rows: Planes) -> Floats:
    n, columns = rows.codes.shape
    expected = [(n, -(-columns // p.size) if p.size else 1) for p in groups.planes]
    if [p.shape for p in rows.scales] != expected:
        shapes = [p.shape for p in rows.scales]
        raise PlanError(f"codes [{n}, {columns}] with planes {shapes}, expected {expected}")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        s, m = scales_and_minima(groups, rows)
        q = code_values(dtype, rows.codes, is_centred=m is None)
        if columns % groups.size:  # the last group is cut short
            s = np.repeat(s, groups.size, axis=1)[:, :columns]
            m = None if m is None else np.repeat(m, groups.size, axis=1)[:, :columns]
        else:
            q = q.reshape(n, -1, groups.size)
            s, m = s[:, :, None], None if m is None else m[:, :, None]
        return _combined(dtype, groups.scales, q, s, m).reshape(n, columns)


def code_values(dtype: DType, codes: NDArray[np.generic], *, is_centred: bool) -> Floats:
    """The q of core.groups, less its zero where it is centred."""
    if dtype in (DType.E4M3, DType.E2M1):
        numbers: Floats = (E4M3_VALUES if dtype is DType.E4M3 else E2M1_VALUES)[codes]
        return numbers
    values: Floats = codes.astype(np.float32)
    if is_centred and dtype in ZERO:
        values -= np.float32(ZERO[dtype])
    return values


def scales_and_minima(groups: Groups, rows: Planes) -> tuple[Floats, Floats | None]:
    """s and m of each group, [n, ceil(K / size)] float32; m is None without a minimum."""
    if groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER):
        f, g = E4M3_VALUES[rows.scales[0]], rows.scales[1].astype(np.float32)
        return (f * g if groups.scales is Scales.E4M3_TIMES else f / g), None
    planes = [p.astype(np.float32) for p in rows.scales]
    match groups.scales:
        case Scales.F16 | Scales.F32:
            return planes[0], None
        case Scales.F16_MIN | Scales.F32_MIN:
            return planes[0], planes[1]
        case Scales.TWO_LEVEL:
            d, i = planes
            return _outer(groups, d, i) * i, None
        case _:
            d, e, i, j = planes
            return _outer(groups, d, i) * i, -(_outer(groups, e, i) * j)


def _outer(groups: Groups, outer: Floats, inner: Floats) -> Floats:
    """The scale of the outer group that each inner one lies in."""
    return np.repeat(outer, groups.outer // groups.size, axis=1)[:, : inner.shape[1]]


def _combined(dtype: DType, scales: Scales, q: Floats, s: Floats, m: Floats | None) -> Floats:
    """q s, or q s + m rounded once."""
    if m is None:
        return q * s
    if _CODE_BITS[dtype] + _SCALE_BITS[scales] <= 24:  # q s is a float32, so the sum alone rounds
        return q * s + m
    return _rounded_sum(q.astype(np.float64) * s, m.astype(np.float64))


def _rounded_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> Floats:
    """a + b rounded to float32 once. By way of float64 alone it would be rounded twice, and a tie
    of the second rounding may hide what the first one lost: so the first one rounds to odd.
    """
    total = a + b
    back = total - a
    lost = (a - (total - back)) + (b - back)  # exactly a + b - total
    is_even = (total.view(np.int64) & 1) == 0
    nudged = np.nextafter(total, np.copysign(np.inf, lost))
    is_inexact = (lost != 0) & np.isfinite(lost)
    return np.where(is_inexact & is_even, nudged, total).astype(np.float32)
