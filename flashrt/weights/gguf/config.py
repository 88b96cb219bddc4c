"""The configuration of a GGUF file's model, in the words of config.json.

IS: metadata of the architectures that flashrt knows, as the mapping that models read (models'
configs check the values). IS NOT: the tokenizer's metadata (text), nor names of tensors (names).
A key of the architecture that is not known here is refused: it may change the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, listed, printable, shown
from flashrt.weights.gguf.file import GgufFile

ARCHITECTURE = "general.architecture"
QWEN35, QWEN35MOE = "qwen35", "qwen35moe"
LFM2, GRANITE, NEMOTRON = "lfm2", "granitehybrid", "nemotron_h"
# Architectures, and the model_type of each; the kinds differ in their tensors and orders.
MODEL_TYPES: Mapping[str, str] = {
    QWEN35: "qwen3_5_text", QWEN35MOE: "qwen3_5_moe_text", "llama": "llama", "qwen2": "qwen2",
    "qwen3": "qwen3", "smollm3": "smollm3", LFM2: "lfm2", GRANITE: "granitemoehybrid",
    NEMOTRON: "nemotron_h",
}  # fmt: skip
# Rows of q and k are stored as pairs that turn together; also where none turns.
PAIRED = ("llama", "smollm3", GRANITE, NEMOTRON)
_HYBRIDS = (LFM2, GRANITE, NEMOTRON)  # a list has 0 for layers of another kind
_MOST_LAYERS = 4096  # beyond it, a list of layers would only cost memory
# Keys that change nothing, whatever they hold.
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count")
# Other keys, and all values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
# The same of models with experts, besides: the softmax, and gates that sum to 1.
_NEUTRAL_OF_EXPERTS: Mapping[str, tuple[object, ...]] = {
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0, 1),
}
# What Llama 3.1 and 3.2 have; files hold only the divisors that follow from it.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NO_ROPE_INTERVAL = 4  # of smollm3; files do not say it, and other programs have it built in


def architecture_of(file: GgufFile) -> str:
    """The architecture. Raises CheckpointError for one that flashrt has no model of."""
    name = file.metadata.get(ARCHITECTURE)
    if isinstance(name, str) and name in MODEL_TYPES:
        return name
    if name == "clip":
        what = "is the vision part of a model; give the file of the language model beside it"
    else:
        known = listed(list(MODEL_TYPES))
        what = f"its architecture is {shown(name)}; flashrt reads GGUF files of {known}"
    raise CheckpointError(f"{file.path}: {what}")


def config_of(
    file: GgufFile, architecture: str, rope_factors: Sequence[float] | None = None
) -> dict[str, object]:
    """What config.json would say. `rope_factors`: of the tensor rope_freqs, where there is one.

    Raises CheckpointError with all that is missing, contradictory or not known.
    """
    keys = _Keys(file.metadata, architecture)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path}: has no token_embd.weight, a matrix; it is no whole language model: "
            "take another file"
        )
    config: dict[str, object] = {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.size("embedding_length"),
        "num_attention_heads": keys.size("attention.head_count"),
        "max_position_embeddings": keys.size("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    heads = keys.size("attention.head_count")
    config["num_key_value_heads"] = keys.size("attention.head_count_kv", heads)
    config["head_dim"] = _head_dim(keys, heads)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > embedding.shape[0]:
        keys.problems.append(
            f"tokenizer.ggml.tokens are {len(tokens):,}, token_embd.weight has "
            f"{embedding.shape[0]:,} rows"
        )
    config[_EPS.get(architecture, "rms_norm_eps")] = keys.number("attention.layer_norm_rms_epsilon")
    if architecture == NEMOTRON:  # whose converter writes settings of positions that it has not
        keys.pass_over("rope.dimension_count", "rope.freq_base")
        rope: dict[str, object] = {}
    else:
        rope = _rope(keys, config, rope_factors)
    config |= _OWN.get(architecture, _dense)(file, keys, config, rope)
    keys.finish(file)
    return config


def short_decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


class _Keys:
    """Reads of an architecture's keys that note what is wrong, and which were read."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        prefix = architecture + "."
        self.fields = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        self.prefix = prefix
        self.problems: list[str] = []
        self.neutral = dict(_NEUTRAL)  # what other keys may hold
        self._ignores_zeros = architecture in _HYBRIDS
        self._read: set[str] = set(_HARMLESS)
        self._meant: set[str] = set()  # of `_NEUTRAL`, those that this architecture has

    def get(self, name: str) -> object:
        """Any value, None if there is none."""
        self._read.add(name)
        return self.fields.get(name)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; of a list with an entry per layer, the one that all layers have, or
        in hybrids all that have one.
        """
        value = self.get(name)
        if isinstance(value, list):
            had = [v for v in value if v != 0] if self._ignores_zeros else value
            if had and all(v == had[0] for v in had):
                value = had[0]
        if value is None:
            value = default
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._wrong(name, value, "one positive integer")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if value is None:
            value = default
        if isinstance(value, int | float) and value is not True and 0 < value < math.inf:
            return short_decimal(float(value))
        self._wrong(name, value, "a positive number")
        return 1.0

    def factor(self, name: str) -> float:
        """A number that multiplies or divides; 1 where there is none, or 0 in its place."""
        self._meant.add(name)
        return 1.0 if self.get(name) in (None, 0) else self.number(name)

    def layers_with(self, name: str, n_layers: int) -> list[bool]:
        """Of each layer, whether its entry of a list is not 0; a number is that of all layers."""
        value = self.get(name)
        if not isinstance(value, list):
            return [value != 0] * n_layers
        if len(value) != n_layers:
            self._wrong(name, value, f"an entry for each of {n_layers} layers")
            return [False] * n_layers
        return [v != 0 for v in value]

    def pass_over(self, *names: str) -> None:
        """Keys that change nothing in this architecture."""
        self._read.update(names)

    def finish(self, file: GgufFile) -> None:
        """Raises CheckpointError if anything was wrong, or is not known."""
        for name, neutral in self.neutral.items():
            value = self.get(name)
            if name not in self._meant and value is not None and value not in neutral:
                self.problems.append(f"{self.prefix}{name} is {shown(value)}, not supported")
        self.problems += [
            f"{printable(self.prefix + name)} is {shown(value)}: flashrt does not know what it "
            "changes"
            for name, value in self.fields.items()
            if name not in self._read
        ]
        if self.problems:
            raise CheckpointError(
                f"{file.path}: its metadata do not fit; take another file of the model:"
                f"{indented(self.problems)}"
            )

    def _wrong(self, name: str, value: object, expected: str) -> None:
        given = "missing" if value is None else shown(value)
        self.problems.append(f"{self.prefix}{name} is {given}, expected {expected}")


def _head_dim(keys: _Keys, heads: int) -> int:
    hidden = keys.size("embedding_length")
    if keys.get("attention.key_length") is None and hidden % heads:
        keys.problems.append(
            f"{keys.prefix}embedding_length {hidden} is no multiple of attention.head_count {heads}"
        )
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    if (values := keys.size("attention.value_length", head_dim)) != head_dim:
        keys.problems.append(
            f"{keys.prefix}attention.value_length {values} is not key_length, {head_dim}"
        )
    return head_dim


def _rope(
    keys: _Keys, config: Mapping[str, object], factors: Sequence[float] | None
) -> dict[str, object]:
    """Settings of rotary positions; with rope_type where positions are scaled."""
    rope: dict[str, object] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    head_dim = config["head_dim"]
    assert isinstance(head_dim, int)
    if head_dim % 2:
        keys.problems.append(f"heads are of {head_dim} dims; rotation takes pairs of them")
    if (turning := keys.size("rope.dimension_count", head_dim)) != head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    kind = keys.get("rope.scaling.type")
    if kind is None and keys.get("rope.scaling.factor") not in (None, 0.0, 1.0):
        kind = "linear"  # as other programs take it
    for name in ("factor", "original_context_length"):  # which change nothing by themselves
        keys.get(f"rope.scaling.{name}")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        rope |= _yarn(keys)
    elif kind not in (None, "none"):
        keys.problems.append(f"{keys.prefix}rope.scaling.type is {shown(kind)}, not supported")
    if factors is not None:
        if "rope_type" in rope:
            keys.problems.append(f"rope_freqs.weight and {keys.prefix}rope.scaling are both there")
        rope |= _divided(keys, rope, turning, factors)
    return rope


def _yarn(keys: _Keys) -> dict[str, object]:
    at = "rope.scaling."
    rope: dict[str, object] = {
        "rope_type": "yarn",
        "factor": keys.number(at + "factor"),
        "original_max_position_embeddings": keys.size(at + "original_context_length"),
    }
    for name, field in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.get(at + name) is not None:
            rope[field] = keys.number(at + name)
    return rope


def _divided(
    keys: _Keys, rope: Mapping[str, object], dims: int, factors: Sequence[float]
) -> dict[str, object]:
    """Frequencies that rope_freqs divides, one by one: as llama3 where they are Llama's own."""
    if len(factors) != dims // 2 or not all(0 < f < math.inf for f in factors):
        keys.problems.append(f"rope_freqs.weight holds no {dims // 2} positive numbers")
        return {}
    if all(f == 1 for f in factors):
        return {}
    theta, factor = rope["rope_theta"], short_decimal(max(factors))
    assert isinstance(theta, float)
    low, high, trained = _LLAMA3.values()
    turns = trained * theta ** (-np.arange(0, dims, 2) / dims) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return {"rope_type": "factors", "factors": list(factors)}


