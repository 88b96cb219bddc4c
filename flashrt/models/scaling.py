"""How the numbers of a LeRobot policy are scaled: statistics as weights of their own.

IS: the rules and formulas of `stats.<feature>.mean` and `.std` of observations, and of
`stats.action.scale` and `.offset`. IS NOT: the files (weights.lerobot), or what a family scales.

Statistics become (x - mean) / std - shift for observations and a scale + offset for actions: of min
and max, mean = min, std = (max - min) / 2 and shift = 1, which gives the bits of 2 (x - min) /
(max - min) - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Region, Role
from flashrt.models.features import ACTION, ACTION_KIND
from flashrt.weights.computed import Formula, computed
from flashrt.weights.formats.stored import Tensor
from flashrt.weights.lerobot import Mode, Normalization, normalization_of
from flashrt.weights.rules import WeightRule, constant

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How observations and actions are normalised: the mode of each feature, and the tensors with
    their statistics, under names of their own.
    """

    modes: Mapping[str, Mode]
    inputs: Normalization
    outputs: Normalization

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By `in/feature.statistic` and `out/feature.statistic`, of the features that are used."""
        sides = (("in", self.inputs), ("out", self.outputs))
        return {
            f"{side}/{feature}.{name}": found.tensors[f"{feature}.{name}"]
            for side, found in sides
            for feature, mode in self.modes.items()
            if (feature == ACTION) == (side == "out")
            for name in mode.statistics or ()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The processor files, and those of their statistics."""
        sides = (self.inputs, self.outputs)
        statistics = (tensor.path for side in sides for tensor in side.tensors.values())
        return tuple(dict.fromkeys((*(side.file for side in sides), *statistics)))

    def rules(
        self, feature: str, shape: tuple[int, ...]
    ) -> tuple[list[WeightRule], dict[str, Formula]]:
        """Rules of a feature's two vectors, and the formulas that fill them. `shape`: of its
        statistics, as LeRobot stores them.
        """
        side, found = ("out", self.outputs) if feature == ACTION else ("in", self.inputs)
        mode, size, sources = self.modes[feature], shape[0], []
        for name in mode.statistics or ():
            given = found.tensors[f"{feature}.{name}"].shape
            # LeRobot takes a vector for an image, too.
            sources.append((f"{side}/{feature}.{name}", given if given == (size,) else shape))
        rules: list[WeightRule] = []
        formulas: dict[str, Formula] = {}
        for what, of in _OF[side]:
            name = f"stats.{feature}.{what}"
            if not sources:
                rules.append(constant(name, (float(what in ("std", "scale")),) * size))
                continue
            scale = Affine(mode, np.float32(found.eps))
            formulas[name] = Formula(
                (size,), tuple(sources),
                lambda a, b, of=of, scale=scale: of(scale, a.reshape(-1), b.reshape(-1)),
            )  # fmt: skip
            rules.append(computed(Region(name, (size,), DType.F32, Role.WEIGHT)))
        return rules, formulas


def scaling_in(root: Path, kinds: Mapping[str, str], others: Collection[str] = ()) -> Scaling:
    """By the processor files of a policy; `kinds`: of its inputs, by name. `others`: see
    weights.lerobot. Raises CheckpointError.
    """
    inputs = normalization_of(root, is_input=True, others=others)
    outputs = normalization_of(root, is_input=False)
    modes = {feature: inputs.mode(feature, kind) for feature, kind in kinds.items()}
    modes[ACTION] = outputs.mode(ACTION, ACTION_KIND)
    return Scaling(modes, inputs, outputs)


def shift_of(mode: Mode) -> float:
    """What is taken off a normalised observation."""
    return 0.0 if mode in (Mode.MEAN_STD, Mode.IDENTITY) else 1.0


@dataclass(frozen=True, slots=True)
class Affine:
    """A mode with its epsilon: how two statistics, a mean and a deviation or two limits, scale."""

    mode: Mode
    eps: np.float32

    @property
    def is_centred(self) -> bool:
        """Whether the first is a mean; else the two are limits, which become -1 and 1."""
        return self.mode is Mode.MEAN_STD

    def half(self, low: Values, high: Values) -> Values:
        """Half of the distance of two limits; equal ones are an epsilon apart."""
        apart = np.where(high == low, self.eps, high - low)
        return apart.astype(np.float32) / np.float32(2)


def _mean(scale: Affine, a: Values, b: Values) -> Values:
    del scale, b
    return a


def _divisor(scale: Affine, a: Values, b: Values) -> Values:
    return b + scale.eps if scale.is_centred else scale.half(a, b)


def _scale(scale: Affine, a: Values, b: Values) -> Values:
    return b if scale.is_centred else scale.half(a, b)


def _offset(scale: Affine, a: Values, b: Values) -> Values:
    return a if scale.is_centred else a + scale.half(a, b)


_OF: Mapping[str, tuple[tuple[str, Callable[[Affine, Values, Values], Values]], ...]] = {
    "in": (("mean", _mean), ("std", _divisor)),
    "out": (("scale", _scale), ("offset", _offset)),
}
