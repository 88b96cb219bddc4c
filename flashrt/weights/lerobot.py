"""The processor files of a LeRobot policy: how observations and actions are normalised.

IS: policy_preprocessor.json and policy_postprocessor.json beside config.json, read as data: which
mode each feature has, and where its statistics lie. IS NOT: a pipeline: steps that would change
the numbers in another way are refused, and no class that a file names is ever imported.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable, shown
from flashrt.weights.checkpoint import read_header, read_json
from flashrt.weights.formats.stored import Tensor

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
# Steps that move or name things and change no number.
_IDLE = ("rename_observations_processor", "to_batch_processor", "device_processor")
_NORMALIZER, _UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
_USUAL_EPS = 1e-8


class Mode(enum.StrEnum):
    """LeRobot's NormalizationMode."""

    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"
    MIN_MAX = "MIN_MAX"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"

    @property
    def statistics(self) -> tuple[str, str] | None:
        """Names of the two statistics that it takes."""
        return _STATISTICS[self]


_STATISTICS: dict[Mode, tuple[str, str] | None] = {
    Mode.IDENTITY: None,
    Mode.MEAN_STD: ("mean", "std"),
    Mode.MIN_MAX: ("min", "max"),
    Mode.QUANTILES: ("q01", "q99"),
    Mode.QUANTILE10: ("q10", "q90"),
}


@dataclass(frozen=True, slots=True)
class Normalization:
    """Of one direction: modes by type of feature, statistics as tensors, `feature.statistic`."""

    modes: Mapping[str, Mode]
    tensors: Mapping[str, Tensor]
    eps: float
    keys: tuple[str, ...] | None  # the only observations that it is applied to; None: all
    file: Path

    def mode(self, feature: str, kind: str) -> Mode:
        """How a feature of a type (VISUAL, STATE, ENV, ACTION) is normalised: as it is where its
        statistics are not there at all, as LeRobot does. Raises CheckpointError where some are.
        """
        mode = self.modes.get(kind, Mode.IDENTITY)
        has_any = any(name.rpartition(".")[0] == feature for name in self.tensors)
        is_left_out = kind != "ACTION" and self.keys is not None and feature not in self.keys
        if mode.statistics is None or not has_any or is_left_out:
            return Mode.IDENTITY
        lost = [n for n in mode.statistics if f"{feature}.{n}" not in self.tensors]
        if lost:
            raise CheckpointError(
                f"{self.file}: {mode} of {printable(feature)} needs {listed(lost)}, which "
                "its statistics lack"
            )
        return mode


def normalization_of(root: Path, *, is_input: bool, others: Collection[str] = ()) -> Normalization:
    """How observations (or actions) are normalised, by a policy's files; no tensor is read yet.
    `others`: steps that whoever asks reads himself: see `step_of`.

    Raises CheckpointError for a file that is missing or damaged, a step that is not known, or a
    mode that is not.
    """
    path = root / (PREPROCESSOR if is_input else POSTPROCESSOR)
    wanted = _NORMALIZER if is_input else _UNNORMALIZER
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; policies from before LeRobot 0.4 have their statistics among "
            "the weights: migrate them with LeRobot's migrate_policy_normalization"
        )
    found: Normalization | None = None
    for step in _steps(path):
        name, config = step.get("registry_name"), step.get("config", {})
        if name == wanted and found is None and isinstance(config, dict):
            found = _normalization(path, config, step.get("state_file"))
        elif (name not in _IDLE and name not in others) or _renames(config):
            raise CheckpointError(
                f"{path}: step {shown(name or step.get('class'))} is not supported; known are "
                f"{wanted}, once, and {listed(_IDLE)} without a rename_map"
            )
    if found is None:
        raise CheckpointError(f"{path}: has no step {wanted}; fetch it again")
    return found


def step_of(root: Path, name: str) -> Mapping[str, object] | None:
    """What a step of the preprocessor is configured with; None where there is no such step.

    Raises CheckpointError for a file that is damaged.
    """
    path = root / PREPROCESSOR
    for step in _steps(path):
        if step.get("registry_name") == name:
            config = step.get("config", {})
            if not isinstance(config, dict):
                raise CheckpointError(f"{path}: step {shown(name)} is {shown(config)}")
            return config
    return None


def _steps(path: Path) -> list[dict[str, Any]]:
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{path}: has no list of steps; fetch it again")
    return steps


def _renames(config: object) -> bool:
    return isinstance(config, dict) and bool(config.get("rename_map"))


def _normalization(path: Path, config: Mapping[str, object], file: object) -> Normalization:
    eps, keys = config.get("eps", _USUAL_EPS), config.get("normalize_observation_keys")
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise CheckpointError(f"{path}: eps is {shown(eps)}, expected a number in [0, 1)")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise CheckpointError(
            f"{path}: normalize_observation_keys is {shown(keys)}, expected a list of names"
        )
    tensors: Mapping[str, Tensor] = {}
    if file is not None:
        if not isinstance(file, str) or Path(file).name != file or not file:
            raise CheckpointError(f"{path}: state_file is {shown(file)}, expected a file's name")
        tensors = read_header(path.with_name(file))
    only = None if keys is None else tuple(keys)
    return Normalization(_modes(path, config.get("norm_map")), tensors, float(eps), only, path)


def _modes(path: Path, given: object) -> dict[str, Mode]:
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: norm_map is {shown(given)}, expected modes by feature type")
    modes = {}
    for kind, mode in given.items():
        if not isinstance(mode, str) or mode not in Mode.__members__:
            raise CheckpointError(
                f"{path}: {shown(kind)} is normalised by {shown(mode)}; known are "
                f"{listed(list(Mode))}"
            )
        modes[kind] = Mode[mode]
    return modes
