"""The configuration of Qwen3.5's vision tower, read from config.json and preprocessor_config.json.

IS: fields, their fall-backs and every check on them, all problems in one error. IS NOT: the
preparation of images (patches), or shapes of tensors (tower).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.models.fields import Fields
from flashrt.models.qwen35.config import MOE_MODEL_TYPES, text_fields

VISION_MODEL_TYPES = ("qwen3_5_vision", "qwen3_5")  # the second in files of the first days
# Of transformers' processor, where preprocessor_config.json is silent.
_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_MOST_PIXELS = 1 << 32


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes and constants of a tower, and what an image is made into for it."""

    depth: int
    hidden: int
    intermediate: int
    heads: int
    channels: int  # of an image: 3
    patch: int  # pixels of a side of a patch
    frames: int  # images of a patch: one image is repeated
    merge: int  # patches of a side of what becomes a token
    out: int  # columns of an embedding
    side: int  # of the square of learned positions
    theta: float
    is_tanh: bool  # whether the MLPs' GELU is the approximation
    image_token: int  # which a chat template writes once for an image
    least_pixels: int
    most_pixels: int
    mean: tuple[float, ...]  # of pixels from 0 to 1, by channel
    std: tuple[float, ...]

    @property
    def columns(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def inv_freq(self) -> tuple[float, ...]:
        """Radians per row or column of patches: a quarter of a head turns by each."""
        dims = self.hidden // self.heads // 2
        return tuple(self.theta ** (-j / dims) for j in range(0, dims, 2))


def vision_of(config: Mapping[str, object], processor: Mapping[str, object]) -> VisionConfig:
    """Read vision_config of a config.json object, and a preprocessor_config.json object.

    Raises CheckpointError: where there is no tower, or listing every problem.
    """
    given, model_type = config.get("vision_config"), config.get("model_type")
    if model_type in MOE_MODEL_TYPES and isinstance(given, Mapping):
        raise CheckpointError(
            "config.json: images for a model with experts are not supported yet; load it without "
            "images=True"
        )
    if model_type != "qwen3_5" or not isinstance(given, Mapping):
        raise CheckpointError(
            "config.json has no vision_config: the model sees no images; load it without "
            "images=True"
        )
    fields = Fields(given, "vision_config.")
    prepared = Fields(processor, "preprocessor_config.json: ")
    outer = Fields({"image_token_id": 248056, **config})
    text = Fields(text_fields(config))
    defaults = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
    sizes = {name: fields.size(name, default) for name, default in defaults.items()}
    positions = fields.size("num_position_embeddings")
    least, most = _pixels(prepared)
    parsed = VisionConfig(
        depth=fields.size("depth"),
        hidden=fields.size("hidden_size"),
        intermediate=fields.size("intermediate_size"),
        heads=fields.size("num_heads"),
        channels=sizes["in_channels"],
        patch=fields.size("patch_size", 16),
        frames=sizes["temporal_patch_size"],
        merge=sizes["spatial_merge_size"],
        out=fields.size("out_hidden_size"),
        side=math.isqrt(positions),
        theta=_theta(fields),
        is_tanh=given.get("hidden_act", "gelu_pytorch_tanh") == "gelu_pytorch_tanh",
        image_token=outer.size("image_token_id"),
        least_pixels=least,
        most_pixels=most,
        mean=_by_channel(prepared, "image_mean", sizes["in_channels"]),
        std=_by_channel(prepared, "image_std", sizes["in_channels"]),
    )
    _check(fields, prepared, parsed, text.size("hidden_size"), positions)
    fields.problems += [*prepared.problems, *outer.problems]
    fields.raise_problems()
    return parsed


def _pixels(prepared: Fields) -> tuple[int, int]:
    """Least and most pixels of a resized image: `size`, else min_pixels and max_pixels."""
    size = prepared.fields.get("size")
    found = dict(size) if isinstance(size, Mapping) else dict(_PIXELS)
    for name, of in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if prepared.fields.get(name) is not None:
            found[of] = prepared.fields[name]
    least, most = found.get("shortest_edge"), found.get("longest_edge")
    is_fine = (
        isinstance(least, int) and isinstance(most, int) and 1 <= least <= most <= _MOST_PIXELS
    )
    if not is_fine:
        prepared.problems.append(
            f"{prepared.place}size is {shown(size)}, expected shortest_edge and longest_edge, "
            "counts of pixels"
        )
        return 1, 1
    assert isinstance(least, int)
    assert isinstance(most, int)
    return least, most


def _by_channel(prepared: Fields, name: str, channels: int) -> tuple[float, ...]:
    value = prepared.fields.get(name)
    if isinstance(value, Sequence) and len(value) == channels:
        numbers = [v for v in value if isinstance(v, int | float) and 0 < v < 1e3]
        if len(numbers) == channels:
            return tuple(map(float, numbers))
    prepared.problems.append(
        f"{prepared.place}{name} is {shown(value)}, expected {channels} positive numbers"
    )
    return (1.0,) * channels


def _theta(fields: Fields) -> float:
    given = fields.fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or given.get("rope_type", "axial") != "axial":
        fields.problems.append(
            f"{fields.place}rope_parameters is {shown(given)}; only rope_type 'axial' is supported"
        )
        return 1.0
    rope = Fields(given, f"{fields.place}rope_parameters.")
    theta = rope.number("rope_theta", default=10000.0, least=1.0, most=1e12)
    fields.problems += rope.problems
    return theta


def _check(
    fields: Fields, prepared: Fields, parsed: VisionConfig, text_hidden: int, positions: int
) -> None:
    """Relations between fields, and settings that would change the mathematics."""
    place, problems = fields.place, fields.problems
    if parsed.hidden % (4 * parsed.heads):
        problems.append(
            f"{place}hidden_size {parsed.hidden} is no multiple of four times num_heads "
            f"{parsed.heads}"
        )
    if parsed.side**2 != positions:
        problems.append(f"{place}num_position_embeddings {positions} is no square")
    if parsed.out != text_hidden:
        problems.append(
            f"{place}out_hidden_size is {parsed.out}, the text model's hidden_size {text_hidden}"
        )
    fields.refuse_but(
        {
            "model_type": (*VISION_MODEL_TYPES, None),
            "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
            "deepstack_visual_indexes": ([], (), None),
        }
    )
    for name, wanted in (
        ("patch_size", parsed.patch),
        ("temporal_patch_size", parsed.frames),
        ("merge_size", parsed.merge),
    ):
        if prepared.fields.get(name, wanted) != wanted:
            prepared.problems.append(
                f"{prepared.place}{name} is {shown(prepared.fields[name])}, in vision_config it is "
                f"{wanted}"
            )
