"""The configuration of a SmolVLA policy: LeRobot's config.json, and the sizes of its VLM.

IS: fields and every check on them, all problems in one error; the parts of an observation. IS NOT:
statistics (weights.lerobot), where the VLM's files are (vlm), nor shapes of tensors (weights).
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
from flashrt.models.prefix import TASK
from flashrt.models.vla.guidance import Guidance, guidance_of

TYPE = "smolvla"
CROSS, SELF = "cross_attn", "self_attn"
_MOST = {
    "chunk_size": 1 << 10, "n_action_steps": 1 << 10, "max_state_dim": 1 << 12,
    "max_action_dim": 1 << 10, "tokenizer_max_length": 1 << 10, "num_steps": 1 << 8,
    "num_vlm_layers": 128,
}  # fmt: skip
_USUAL: dict[str, object] = {  # LeRobot's, where a config leaves a field out
    "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32, "max_action_dim": 32,
    "tokenizer_max_length": 48, "num_steps": 10, "num_vlm_layers": 16, "num_expert_layers": -1,
    "self_attn_every_n_layers": 2, "attention_mode": CROSS, "min_period": 4e-3, "max_period": 4.0,
    "resize_imgs_with_padding": [512, 512], "n_obs_steps": 1,
    "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
}  # fmt: skip
_PLAIN: dict[str, tuple[object, ...]] = {  # what is supported of a field
    "n_obs_steps": (1,),
    "adapt_to_pi_aloha": (False, None),
    "use_delta_joint_actions_aloha": (False, None),
    "add_image_special_tokens": (False, None),
    "use_cache": (True, None),
    "use_peft": (False, None),
}
_EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot adds them; nobody ever sees them


@dataclass(frozen=True, slots=True)
class SmolVlaConfig:
    """Sizes of a policy, named as in config.json where they are there."""

    cameras: tuple[Camera, ...]
    state_dim: int
    action_dim: int
    chunk_size: int
    n_action_steps: int
    max_state_dim: int
    max_action_dim: int
    side: int  # of resized images, in pixels
    tokenizer_max_length: int
    num_steps: int  # of Euler's method
    num_vlm_layers: int
    num_expert_layers: int
    self_attn_every_n_layers: int
    attention_mode: str
    min_period: float
    max_period: float
    vlm_model_name: str
    lags: bool  # see vla.siglip: whether patches stand where LeRobot finds them in float32
    guidance: Guidance | None

    @property
    def num_inference_steps(self) -> int:
        """Euler steps of a chunk."""
        return self.num_steps

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of an observation, in order; see engine.packed for what a task is as numbers."""
        shapes: list[tuple[str, tuple[int, ...]]] = [(STATE, (self.state_dim,))]
        shapes += [(c.name, (c.height, c.width, 3)) for c in self.cameras]
        shapes.append((TASK, (2 + self.tokenizer_max_length,)))
        return parts_of(shapes)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        return self.parts[-1].stop

    def has_expert(self, layer: int) -> bool:
        """Whether the expert has a layer beside this one of the VLM."""
        return layer % (self.num_vlm_layers // self.num_expert_layers) == 0

    def expert_layer(self, layer: int) -> int:
        """Its number."""
        return layer // (self.num_vlm_layers // self.num_expert_layers)

    def sees_itself(self, layer: int) -> bool:
        """Whether the expert's rows see each other there, and what the VLM left; else they see what
        the expert makes of the VLM's keys and values alone.
        """
        every = self.self_attn_every_n_layers
        return self.attention_mode == SELF or (every > 0 and layer % every == 0)


def parse_config(config: Mapping[str, object]) -> SmolVlaConfig:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    fields = _USUAL | dict(config)
    sizes = {name: size_of(fields, name, most, problems) for name, most in _MOST.items()}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    for name, supported in _PLAIN.items():
        if fields.get(name, supported[-1]) not in supported:
            problems.append(f"{name} is {shown(fields[name])}; supported: {shown(supported[0])}")
    mode, vlm = fields["attention_mode"], fields["vlm_model_name"]
    if mode not in (CROSS, SELF):
        problems.append(f"attention_mode is {shown(mode)}; supported: {listed((CROSS, SELF))}")
    if not isinstance(vlm, str) or not vlm:
        problems.append(f"vlm_model_name is {shown(vlm)}, expected a name or a folder")
    state, environment, cameras = inputs_of(_without_empty(fields.get("input_features")), problems)
    if environment or not state or not cameras:
        problems.append(f"input_features need {STATE} and an image, and know no {ENVIRONMENT}")
    action = action_dim_of(fields.get("output_features"), problems)
    for given, most in ((state, "max_state_dim"), (action, "max_action_dim")):
        if given > sizes[most]:
            problems.append(f"a vector of {given} exceeds {most} {sizes[most]}")
    least, longest = (_number(fields, n, problems) for n in ("min_period", "max_period"))
    found = SmolVlaConfig(
        cameras, state, action, **sizes, side=_side(fields, problems),
        num_expert_layers=_expert_layers(fields, sizes["num_vlm_layers"], problems),
        self_attn_every_n_layers=_whole(fields, "self_attn_every_n_layers", problems),
        attention_mode=str(mode), min_period=least, max_period=longest, vlm_model_name=str(vlm),
        lags=not fields.get("load_vlm_weights", False),
        guidance=guidance_of(fields.get("rtc_config"), problems),
    )  # fmt: skip
    if not problems and (layer := _unfit(found)) is not None:
        problems.append(
            f"num_expert_layers {found.num_expert_layers} of num_vlm_layers {found.num_vlm_layers} "
            f"with self_attn_every_n_layers {found.self_attn_every_n_layers}: layer {layer} of the "
            "expert gets inputs of another size than its weights have; LeRobot cannot run it either"
        )
    if problems:
        raise CheckpointError(f"config.json does not fit:{indented(problems)}")
    return found


def _unfit(c: SmolVlaConfig) -> int | None:
    """The first layer whose kind the expert's own count of layers does not agree with."""
    for layer in range(c.num_vlm_layers):
        is_self = c.sees_itself(layer)
        if not c.has_expert(layer):
            if is_self:
                return layer
        elif c.attention_mode == CROSS and is_self != c.sees_itself(c.expert_layer(layer)):
            return layer
    return None


def _without_empty(given: object) -> object:
    if not isinstance(given, dict):
        return given
    return {n: about for n, about in given.items() if not n.startswith(_EMPTY_CAMERA)}


def _whole(fields: Mapping[str, object], name: str, problems: list[str]) -> int:
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 10:
        return value
    problems.append(f"{name} is {shown(value)}, expected an integer")
    return 1


def _number(fields: Mapping[str, object], name: str, problems: list[str]) -> float:
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    problems.append(f"{name} is {shown(value)}, expected a positive number")
    return 1.0


def _expert_layers(fields: Mapping[str, object], n_layers: int, problems: list[str]) -> int:
    given = _whole(fields, "num_expert_layers", problems)
    if given <= 0:
        return n_layers
    if n_layers % given:
        problems.append(f"num_vlm_layers {n_layers} is no multiple of num_expert_layers {given}")
        return n_layers
    return given


def _side(fields: Mapping[str, object], problems: list[str]) -> int:
    given = fields["resize_imgs_with_padding"]
    if (
        isinstance(given, list | tuple)
        and len(given) == 2
        and given[0] == given[1]
        and isinstance(given[0], int)
        and not isinstance(given[0], bool)
        and 0 < given[0] <= 1 << 12
    ):
        return given[0]
    problems.append(
        f"resize_imgs_with_padding is {shown(given)}; supported: [n, n], the VLM's image_size"
    )
    return 1
