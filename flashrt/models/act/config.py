"""The configuration of an ACT policy, read from LeRobot's config.json.

IS: fields and every check on them, all problems in one error; the parts of an observation. IS NOT:
statistics (weights.lerobot), nor shapes of tensors (weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, listed, shown
from flashrt.models.actions import Part, parts_of
from flashrt.models.features import (
    ENVIRONMENT,
    STATE,
    Camera,
    action_dim_of,
    inputs_of,
    size_of,
)

TYPE = "act"
# Blocks of each of the four layers, of two convolutions each.
BACKBONES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)  # channels of those layers
REDUCTION = 32  # pixels of an image, either way, to one of the last layer
_MOST = {
    "chunk_size": 1 << 12, "n_action_steps": 1 << 12, "dim_model": 1 << 13, "n_heads": 1 << 8,
    "dim_feedforward": 1 << 15, "n_encoder_layers": 64, "n_decoder_layers": 64,
    "latent_dim": 1 << 13,
}  # fmt: skip
_USUAL: dict[str, object] = {  # LeRobot's, where a config leaves a field out
    "chunk_size": 100, "n_action_steps": 100, "dim_model": 512, "n_heads": 8,
    "dim_feedforward": 3200, "n_encoder_layers": 4, "n_decoder_layers": 1, "latent_dim": 32,
    "vision_backbone": "resnet18", "feedforward_activation": "relu", "n_obs_steps": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ActConfig:
    """Sizes of a policy, named as in config.json."""

    state_dim: int  # 0: the policy does not see it
    environment_dim: int  # 0 likewise
    cameras: tuple[Camera, ...]
    action_dim: int
    chunk_size: int
    n_action_steps: int
    dim_model: int
    n_heads: int
    dim_feedforward: int
    n_encoder_layers: int
    n_decoder_layers: int
    latent_dim: int
    pre_norm: bool
    backbone: str
    ensemble: float | None  # temporal_ensemble_coeff: of the weights of chunks, the oldest first

    @property
    def num_inference_steps(self) -> int:
        """A chunk is made at once."""
        return 1

    @property
    def n_vectors(self) -> int:
        """Tokens of the encoder that are no pixels: the latent, the state, the environment's."""
        return 1 + bool(self.state_dim) + bool(self.environment_dim)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of an observation, in order."""
        shapes: list[tuple[str, tuple[int, ...]]] = [
            (name, (size,))
            for name, size in ((STATE, self.state_dim), (ENVIRONMENT, self.environment_dim))
            if size
        ]
        shapes += [(c.name, (c.height, c.width, 3)) for c in self.cameras]
        return parts_of(shapes)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        return self.parts[-1].stop


def parse_config(config: Mapping[str, object]) -> ActConfig:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    fields = _USUAL | dict(config)
    sizes = {name: size_of(fields, name, most, problems) for name, most in _MOST.items()}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    if sizes["dim_model"] % sizes["n_heads"]:
        problems.append(
            f"dim_model {sizes['dim_model']} is no multiple of n_heads {sizes['n_heads']}"
        )
    coefficient, ensemble = fields.get("temporal_ensemble_coeff"), None
    if isinstance(coefficient, int | float) and not isinstance(coefficient, bool):
        ensemble = float(coefficient) if -1 <= coefficient <= 1 else None
    if coefficient is not None and ensemble is None:
        problems.append(
            f"temporal_ensemble_coeff is {shown(coefficient)}, expected null or a number in [-1, 1]"
        )
    if coefficient is not None and sizes["n_action_steps"] != 1:
        problems.append(
            f"n_action_steps is {sizes['n_action_steps']}: with temporal_ensemble_coeff it is 1, "
            "as every tick makes a chunk"
        )
    for name, supported in (
        ("feedforward_activation", ("relu",)),
        ("n_obs_steps", (1,)),
        ("replace_final_stride_with_dilation", (False, 0, None)),  # nor has torchvision's resnet18
        ("use_peft", (False, None)),
    ):
        if fields.get(name) not in supported:
            problems.append(f"{name} is {shown(fields[name])}; supported: {shown(supported[0])}")
    backbone, pre_norm = fields["vision_backbone"], fields.get("pre_norm", False)
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        problems.append(f"vision_backbone is {shown(backbone)}; supported: {listed(BACKBONES)}")
    if not isinstance(pre_norm, bool):
        problems.append(f"pre_norm is {shown(pre_norm)}, expected true or false")
    state, environment, cameras = inputs_of(fields.get("input_features"), problems)
    if not cameras and not environment:
        problems.append(f"input_features need an image, or {ENVIRONMENT}")
    if cameras and sizes["dim_model"] % 4:
        problems.append(f"dim_model {sizes['dim_model']} is no multiple of 4, as images need")
    action = action_dim_of(fields.get("output_features"), problems)
    if problems:
        raise CheckpointError(f"config.json does not fit:{indented(problems)}")
    return ActConfig(
        state, environment, cameras, action, **sizes, pre_norm=bool(pre_norm),
        backbone=str(backbone),
        ensemble=ensemble,
    )  # fmt: skip
