"""The configuration of Qwen3.5 and Qwen3-Next text models, read from config.json.

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
from flashrt.models.experts import Experts, Routing
from flashrt.models.fields import NEUTRAL, SILU, Fields, Neutral, is_tied
from flashrt.models.rope import Rotation, plain_rounded_once, rotation

# Multimodal models, and their text models: the fields of these lie under text_config.
_NESTED: Mapping[object, str] = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
NEXT_MODEL_TYPE = "qwen3_next"
MOE_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", NEXT_MODEL_TYPE)
MODEL_TYPES = ("qwen3_5_text", "qwen3_5", *MOE_MODEL_TYPES)

# Fields that say what this family does anyway, and those of NEUTRAL.
_NEUTRAL: Neutral = NEUTRAL | {
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "output_gate_type": (*SILU, None),
    "use_sliding_window": (False, None),
}
# Settings of Qwen3-Next, whose other values transformers does not apply to Qwen3.5.
_QWEN35_MOE: Neutral = {
    "norm_topk_prob": (True, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}


_DENSE: tuple[None, frozenset[int]] = None, frozenset()  # no experts, and no layer with them


class LayerKind(enum.StrEnum):
    """The mixer of a layer, as config.json spells it."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I, of layers with an MLP; 1 where there is none
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
    experts: Experts | None = None  # of the layers in `sparse`, and of the draft head
    shared_intermediate: int = 0  # of the expert that every token goes to
    sparse: frozenset[int] = frozenset()  # layers with experts in place of an MLP
    is_interleaved: bool = False  # q, k, v, z and b, a are stored by key head: Qwen3-Next

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
    head_dim, is_next = fields.size("head_dim"), text.get("model_type") == NEXT_MODEL_TYPE
    has_experts = config.get("model_type") in MOE_MODEL_TYPES
    layers = _layers(fields)
    experts, sparse = _experts(fields, is_next, len(layers)) if has_experts else _DENSE
    parsed = Qwen35Config(
        vocab_size=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        intermediate=fields.size("intermediate_size") if len(sparse) < len(layers) else 1,
        layers=layers,
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
        experts=experts,
        shared_intermediate=fields.size("shared_expert_intermediate_size", 512) if experts else 0,
        sparse=sparse,
        is_interleaved=is_next,
    )
    _check(fields, parsed)
    neutral = {k: v for k, v in _NEUTRAL.items() if k != "num_experts" or not has_experts}
    fields.refuse_but(neutral | (_QWEN35_MOE if has_experts and not is_next else {}))
    if experts is not None:
        experts.check(fields, parsed.hidden, len(sparse), "moe_intermediate_size")
    if has_draft_head:
        _check_draft_head(fields)
    fields.raise_problems()
    return parsed


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model. Raises CheckpointError where there are none."""
    text_model_type = _NESTED.get(config.get("model_type"))
    if text_model_type is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping) or not text:
        raise CheckpointError(
            "config.json: text_config is missing or not an object; fetch config.json again"
        )
    if text.get("model_type", text_model_type) not in (text_model_type, config["model_type"]):
        raise CheckpointError(
            f"config.json: text_config.model_type is {shown(text['model_type'])}; only "
            f"{text_model_type} is supported"
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


def _experts(fields: Fields, is_next: bool, n_layers: int) -> tuple[Experts | None, frozenset[int]]:
    """Experts, and the layers that have them; fall-backs are those of transformers."""
    if is_next and fields.fields.get("num_experts") == 0:
        return _DENSE
    n, picked = (512, 10) if is_next else (256, 8)
    is_normed = not is_next or fields.is_set("norm_topk_prob", default=True)
    experts = Experts(
        fields.size("num_experts", n),
        fields.size("moe_intermediate_size", 512),
        Routing(fields.size("num_experts_per_tok", picked), is_normed=is_normed),
    )
    step = fields.size("decoder_sparse_step", 1) if is_next else 1
    dense = fields.fields.get("mlp_only_layers") if is_next else None
    if dense is not None and not (isinstance(dense, list) and all(type(i) is int for i in dense)):
        fields.problems.append(f"mlp_only_layers is {shown(dense)}, expected numbers of layers")
    chosen = dense if isinstance(dense, list) else []
    return experts, frozenset(i for i in range(n_layers) if i not in chosen and (i + 1) % step == 0)


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


def _check_draft_head(fields: Fields) -> None:
    names = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
    name = next((n for n in names if n in fields.fields), names[0])
    layers = fields.fields.get(name)
    way_out = "load without the draft head: draft=False, or --no-draft on the command line"
    if layers not in (None, 0, 1) or isinstance(layers, bool):
        fields.problems.append(
            f"{name} is {shown(layers)}; draft heads of one layer are supported: {way_out}"
        )
    if fields.fields.get("mtp_use_dedicated_embeddings") not in (None, False):
        fields.problems.append(
            f"mtp_use_dedicated_embeddings is set, which is not supported: {way_out}"
        )
