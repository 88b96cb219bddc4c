"""Our own quantiser: rows of float32 to codes of 8 or 4 bits with a float16 scale per 32 columns.

IS: for each group the scale of least squared error that a small search finds, and what the codes
lose. IS NOT: calibration: no activation is looked at, though `importance` of columns can be given.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.flags import thread_count
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType

Floats = NDArray[np.float32]
_BLOCK = 1 << 15  # values at once: they and the copies of a search stay in a cache
_MOST_SCALE = 65280.0  # the largest float16 of 8 significant bits
_LEAST_INVERTED = 1e-37  # the inverse of less is infinite, or nearly


@dataclass(frozen=True, slots=True)
class Target:
    """What rows are quantised to. `factors` are those that the search tries."""

    dtype: DType
    groups: Groups
    bits: int
    factors: tuple[float, ...]

    @property
    def half(self) -> int:
        """Half the range: codes stand for -half ... half - 1."""
        return 1 << (self.bits - 1)


# The choice of groups, by relative error of normally distributed weights and bits per weight with
# its scales: int4 in groups of 32: 8.2 % at 4.5 bits; of 64: 9.0 % at 4.25; of 128: 9.7 % at 4.125;
# int8 in groups of 32: 0.5 % at 8.5. Four bits are where quality is lost first, so groups are of
# 32.
TARGETS = {
    "int8": Target(DType.I8, Groups(32, Scales.F16), 8, (1.0, 0.9922, 1.0079, 1.016)),
    "int4": Target(DType.U4, Groups(32, Scales.F16), 4, (0.75, 0.85, 0.93, 1.0, 1.07)),
}


@dataclass(slots=True)
class Loss:
    """What quantising lost, summed over the rows of a tensor."""

    squared_error: float = 0.0
    squared: float = 0.0

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the mean square; 0 of zeros."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0


def quantise(
    rows: Floats, target: Target, loss: Loss | None = None, importance: Floats | None = None
) -> Planes:
    """Rows [n, K] as planes; what they lose is added to `loss`. The result does not depend on which
    rows come together. `importance` [K], not negative: weighs the squared errors of columns.

    Raises ValueError where a value is infinite or NaN.
    """
    if not np.isfinite(rows).all():
        raise ValueError("a value is infinite or NaN")
    n, columns = rows.shape
    size = target.groups.size
    count = math.ceil(columns / size)
    codes = np.empty((n, columns), np.int8 if target.dtype is DType.I8 else np.uint8)
    scales = np.empty((n, count), np.float16)
    zero = np.float32(0 if target.dtype is DType.I8 else target.half)
    weights = None if importance is None else _groups(importance[None], count, size)
    step = max(1, _BLOCK // max(1, columns))

    def quantise_block(at: int) -> tuple[float, float]:
        part = rows[at : at + step]
        x = _groups(part, count, size)
        s = _searched(x, target, None if weights is None else np.tile(weights, len(part)))
        q = _rounded(x, s, target.half, np.empty_like(x))
        lost = float(np.square(x - q * s, dtype=np.float64).sum())
        scales[at : at + step] = s.reshape(len(part), count)
        q += zero
        codes[at : at + step] = q.T.reshape(len(part), -1)[:, :columns]
        return lost, float(np.square(x, dtype=np.float64).sum())

    if n <= step:
        sums = [quantise_block(0)]
    else:
        with ThreadPoolExecutor(thread_count()) as pool:  # numpy leaves the others free to run
            sums = list(pool.map(quantise_block, range(0, n, step)))
    if loss is not None:
        loss.squared_error += sum(lost for lost, _ in sums)
        loss.squared += sum(squared for _, squared in sums)
    return Planes(codes, (scales,))


def _groups(rows: Floats, count: int, size: int) -> Floats:
    """[size, rows * count]: a group is a column, so that sums over groups run along memory."""
    missing = count * size - rows.shape[1]
    whole = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
    return np.ascontiguousarray(whole.reshape(-1, size).T)


# The search: the value of largest magnitude gets the code -8 (or -128), of which there is one more
# than of positive codes, so a scale may be negative; then some factors are tried. For each, codes
# are rounded, the scale that fits them best is computed and rounded, codes are rounded again.
# Scales have 8 significant bits and fit float16 and bfloat16 alike: libraries that hold them as
# either see the same numbers, and the codes have been rounded with them.
def _searched(x: Floats, target: Target, weights: Floats | None) -> Floats:
    """The scale of each group."""
    highest, lowest = x.max(axis=0), x.min(axis=0)
    first = np.where(highest > -lowest, highest, lowest) * np.float32(-1 / target.half)
    weighted = x if weights is None else x * weights
    q, room = np.empty_like(x), np.empty_like(x)
    best: Floats = np.zeros_like(first)
    least = np.full_like(first, np.inf)
    for factor in target.factors:
        _rounded(x, first * np.float32(factor), target.half, q)
        above = np.multiply(weighted, q, out=room).sum(axis=0)
        below = _weighed(np.square(q, out=q), weights).sum(axis=0)
        s = _scale(np.divide(above, below, out=np.zeros_like(above), where=below > 0))
        _rounded(x, s, target.half, q)
        np.multiply(q, s, out=q)
        np.subtract(x, q, out=q)
        lost = _weighed(np.square(q, out=q), weights).sum(axis=0)
        is_better = lost < least
        np.copyto(best, s, where=is_better)
        np.copyto(least, lost, where=is_better)
    return best


def _weighed(x: Floats, weights: Floats | None) -> Floats:
    return x if weights is None else np.multiply(x, weights, out=x)


def _rounded(x: Floats, s: Floats, half: int, out: Floats) -> Floats:
    """Codes of values, from -half on; 0 where the scale is 0."""
    inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=np.abs(s) > _LEAST_INVERTED)
    np.multiply(x, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, -half, half - 1, out=out)
    return out


def _scale(s: Floats) -> Floats:
    """Rounded to what float16 and bfloat16 both hold."""
    short = s.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.clip(short, -_MOST_SCALE, _MOST_SCALE, out=short)
    return short.astype(np.float16).astype(np.float32)
