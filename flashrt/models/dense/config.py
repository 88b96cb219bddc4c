"""The configuration of dense decoders, read from config.json.

IS: one table of what sets the model types apart, and the fields, their fall-backs and every check
on them, all problems in one error; defaults are those of transformers. IS NOT: shapes of tensors
(weights), rotary positions (models.rope).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.messages import shown
from flashrt.models.fields import NEUTRAL, Fields, Neutral, is_tied
from flashrt.models.rope import Rotation, rotation

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a model type has of its own."""

    kv_heads: int | None = None  # where the config says nothing; None: as many as query heads
    head_dim: int | None = None  # where the config says nothing; None: hidden / query heads
    theta: float = 10000.0
    is_tied: bool = False  # where the config says nothing
    is_normed: bool = False  # queries and keys have a norm
    biases: str = "by field"  # "qkv": always these; "none"; "by field": attention_bias, o_proj too
    window: str = "none"  # "always": sliding_window; "by field": use_sliding_window
    skips_rope: bool = False  # layers without rotary positions, by no_rope_layers


_KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(),
    "mistral": _Kind(kv_heads=8, biases="none", window="always"),
    "qwen2": _Kind(kv_heads=32, biases="qkv", window="by field"),
    "qwen3": _Kind(kv_heads=32, head_dim=128, is_normed=True, window="by field"),
    "smollm3": _Kind(kv_heads=4, theta=2e6, is_tied=True, window="by field", skips_rope=True),
}
MODEL_TYPES = tuple(_KINDS)
_NEUTRAL: Neutral = NEUTRAL | {
    "attn_output_gate": (False, None),
    "rope_interleaved": (False, None),
}


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    model_type: str
    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    turned: tuple[bool, ...]  # of each layer, whether it has rotary positions
    rotation: Rotation
    is_normed: bool  # queries and keys have a norm
    has_qkv_bias: bool
    has_output_bias: bool  # of o_proj
    eps: float
    is_tied: bool  # the head is the embedding table

    @property
    def n_layers(self) -> int:
        """Layers, all of attention and MLP."""
        return len(self.turned)


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model: all of them."""
    return config


def parse_config(
    config: Mapping[str, object], lacks_head: bool | None = None, max_positions: int = 0
) -> DenseConfig:
    """Read a config.json object of one of MODEL_TYPES.

    `lacks_head` says whether the checkpoint lacks lm_head.weight (see `fields.is_tied`);
    `max_positions` how many positions there will be, as far as that is known. Raises
    CheckpointError listing every problem.
    """
    model_type = str(config["model_type"])
    fields, kind = Fields(config), _KINDS[model_type]
    hidden, query_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = _head_dim(fields, kind, hidden, query_heads)
    turned = _turned(fields, kind)
    has_bias = kind.biases == "by field" and fields.is_set("attention_bias", default=False)
    parsed = DenseConfig(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden=hidden,
        intermediate=fields.size("intermediate_size"),
        query_heads=query_heads,
        kv_heads=_kv_heads(fields, kind, query_heads),
        head_dim=head_dim,
        turned=turned,
        rotation=rotation(fields, (), head_dim, max_positions, theta=kind.theta),
        is_normed=kind.is_normed,
        has_qkv_bias=has_bias or kind.biases == "qkv",
        has_output_bias=has_bias,
        eps=fields.number("rms_norm_eps", default=1e-6, most=1.0),
        is_tied=is_tied(fields, [config], lacks_head, kind.is_tied),
    )
    fields.refuse_uneven_heads(parsed.query_heads, parsed.kv_heads)
    if config.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    _check_window(fields, kind, turned, max_positions)
    own: Neutral = {"attention_bias": (False, None)} if kind.biases == "none" else {}
    fields.refuse_but(_NEUTRAL | own)
    fields.raise_problems()
    return parsed


def _head_dim(fields: Fields, kind: _Kind, hidden: int, query_heads: int) -> int:
    if fields.fields.get("head_dim") is not None or kind.head_dim is not None:
        return fields.size("head_dim", kind.head_dim)
    if hidden % query_heads:
        fields.problems.append(
            f"hidden_size {hidden} is no multiple of num_attention_heads {query_heads}, and "
            "head_dim is missing; add it"
        )
    return max(1, hidden // query_heads)


def _kv_heads(fields: Fields, kind: _Kind, query_heads: int) -> int:
    """Null means as many as query heads, and so does silence in some model types."""
    name = "num_key_value_heads"
    if fields.fields.get(name, kind.kv_heads) is None:
        return query_heads
    return fields.size(name, kind.kv_heads)


def _turned(fields: Fields, kind: _Kind) -> tuple[bool, ...]:
    """`no_rope_layers`, in which 1 means that a layer has rotary positions; else all layers but
    every `no_rope_layer_interval`-th.
    """
    n_layers = fields.size("num_hidden_layers")
    if not kind.skips_rope:
        return (True,) * n_layers
    listed = fields.fields.get("no_rope_layers")
    if listed is None:
        interval = fields.size("no_rope_layer_interval", default=4)
        return tuple((i + 1) % interval != 0 for i in range(n_layers))
    if (
        not isinstance(listed, list)
        or len(listed) < n_layers
        or any(isinstance(x, bool) or x not in (0, 1) for x in listed)
    ):
        fields.problems.append(
            f"no_rope_layers is {shown(listed)}, expected a list of num_hidden_layers = "
            f"{n_layers} numbers, each 1 (rotary positions) or 0 (none)"
        )
        return (True,) * n_layers
    return tuple(x == 1 for x in listed[:n_layers])


def _check_window(
    fields: Fields, kind: _Kind, turned: tuple[bool, ...], max_positions: int
) -> None:
    """Refuses sliding windows that hide keys: those of which some layer has one, and which are
    shorter than the text may become.
    """
    given, n_layers = fields.fields, len(turned)
    has_field = kind.window == "by field" and fields.is_set("use_sliding_window", default=False)
    window: int | None = None
    default = None if kind.skips_rope else 4096
    if (has_field or kind.window == "always") and given.get("sliding_window", default) is not None:
        window = fields.size("sliding_window", default)
    layers = given.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and len(layers) == n_layers):
        fields.problems.append(
            f"layer_types is {shown(layers)}, expected a list of num_hidden_layers = {n_layers} "
            "names"
        )
        return
    if isinstance(layers, list):
        known = (_FULL,) if window is None else (_FULL, _SLIDING)
        fields.problems += [
            f"layer_types[{i}] is {shown(layer)}; only {' or '.join(known)} is supported"
            for i, layer in enumerate(layers)
            if layer not in known
        ]
        is_active = kind.window == "always" or _SLIDING in layers
    elif kind.skips_rope:
        is_active = not all(turned)
    else:
        is_active = kind.window == "always" or n_layers > _first_sliding(fields, window)
    if window is not None and is_active and max_positions > window:
        fields.problems.append(
            f"sliding_window is {window:,}, and a text of max_positions {max_positions:,} is "
            "longer: attention that forgets is not supported; load with max_positions up to "
            f"{window:,}, within which the window changes nothing"
        )


def _first_sliding(fields: Fields, window: int | None) -> int:
    """The first layer that has a window, of Qwen's layers without a list of kinds."""
    return 0 if window is None else fields.size("max_window_layers", default=28)
