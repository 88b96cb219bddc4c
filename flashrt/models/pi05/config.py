"""The configuration of a pi0.5 policy: LeRobot's config.json.

IS: fields and every check on them, all problems in one error; the parts of an observation. IS NOT:
sizes of layers, which only the tensors tell (sizes), or statistics (weights.lerobot).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, shown
from flashrt.models.actions import Part
from flashrt.models.features import Camera
from flashrt.models.vla.config import integers_of, observed_parts, period_of, shape_of, side_of
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
_PLAIN: dict[str, tuple[object, ...]] = {  # what is supported of a field
    "n_obs_steps": (1,),
    "use_peft": (False, None),
}


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
        """Of an observation, in order. A task's tokens are of the text that the state is written
        into.
        """
        return observed_parts(self.state_dim, self.cameras, self.tokenizer_max_length)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        return self.parts[-1].stop


def parse_config(config: Mapping[str, object]) -> Pi05Config:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    fields = _USUAL | dict(config)
    sizes = integers_of(fields, _MOST, problems)
    for name, supported in _PLAIN.items():
        if fields.get(name, supported[-1]) not in supported:
            problems.append(f"{name} is {shown(fields[name])}; supported: {shown(supported[0])}")
    shape = shape_of(fields, sizes, problems)
    least, longest = (period_of(fields, name, problems) for name in ("min_period", "max_period"))
    side = side_of(fields, "image_resolution", problems)
    guidance = guidance_of(fields.get("rtc_config"), problems)
    if problems:
        raise CheckpointError(f"config.json does not fit:{indented(problems)}")
    return Pi05Config(
        shape.cameras, shape.state_dim, shape.action_dim, **sizes, side=side,
        min_period=least, max_period=longest, guidance=guidance,
    )  # fmt: skip