def _dense(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    """What transformers' Llama, Qwen2, Qwen3 and SmolLM3 have besides."""
    architecture = keys.prefix[:-1]
    n_layers = _n_layers(keys)
    has_bias = {name for name in file.tensors if name.endswith(".bias")}
    own: dict[str, object] = {
        "num_hidden_layers": n_layers,
        "intermediate_size": keys.size("feed_forward_length"),
        "rope_theta": rope["rope_theta"],
        "mlp_bias": any(".ffn_" in name for name in has_bias),
    }
    if "partial_rotary_factor" in rope:
        own["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if architecture in PAIRED:
            keys.problems.append(
                f"{keys.prefix}rope.dimension_count is not the size of a head: which rows of q and "
                "k are pairs is not known"
            )
    if architecture != "qwen2":  # which has a bias on q, k and v, and no word for it
        own["attention_bias"] = any(".attn_" in name for name in has_bias)
    if "rope_type" in rope:
        own["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if keys.get("attention.sliding_window") not in (None, 0):
        own |= {
            "sliding_window": keys.size("attention.sliding_window"), "use_sliding_window": True,
            "max_window_layers": 0,
        }  # fmt: skip
        if architecture == "llama":
            own["model_type"] = "mistral"  # transformers' Llama has no window
    if architecture == "smollm3":
        step = _NO_ROPE_INTERVAL
        own |= {
            "no_rope_layer_interval": step,
            "no_rope_layers": [int((i + 1) % step != 0) for i in range(n_layers)],
        }
    return own


def _qwen35(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    del config
    own: dict[str, object] = {"intermediate_size": keys.size("feed_forward_length")}
    return own | _mixers_of_qwen35(file, keys, rope)


def _mixers_of_qwen35(file: GgufFile, keys: _Keys, rope: Mapping[str, object]) -> dict[str, object]:
    drafted = keys.get("nextn_predict_layers") or 0
    n_blocks = _n_layers(keys)
    if not isinstance(drafted, int) or not 0 <= drafted < n_blocks:
        keys.problems.append(f"{keys.prefix}nextn_predict_layers is {shown(drafted)}")
        drafted = 0
    inner, value_heads = keys.size("ssm.inner_size"), keys.size("ssm.time_step_rank")
    if inner % value_heads:
        keys.problems.append(
            f"{keys.prefix}ssm.inner_size {inner} is no multiple of time_step_rank {value_heads}"
        )
    if value_heads % (key_heads := keys.size("ssm.group_count")):
        keys.problems.append(
            f"{keys.prefix}ssm.time_step_rank {value_heads} is no multiple of group_count "
            f"{key_heads}"
        )
    sections = keys.get("rope.dimension_sections")
    mrope = (
        {"mrope_interleaved": True, "mrope_section": sections[:3]}
        if isinstance(sections, list)
        else {}
    )
    return {
        "num_hidden_layers": n_blocks - drafted,
        "layer_types": _layer_types(keys, n_blocks)[: n_blocks - drafted],
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_value_head_dim": max(1, inner // value_heads),
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "attn_output_gate": True,
        "rope_parameters": {
            "rope_type": "default", "partial_rotary_factor": 1.0, **mrope, **rope,
        },
        "mtp_num_hidden_layers": drafted,
        "mtp_use_dedicated_embeddings": any(
            name.endswith(".nextn.embed_tokens.weight") for name in file.tensors
        ),
    }  # fmt: skip


def _qwen35moe(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    """Experts in place of every MLP."""
    del config
    keys.pass_over("feed_forward_length")
    n, intermediate = keys.size("expert_count"), keys.size("expert_feed_forward_length")
    keys.neutral |= {"expert_count": (n,), **_NEUTRAL_OF_EXPERTS}
    return _mixers_of_qwen35(file, keys, rope) | {
        "num_experts": n,
        "num_experts_per_tok": keys.size("expert_used_count"),
        "moe_intermediate_size": intermediate,
        "shared_expert_intermediate_size": keys.size(
            "expert_shared_feed_forward_length", intermediate
        ),
    }


def _lfm2(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    """Layers without keys are convolutions; the MLP's size is the one that came of the config."""
    del config
    n_layers = _n_layers(keys)
    has_keys = keys.layers_with("attention.head_count_kv", n_layers)
    own: dict[str, object] = {
        "num_hidden_layers": n_layers,
        "layer_types": ["full_attention" if has else "conv" for has in has_keys],
        "intermediate_size": keys.size("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": keys.size("shortconv.l_cache"),
        "conv_bias": _has(file, "shortconv.in_proj.bias"),
    }
    return own | _rope_of_json(keys, rope)


def _granite(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    """Layers without keys are Mamba-2. `rope.scaling.finetuned` says whether heads turn at all.
    The halves of the MLP's first matrix are two tensors here: `shared_mlp_is_split`.
    """
    n_layers = _n_layers(keys)
    has_keys = keys.layers_with("attention.head_count_kv", n_layers)
    shared = "expert_shared_feed_forward_length"
    size = keys.size(shared if keys.get(shared) else "feed_forward_length")
    keys.pass_over("feed_forward_length")
    scale = _int(config, "head_dim") ** -0.5  # of a file without one, as other programs take it
    if keys.get("attention.scale") not in (None, 0):
        scale = keys.factor("attention.scale")
    own = {
        "num_hidden_layers": n_layers,
        "layer_types": ["attention" if has else "mamba" for has in has_keys],
        "num_local_experts": 0,
        "shared_intermediate_size": size,
        "shared_mlp_is_split": True,
        "attention_multiplier": scale,
        "embedding_multiplier": keys.factor("embedding_scale"),
        "residual_multiplier": keys.factor("residual_scale"),
        "logits_scaling": keys.factor("logit_scale"),
        "position_embedding_type": (
            "nope" if keys.get("rope.scaling.finetuned") is False else "rope"
        ),
        "attention_bias": _has(file, "attn_q.bias"),
        "mamba_conv_bias": _has(file, "ssm_conv1d.bias"),
        "mamba_proj_bias": _has(file, "ssm_in.bias"),
    }
    heads, inner = _ssm_heads(keys)
    hidden = _int(config, "hidden_size")
    if inner % hidden:
        keys.problems.append(
            f"{keys.prefix}ssm.inner_size {inner} is no multiple of embedding_length {hidden}"
        )
    own |= {
        "mamba_n_heads": heads,
        "mamba_d_head": max(1, inner // heads),
        "mamba_expand": max(1, inner // hidden),
        "mamba_n_groups": keys.size("ssm.group_count"),
        "mamba_d_state": keys.size("ssm.state_size"),
        "mamba_d_conv": keys.size("ssm.conv_kernel"),
    }
    return own | _rope_of_json(keys, rope)


def _nemotron(
    file: GgufFile, keys: _Keys, config: Mapping[str, object], rope: Mapping[str, object]
) -> dict[str, object]:
    """A layer with keys is attention, one with an MLP's size an MLP, others are Mamba-2."""
    del config, rope
    n_layers = _n_layers(keys)
    has_keys = keys.layers_with("attention.head_count_kv", n_layers)
    is_mlp = keys.layers_with("feed_forward_length", n_layers)
    if any(has and is_ for has, is_ in zip(has_keys, is_mlp, strict=True)):
        keys.problems.append(
            f"{keys.prefix}attention.head_count_kv and feed_forward_length: a layer has both"
        )
    heads, inner = _ssm_heads(keys)
    return {
        "num_hidden_layers": n_layers,
        "layers_block_type": [
            "attention" if has else "mlp" if is_ else "mamba"
            for has, is_ in zip(has_keys, is_mlp, strict=True)
        ],
        "intermediate_size": keys.size("feed_forward_length") if any(is_mlp) else 1,
        "mamba_num_heads": heads,
        "mamba_head_dim": max(1, inner // heads),
        "n_groups": keys.size("ssm.group_count"),
        "ssm_state_size": keys.size("ssm.state_size"),
        "conv_kernel": keys.size("ssm.conv_kernel"),
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
        "use_conv_bias": _has(file, "ssm_conv1d.bias"),
        "use_bias": _has(file, "ssm_in.bias"),
    }


def _ssm_heads(keys: _Keys) -> tuple[int, int]:
    """Heads of a Mamba-2 layer, and their columns together."""
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        keys.problems.append(
            f"{keys.prefix}ssm.inner_size {inner} is no multiple of time_step_rank {heads}"
        )
    return heads, inner


def _rope_of_json(keys: _Keys, rope: Mapping[str, object]) -> dict[str, object]:
    """Settings of rotary positions of a model whose heads turn whole, if at all."""
    if "partial_rotary_factor" in rope:
        keys.problems.append(
            f"{keys.prefix}rope.dimension_count is not the size of a head, not supported"
        )
    own: dict[str, object] = {"rope_theta": rope["rope_theta"]}
    if "rope_type" in rope:
        own["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return own


def _has(file: GgufFile, ending: str) -> bool:
    """Whether a block has a tensor of that name."""
    return any(name.startswith("blk.") and name.endswith(f".{ending}") for name in file.tensors)


def _int(config: Mapping[str, object], name: str) -> int:
    value = config[name]
    assert isinstance(value, int)  # as config_of made it
    return value


def _layer_types(keys: _Keys, n_blocks: int) -> list[str]:
    interval = keys.size("full_attention_interval", 4)
    recurrent = keys.get("attention.recurrent_layers")
    if recurrent is None:
        recurrent = [(i + 1) % interval != 0 for i in range(n_blocks)]
    if not isinstance(recurrent, list) or len(recurrent) < n_blocks:
        keys.problems.append(
            f"{keys.prefix}attention.recurrent_layers is {shown(recurrent)}, expected an entry for "
            f"each of {n_blocks} blocks"
        )
        recurrent = []
    return ["linear_attention" if is_linear else "full_attention" for is_linear in recurrent]


def _n_layers(keys: _Keys) -> int:
    n_layers = keys.size("block_count")
    if n_layers <= _MOST_LAYERS:
        return n_layers
    keys.problems.append(f"{keys.prefix}block_count is {n_layers:,}")
    return 1


_EPS = {LFM2: "norm_eps", NEMOTRON: "layer_norm_epsilon"}  # what config.json calls it, elsewhere
_OWN = {QWEN35: _qwen35, QWEN35MOE: _qwen35moe, LFM2: _lfm2, GRANITE: _granite, NEMOTRON: _nemotron}
