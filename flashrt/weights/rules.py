"""Weight rules: which checkpoint tensors fill which weight region, and how.

IS: pure data that a model declares; the engine plans its regions, and the loader checks the rules
against a checkpoint and runs them. IS NOT: reading.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError
from flashrt.core.groups import Groups
from flashrt.core.region import DType, Layout, Region, Role


class Transform(enum.StrEnum):
    """What happens to the values of a source between file and region, always in float32."""

    NONE = "none"
    ONE_PLUS = "one_plus"  # w -> 1 + w: the norms of models that store them zero-centred
    TAPS_FIRST = "taps_first"  # depthwise convolution [C, 1, K] -> [K, C]


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Rows that are stored group by group, `parts` rows of each kind in turn, and wanted kind by
    kind: all groups' rows of the first, then those of the second, ...
    """

    groups: int
    parts: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Of all groups."""
        return self.groups * sum(self.parts)

    def order(self) -> NDArray[np.intp]:
        """The place where each row that is wanted is stored."""
        places = np.arange(self.n_rows).reshape(self.groups, -1)
        stops = np.cumsum(self.parts)
        kinds = np.split(places, stops[:-1], axis=1)
        return np.concatenate([kind.reshape(-1) for kind in kinds])


@dataclass(frozen=True, slots=True)
class Squares:
    """Rows that are stored as the places of a raster of side x side, line by line, and wanted by
    squares of group x group places; squares line by line, and places in each. `lags`: a place but
    the first of a line or column gets the row of the one before it.
    """

    side: int
    group: int
    lags: bool = False

    @property
    def n_rows(self) -> int:
        """Of the raster."""
        return self.side**2

    def order(self) -> NDArray[np.intp]:
        """The place where each row that is wanted is stored."""
        across = self.side // self.group
        line = np.maximum(np.arange(self.side) - self.lags, 0)
        raster = line[:, None] * self.side + line
        places = raster.reshape(across, self.group, across, self.group)
        return places.transpose(0, 2, 1, 3).reshape(-1)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor by its canonical name, with the shape that it must have; `rows`: how its
    rows lie where that is not how they are wanted.
    """

    name: str
    shape: tuple[int, ...]
    rows: Interleaved | Squares | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One weight region and what fills it: sources, concatenated along axis 0, or constant values.

    Matrices (`Layout.MATRIX`) keep what is stored, values or codes in groups; all else is float32.
    Raises PlanError if the sources cannot fill the region.
    """

    region: Region
    sources: tuple[Source, ...] = ()
    transform: Transform = Transform.NONE
    constant: tuple[float, ...] = ()
    keeps_stored: bool = False  # a matrix of `linear`: the region is as its sources are stored
    is_uniform: bool = False  # and they are all stored alike: the region is one, never parts
    factor: float = 1.0  # of a float32 region from sources: multiplied after the transform

    def __post_init__(self) -> None:
        region = self.region
        if region.role is not Role.WEIGHT:
            raise PlanError(f"weight rule: region {region.name!r} has role {region.role}")
        if bool(self.sources) == bool(self.constant):
            raise PlanError(
                f"weight rule {region.name!r}: needs sources or a constant, and not both"
            )
        has_all_rows = all(s.rows is None or s.rows.n_rows == s.shape[0] for s in self.sources)
        if self.is_matrix:
            columns = {s.shape[1:] for s in self.sources}
            fits = (
                columns == {region.shape[1:]}
                and sum(s.shape[0] for s in self.sources) == region.shape[0]
                and has_all_rows
            )
            if not fits or self.transform is not Transform.NONE or self.factor != 1.0:
                raise PlanError(
                    f"weight rule {region.name!r}: {self.sources} cannot fill {region.dtype} "
                    f"{region.shape}"
                )
        elif region.dtype is not DType.F32 or self.size != region.size or not has_all_rows:
            raise PlanError(
                f"weight rule {region.name!r}: {self.size} values for {region.dtype} {region.shape}"
            )

    @property
    def is_matrix(self) -> bool:
        """Whether the region is a weight matrix: loaded in chunks of rows."""
        return self.region.layout is Layout.MATRIX

    @property
    def size(self) -> int:
        """Number of elements that sources or constant provide."""
        return sum(s.size for s in self.sources) + len(self.constant)


# How a checkpoint stores the matrix of a source: elements, and groups where they are codes.
Stored = tuple[DType, Groups | None]


def in_bfloat16(source: Source) -> Stored:
    """How a source is taken to be stored where there is no checkpoint to ask."""
    del source
    return DType.BF16, None


def part_name(name: str, index: int) -> str:
    """The region of a part of a matrix whose rows are stored in several formats."""
    return f"{name}.{index}"


def as_stored(
    rules: Sequence[WeightRule], stored: Callable[[Source], Stored]
) -> tuple[WeightRule, ...]:
    """The rules with the regions of `linear`'s matrices as their sources are stored.

    Where sources that are stacked are stored in several formats, each run of one format becomes a
    region of its own (`part_name`); models find parts by that name. Matrices of `dense` stay. Those
    of `experts` are as most of their sources are stored; the loader refuses the others.
    """
    return tuple(part for rule in rules for part in _parts(rule, stored))


def _parts(rule: WeightRule, stored: Callable[[Source], Stored]) -> list[WeightRule]:
    if not rule.keeps_stored:
        return [rule]
    if rule.is_uniform:
        ((dtype, groups), _), *_ = Counter(map(stored, rule.sources)).most_common(1)
        return [replace(rule, region=replace(rule.region, dtype=dtype, groups=groups))]
    runs = [(f, list(run)) for f, run in itertools.groupby(rule.sources, key=stored)]
    parts = []
    for i, ((dtype, groups), sources) in enumerate(runs):
        name = rule.region.name if len(runs) == 1 else part_name(rule.region.name, i)
        shape = (sum(s.shape[0] for s in sources), rule.region.shape[1])
        region = replace(rule.region, name=name, shape=shape, dtype=dtype, groups=groups)
        parts.append(replace(rule, region=region, sources=tuple(sources)))
    return parts


def matrix(name: str, columns: int, *sources: tuple[str, int]) -> WeightRule:
    """Rule for a matrix of `linear` [sum of rows, columns] from (tensor name, rows) pairs, stacked;
    bfloat16 until `as_stored` says how a checkpoint has it.
    """
    parts = tuple(Source(source, (rows, columns)) for source, rows in sources)
    shape = (sum(rows for _, rows in sources), columns)
    region = Region(name, shape, DType.BF16, Role.WEIGHT, Layout.MATRIX)
    return WeightRule(region, parts, keeps_stored=True)


def experts(name: str, columns: int, sources: Sequence[tuple[str, int]]) -> WeightRule:
    """Rule for the matrices of all experts [sum of rows, columns], stacked; all in one format."""
    return replace(matrix(name, columns, *sources), is_uniform=True)


def dense(name: str, source: str, rows: int, columns: int) -> WeightRule:
    """Rule for a float32 matrix [rows, columns], for the op of that name; others are widened."""
    region = Region(name, (rows, columns), DType.F32, Role.WEIGHT, Layout.MATRIX)
    return WeightRule(region, (Source(source, (rows, columns)),))


def vector(name: str, source: str, size: int, transform: Transform = Transform.NONE) -> WeightRule:
    """Rule for a float32 vector."""
    return WeightRule(
        Region(name, (size,), DType.F32, Role.WEIGHT), (Source(source, (size,)),), transform
    )


def depthwise_conv(name: str, source: str, channels: int, taps: int) -> WeightRule:
    """Rule for float32 convolution taps [taps, channels], oldest first, from [channels, 1, K]."""
    region = Region(name, (taps, channels), DType.F32, Role.WEIGHT)
    return WeightRule(region, (Source(source, (channels, 1, taps)),), Transform.TAPS_FIRST)


def constant(name: str, values: tuple[float, ...]) -> WeightRule:
    """Rule for a float32 vector that is computed, not stored."""
    return WeightRule(Region(name, (len(values),), DType.F32, Role.WEIGHT), constant=values)
