"""The configuration of a pi0.5 policy: LeRobot's config.json.

IS: fields and every check on them, all problems in one error; the parts of an observation. IS NOT:
sizes of layers, which only the tensors tell (sizes), or statistics (weights.lerobot).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, shown
from flashrt.models.actions import Part, parts_of
from flashrt.models.features import (
    ENVIRONMENT,
    STATE,
    Camera,
    action_dim_of,
    inputs_of,
    size_of,
)
from flashrt.models.prefix import TASK
from flashrt.models.vla.guidance import Guidance, guidance_of

TYPE = "pi05"
_MOST = {
    "chunk_size": 1 << 10, "n_action_steps": 1 << 10, "max_state_dim": 1 << 10,
    "max_action_dim": 1 << 10, "tokenizer_max_length": 1 << 12, "num_inference_steps": 1 << 8,
}  # fmt: skip
_USUAL: dict[str, object] = {  # LeRobot's, where a config leaves a field out
    "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32, "max_action_dim": 32,
    "tokenizer_max_length": 200, "num_inference_steps": 10, "min_period": 4e-3, "max_period": 4.0,
    "image_resolution": [224, 224], "n_obs_steps": 1,
}  # fmt: skip
_EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot adds them; nobody ever sees them


@dataclass(frozen=True, slots=True)
class Pi05Config:
    """Sizes of a policy, named as in config.json where they are there."""

    cameras: tuple[Camera, ...]
    state_dim: int
    action_dim: int
    chunk_size: int
    n_action_steps: int
    max_state_dim: int
    max_action_dim: int
    tokenizer_max_length: int
    num_inference_steps: int  # of Euler's method
    side: int  # of resized images, in pixels
    min_period: float
    max_period: float
    guidance: Guidance | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of an observation, in order. Of a task see engine.packed: its tokens are of the text that
        the state is written into.
        """
        shapes: list[tuple[str, tuple[int, ...]]] = [(STATE, (self.state_dim,))]
        shapes += [(c.name, (c.height, c.width, 3)) for c in self.cameras]
        shapes.append((TASK, (2 + self.tokenizer_max_length,)))
        return parts_of(shapes)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        return self.parts[-1].stop


def parse_config(config: Mapping[str, object]) -> Pi05Config:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    fields = _USUAL | dict(config)
    sizes = {name: size_of(fields, name, most, problems) for name, most in _MOST.items()}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    if fields["n_obs_steps"] != 1:
        problems.append(f"n_obs_steps is {shown(fields['n_obs_steps'])}; supported: 1")
    state, environment, cameras = inputs_of(_without_empty(fields.get("input_features")), problems)
    if environment or not state or not cameras:
        problems.append(f"input_features need {STATE} and an image, and know no {ENVIRONMENT}")
    action = action_dim_of(fields.get("output_features"), problems)
    for given, most in ((state, "max_state_dim"), (action, "max_action_dim")):
        if given > sizes[most]:
            problems.append(f"a vector of {given} exceeds {most} {sizes[most]}")
    least, longest = (_period(fields, name, problems) for name in ("min_period", "max_period"))
    side = _side(fields["image_resolution"], problems)
    guidance = guidance_of(fields.get("rtc_config"), problems)
    if problems:
        raise CheckpointError(f"config.json does not fit:{indented(problems)}")
    return Pi05Config(
        cameras, state, action, **sizes, side=side, min_period=least, max_period=longest,
        guidance=guidance,
    )  # fmt: skip


def _without_empty(given: object) -> object:
    if not isinstance(given, dict):
        return given
    return {n: about for n, about in given.items() if not n.startswith(_EMPTY_CAMERA)}


def _period(fields: Mapping[str, object], name: str, problems: list[str]) -> float:
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    problems.append(f"{name} is {shown(value)}, expected a positive number")
    return 1.0


def _side(given: object, problems: list[str]) -> int:
    if isinstance(given, list | tuple) and len(given) == 2 and given[0] == given[1]:
        side = given[0]
        if isinstance(side, int) and not isinstance(side, bool) and 0 < side <= 1 << 12:
            return side
    problems.append(f"image_resolution is {shown(given)}; supported: [n, n], as the tower has it")
    return 1
