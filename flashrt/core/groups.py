"""Groups: how the codes of a quantised matrix become values.

IS: nouns that planner, loader, backends and kernels share: planes of scales beside the codes of a
matrix [N, K], and `Planes`, rows of one in host memory. IS NOT: file formats (weights/formats).

A row of K codes is cut into groups of `size`; with q a code (of a float code: its value),

    value = round((q - zero) s)     without a minimum; zero is half the range of an unsigned code
    value = round(q s + m)          with one

in float32, rounded once, where the scale s and the minimum m of a group come from the planes as
`Scales` says. Sources are admitted only where that is what their own library computes to the bit.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError


class Scales(enum.StrEnum):
    """Planes beside the codes, and s and m of a group from them, all in float32."""

    F16 = "float16"  # s
    F16_MIN = "float16_min"  # s, m
    F32 = "float32"  # s
    F32_MIN = "float32_min"  # s, m; a zero point z is m = -z s
    TWO_LEVEL = "two_level"  # d float16 per `outer`, i int8: s = d i
    TWO_LEVEL_MIN = "two_level_min"  # d, e float16 per `outer`, i, j uint8: s = d i, m = -(e j)
    E4M3_TIMES = "float8_times"  # f float8 e4m3, g float32 per row: s = f g
    E4M3_OVER = "float8_over"  # f float8 e4m3, g float32 per row: s = f / g

    @property
    def code(self) -> int:
        """Number in kernel argument blocks (the `<param>_scales` fields)."""
        return list(Scales).index(self)

    @property
    def has_min(self) -> bool:
        """Whether groups have a minimum."""
        return self in (Scales.F16_MIN, Scales.F32_MIN, Scales.TWO_LEVEL_MIN)


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of scales: an element per row and `size` columns; size 0: one per row."""

    dtype: np.dtype[np.generic]
    size: int


_F16, _F32 = np.dtype(np.float16), np.dtype(np.float32)
_I8, _U8 = np.dtype(np.int8), np.dtype(np.uint8)
SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Groups:
    """`size` columns share a scale; with two levels, `outer` columns share the outer one."""

    size: int
    scales: Scales
    outer: int = 0

    def __post_init__(self) -> None:
        is_two_level = self.scales in (Scales.TWO_LEVEL, Scales.TWO_LEVEL_MIN)
        fits = (
            self.outer in SIZES and self.outer % self.size == 0 if is_two_level else not self.outer
        )
        if self.size not in SIZES or not fits:
            raise PlanError(
                f"groups of {self.size} columns, outer ones of {self.outer}, scales "
                f"{self.scales}; sizes are {SIZES}, and 0 outside two levels"
            )

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes, in the order of `Scales`."""
        inner, outer = self.size, self.outer
        match self.scales:
            case Scales.F16:
                return (Plane(_F16, inner),)
            case Scales.F16_MIN:
                return Plane(_F16, inner), Plane(_F16, inner)
            case Scales.F32:
                return (Plane(_F32, inner),)
            case Scales.F32_MIN:
                return Plane(_F32, inner), Plane(_F32, inner)
            case Scales.TWO_LEVEL:
                return Plane(_F16, outer), Plane(_I8, inner)
            case Scales.TWO_LEVEL_MIN:
                return Plane(_F16, outer), Plane(_F16, outer), Plane(_U8, inner), Plane(_U8, inner)
            case Scales.E4M3_TIMES | Scales.E4M3_OVER:
                return Plane(_U8, inner), Plane(_F32, 0)


@dataclass(frozen=True, slots=True)
class Planes:
    """Rows of a quantised matrix: codes [n, K], a byte each (int8 for `int8`, else uint8: a number
    or the bits of a small float), and the planes of its groups, [n, ceil(K / size)] or [n, 1].
    """

    codes: NDArray[np.generic]
    scales: tuple[NDArray[np.generic], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.codes.nbytes + sum(plane.nbytes for plane in self.scales)

    def rows(self, start: int, stop: int) -> Planes:
        """Rows [start, stop), without a copy."""
        return Planes(self.codes[start:stop], tuple(p[start:stop] for p in self.scales))
