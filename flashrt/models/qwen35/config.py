"""The configuration of Qwen3.5 dense text models, read from config.json.

IS: fields, their fall-backs and every check on them, all problems in one error. Each field that
transformers would read is applied here, known to change nothing, or refused. IS NOT: shapes of
tensors (weights).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.models.fields import NEUTRAL, SILU, Fields, Neutral, is_tied
from flashrt.models.rope import Rotation, plain_rounded_once, rotation

TEXT_MODEL_TYPE = "qwen3_5_text"
NESTED_MODEL_TYPE = "qwen3_5"  # multimodal: the text fields lie under text_config
MODEL_TYPES = (TEXT_MODEL_TYPE, NESTED_MODEL_TYPE)

# Fields that say what this family does anyway, and those of NEUTRAL.
_NEUTRAL: Neutral = NEUTRAL | {
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "output_gate_type": (*SILU, None),
    "use_sliding_window": (False, None),
}


class LayerKind(enum.StrEnum):
    """The mixer of a layer, as config.json spells it."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    rotation: Rotation
    key_heads: int  # Hk
    value_heads: int  # Hv
    key_dim: int  # dk
    value_dim: int  # dv
    conv_taps: int  # W + 1
    eps: float
    is_tied: bool  # the head is the embedding table
    sections: tuple[int, int] = (0, 0)  # pairs that turn by rows and by columns of an image

    @property
    def conv_channels(self) -> int:
        """C: query, key and value channels of a linear-attention layer."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def n_linear(self) -> int:
        """Layers with a recurrent state."""
        return self.layers.count(LayerKind.LINEAR)

    @property
    def n_full(self) -> int:
        """Layers with keys and values."""
        return self.layers.count(LayerKind.FULL)


def parse_config(
    config: Mapping[str, object],
    lacks_head: bool | None = None,
    has_draft_head: bool = False,
    max_positions: int = 0,
    *,
    has_images: bool = False,
) -> Qwen35Config:
    """Read a config.json object, flat or nested.

    `lacks_head` says whether the checkpoint lacks lm_head.weight (see `fields.is_tied`);
    `has_draft_head` whether its draft head will be run; `max_positions` how many there will be, as
    far as that is known; `has_images` whether rows may be those of images. Raises CheckpointError
    listing every problem.
    """
    text = text_fields(config)
    fields, outer = Fields(text), [] if text is config else [config]
    head_dim = fields.size("head_dim")
    parsed = Qwen35Config(
        vocab_size=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        intermediate=fields.size("intermediate_size"),
        layers=_layers(fields),
        query_heads=fields.size("num_attention_heads"),
        kv_heads=fields.size("num_key_value_heads"),
        head_dim=head_dim,
        # in float64: recorded results are of these
        rotation=rotation(
            fields, outer, head_dim, max_positions, turning=0.25, unscaled=plain_rounded_once
        ),
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        conv_taps=fields.size("linear_conv_kernel_dim"),
        eps=fields.number("rms_norm_eps", default=1e-6, most=1.0),
        is_tied=is_tied(fields, [text, *outer], lacks_head),
        sections=_sections(fields) if has_images else (0, 0),
    )
    _check(fields, parsed)
    if has_draft_head:
        _check_draft_head(fields)
    fields.raise_problems()
    return parsed


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model. Raises CheckpointError where there are none."""
    if config.get("model_type") != NESTED_MODEL_TYPE:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping) or not text:
        raise CheckpointError(
            "config.json: text_config is missing or not an object; fetch config.json again"
        )
    if text.get("model_type", TEXT_MODEL_TYPE) not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: text_config.model_type is {shown(text['model_type'])}; only "
            f"{TEXT_MODEL_TYPE} is supported"
        )
    return text


def _sections(fields: Fields) -> tuple[int, int]:
    """Pairs of a head that turn by rows and by columns of an image, interleaved with others."""
    given = fields.fields.get("rope_parameters") or fields.fields.get("rope_scaling") or {}
    rope = given if isinstance(given, Mapping) else {}
    sections = rope.get("mrope_section", [11, 11, 10])
    is_list = isinstance(sections, list) and len(sections) == 3
    if not is_list or any(not isinstance(n, int) or not 0 <= n <= 512 for n in sections):
        fields.problems.append(
            f"rope_parameters.mrope_section is {shown(sections)}, expected three counts of pairs"
        )
        return 0, 0
    if rope.get("mrope_interleaved", True) is not True:
        fields.problems.append(
            "rope_parameters.mrope_interleaved is not true, which images need; load without "
            "images=True"
        )
    return sections[1], sections[2]


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """`layer_types`, else full attention at every `full_attention_interval`-th layer."""
    n_layers = fields.size("num_hidden_layers")
    listed = fields.fields.get("layer_types")
    if listed is None:
        interval = fields.size("full_attention_interval", default=4)
        return tuple(
            LayerKind.LINEAR if (i + 1) % interval else LayerKind.FULL for i in range(n_layers)
        )
    if not isinstance(listed, list) or len(listed) != n_layers:
        fields.problems.append(
            f"layer_types is {shown(listed)}, expected a list of num_hidden_layers = {n_layers} "
            "names"
        )
        return (LayerKind.LINEAR,)
    known = [kind.value for kind in LayerKind]
    bad = [
        f"layer_types[{i}] is {shown(kind)}, expected {' or '.join(known)}"
        for i, kind in enumerate(listed)
        if kind not in known
    ]
    fields.problems += bad
    return (LayerKind.LINEAR,) if bad else tuple(LayerKind(kind) for kind in listed)


def _check(fields: Fields, parsed: Qwen35Config) -> None:
    """Relations between fields, and settings that would change the mathematics."""
    problems = fields.problems
    if parsed.value_heads % parsed.key_heads:
        problems.append(
            f"linear_num_value_heads {parsed.value_heads} is no multiple of "
            f"linear_num_key_heads {parsed.key_heads}"
        )
    fields.refuse_uneven_heads(parsed.query_heads, parsed.kv_heads)
    if fields.fields.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    fields.refuse_but(_NEUTRAL)


def _check_draft_head(fields: Fields) -> None:
    layers = fields.fields.get("mtp_num_hidden_layers")
    way_out = "load without the draft head: draft=False, or --no-draft on the command line"
    if layers not in (None, 0, 1) or isinstance(layers, bool):
        fields.problems.append(
            f"mtp_num_hidden_layers is {shown(layers)}; draft heads of one layer are supported: "
            f"{way_out}"
        )
    if fields.fields.get("mtp_use_dedicated_embeddings") not in (None, False):
        fields.problems.append(
            f"mtp_use_dedicated_embeddings is set, which is not supported: {way_out}"
        )
