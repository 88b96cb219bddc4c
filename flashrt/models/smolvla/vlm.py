"""The VLM of a SmolVLA policy: sizes that are not in the policy's config, and its tokenizer.

IS: the VLM's own config.json and tokenizer.json, found in the policy's folder, in `vlm` within it,
at `vlm_model_name` as a folder, or among what `flashrt pull` fetched under that name; and the sizes
of the released one. IS NOT: its weights, which are the policy's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, listed, shown
from flashrt.hub.cache import cache_folder, snapshot_of
from flashrt.hub.names import hub_name
from flashrt.models.features import size_of
from flashrt.models.smolvla.config import SmolVlaConfig
from flashrt.models.vla.reading import Reading
from flashrt.text.tokenizer import TOKENIZER_FILE
from flashrt.weights.checkpoint import Checkpoint, read_json

FOLDER = "vlm"  # in the policy's
CONFIG_FILE = "config.json"
PREFIX = "model.vlm_with_expert."
TEXT, TOWER = f"{PREFIX}vlm.model.text_model", f"{PREFIX}vlm.model.vision_model"
CONNECTOR = f"{PREFIX}vlm.model.connector.modality_projection.proj"
_MOST = {
    "num_attention_heads": 1 << 8, "num_key_value_heads": 1 << 8, "head_dim": 1 << 8,
    "image_size": 1 << 12, "patch_size": 1 << 8, "scale_factor": 16,
}  # fmt: skip
_SMOLVLM2_500M: Mapping[str, object] = {
    "scale_factor": 4,
    "text_config": {
        "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "num_attention_heads": 12, "image_size": 512, "patch_size": 16, "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
_KNOWN = {"HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _SMOLVLM2_500M}


@dataclass(frozen=True, slots=True)
class Vlm:
    """Sizes of a VLM, and of the expert, as the policy's tensors and the VLM's config have them."""

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    eps: float  # of the RMS norms
    expert_hidden: int
    expert_intermediate: int
    image_size: int
    patch: int
    scale: int  # of the pixel shuffle: a token is scale x scale patches
    vision_hidden: int
    vision_heads: int
    vision_layers: int
    vision_intermediate: int


def vlm_of(checkpoint: Checkpoint, c: SmolVlaConfig) -> Vlm:
    """The sizes. Raises CheckpointError naming what is missing or does not fit, and the way out."""
    where, config = _config_of(checkpoint.path, c)
    problems: list[str] = []
    text, vision = (_fields(config, name, problems) for name in ("text_config", "vision_config"))
    heads, kv_heads = (
        size_of(text, name, _MOST[name], problems)
        for name in ("num_attention_heads", "num_key_value_heads")
    )
    hidden = _shape(checkpoint, f"{TEXT}.embed_tokens.weight", 2, problems)[1]
    head_dim = hidden // heads
    if text.get("head_dim") is not None:
        head_dim = size_of(text, "head_dim", _MOST["head_dim"], problems)
    image_size, patch, vision_heads = (
        size_of(vision, name, _MOST[name], problems)
        for name in ("image_size", "patch_size", "num_attention_heads")
    )
    scale = size_of(config, "scale_factor", _MOST["scale_factor"], problems)
    wanted = {
        "rms_norm_eps of text_config": (text.get("rms_norm_eps", 1e-5), (1e-5, 1e-6)),
        "layer_norm_eps of vision_config": (vision.get("layer_norm_eps", 1e-6), (1e-6,)),
        "hidden_act of text_config": (text.get("hidden_act", "silu"), ("silu",)),
        "hidden_act of vision_config": (
            vision.get("hidden_act", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh",),
        ),
        "attention_bias of text_config": (text.get("attention_bias", False), (False,)),
        "mlp_bias of text_config": (text.get("mlp_bias", False), (False,)),
    }  # fmt: skip
    for what, (value, supported) in wanted.items():
        if value not in supported:
            problems.append(f"{what} is {shown(value)}; supported: {shown(supported[0])}")
    if image_size != c.side:
        problems.append(
            f"image_size is {image_size}, the policy resizes images to {c.side}: only its own size "
            "is supported"
        )
    if image_size % (patch * scale):
        problems.append(f"image_size {image_size} is no multiple of {patch} x {scale}")
    if heads % kv_heads or head_dim % 2:
        problems.append(f"{heads} heads of {head_dim} do not divide among {kv_heads} of keys")
    layer = f"{TEXT}.layers.0.mlp.gate_proj.weight"
    expert = f"{PREFIX}lm_expert.layers.0.mlp.gate_proj.weight"
    intermediate = _shape(checkpoint, layer, 2, problems)[0]
    expert_intermediate, expert_hidden = _shape(checkpoint, expert, 2, problems)
    fc1 = f"{TOWER}.encoder.layers.0.mlp.fc1.weight"
    vision_intermediate, vision_hidden = _shape(checkpoint, fc1, 2, problems)
    if not problems and vision_hidden % vision_heads:
        problems.append(f"{vision_heads} heads do not divide {vision_hidden} columns of the tower")
    if expert_hidden % 2:
        problems.append(f"the expert has {expert_hidden} columns; an even number is needed")
    if problems:
        raise CheckpointError(f"{where} does not fit:{indented(problems)}")
    layers = 0
    while f"{TOWER}.encoder.layers.{layers}.layer_norm1.weight" in checkpoint.tensors:
        layers += 1
    return Vlm(
        hidden, heads, kv_heads, head_dim, intermediate,
        vocab_size=_shape(checkpoint, f"{TEXT}.embed_tokens.weight", 2, problems)[0],
        eps=float(str(text.get("rms_norm_eps", 1e-5))), expert_hidden=expert_hidden,
        expert_intermediate=expert_intermediate, image_size=image_size, patch=patch, scale=scale,
        vision_hidden=vision_hidden, vision_heads=vision_heads, vision_layers=layers,
        vision_intermediate=vision_intermediate,
    )  # fmt: skip


def tokenizer_file(root: Path, c: SmolVlaConfig, reading: Reading) -> Path:
    """The VLM's tokenizer.json. Raises CheckpointError that names the way out."""
    own = dataclasses.replace(c, vlm_model_name=reading.name)
    for folder in (*_folders(root, c), *_folders(root, own)):
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    raise CheckpointError(
        f"{root}: no {TOKENIZER_FILE} of {shown(c.vlm_model_name)}; {_way_out(root, c)}"
    )


def _config_of(root: Path, c: SmolVlaConfig) -> tuple[str, Mapping[str, object]]:
    for folder in _folders(root, c):
        file = folder / CONFIG_FILE
        if folder != root and file.is_file():
            return str(file), read_json(file)
    known = _KNOWN.get(c.vlm_model_name)
    if known is None:
        raise CheckpointError(
            f"{root}: its config does not have the sizes of {shown(c.vlm_model_name)}, and no "
            f"{CONFIG_FILE} of that is here; {_way_out(root, c)}"
        )
    return c.vlm_model_name, known


def _folders(root: Path, c: SmolVlaConfig) -> Iterator[Path]:
    yield root
    yield root / FOLDER
    local = Path(c.vlm_model_name).expanduser()
    if local.is_dir():
        yield local
        return
    known = hub_name(c.vlm_model_name)
    snapshot = None if known is None else snapshot_of(known, cache_folder())
    if snapshot is not None:
        yield snapshot


def _way_out(root: Path, c: SmolVlaConfig) -> str:
    return (
        f"put config.json and {TOKENIZER_FILE} of that model into {root / FOLDER}, or fetch it: "
        f"flashrt pull {c.vlm_model_name}"
    )


def _fields(config: Mapping[str, object], name: str, problems: list[str]) -> Mapping[str, object]:
    given = config.get(name)
    if isinstance(given, dict):
        return given
    problems.append(f"{name} is {shown(given)}, expected fields")
    return {}


def _shape(checkpoint: Checkpoint, name: str, n: int, problems: list[str]) -> tuple[int, ...]:
    tensor = checkpoint.tensors.get(name)
    if tensor is not None and len(tensor.shape) == n:
        return tensor.shape
    found = "missing" if tensor is None else shown(list(tensor.shape))
    problems.append(f"tensor {listed([name])} is {found}")
    return (1,) * n
