"""Which GGUF tensor is which tensor of the original checkpoint, and what its order there was.

IS: canonical names, and per tensor: the order of rows or of runs of columns, the shape, and what
was done to the values (llama.cpp's converter rearranges some for its own kernels). IS NOT: reading.

`llama`, `smollm3`: rows of q and k are stored as pairs that turn together; the original has the
first halves of all pairs of a head, then the second ones.
`granitehybrid`, `nemotron_h`: the same, also where nothing turns; ssm_a is -exp(A_log), [heads, 1],
as is ssm_d; ssm_norm [groups, columns of one]; taps without their middle axis, as in `lfm2`.
`qwen35`, `qwen35moe`: value heads are stored by their place among those of one key head; the
original has all value heads of the first key head, then those of the next. Norms hold 1 + w, and
ssm_a -exp(A_log).
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable
from flashrt.weights.experts import apart
from flashrt.weights.formats.reordered import Order
from flashrt.weights.formats.stored import Tensor
from flashrt.weights.gguf.config import GRANITE, LFM2, NEMOTRON, PAIRED, QWEN35, QWEN35MOE
from flashrt.weights.gguf.file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
_IGNORED = (ROPE_FACTORS, "attn_rot_embd.weight")  # the first is in the config, the second unused
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(.+)")


class Values(enum.Enum):
    """What a file holds of the values of a tensor."""

    STORED = enum.auto()  # the values themselves
    ONE_PLUS = enum.auto()  # 1 + w: as regions want them
    LOG_OF_MINUS = enum.auto()  # x where log(-x) is wanted


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor, with the shape that a model expects; `rows` are places of its rows in the file,
    `columns` those of its runs of `run` columns.
    """

    tensor: Tensor
    rows: Order | None = None
    columns: Order | None = None
    run: int = 1
    values: Values = Values.STORED


_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_DENSE_STEMS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _both_kinds(stems: Mapping[str, str]) -> dict[str, str]:
    """Names of weights and of biases."""
    return {
        f"{stored}.{kind}": f"{name}.{kind}"
        for stored, name in stems.items()
        for kind in ("weight", "bias")
    }


_DENSE = _both_kinds(_DENSE_STEMS)
_QWEN35 = {
    **{k: v for k, v in _DENSE.items() if k.endswith(".weight") and not k.startswith("ffn_norm")},
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
}
_QWEN35MOE = {
    **{k: v for k, v in _QWEN35.items() if not k.startswith("ffn_")},
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    **{
        f"ffn_{k}_shexp.weight": f"mlp.shared_expert.{k}_proj.weight"
        for k in ("gate", "up", "down")
    },
    **{f"ffn_{k}_exps.weight": f"mlp.experts.{k}_proj" for k in ("gate", "up", "down", "gate_up")},
}
_CONV_STEMS = {f"shortconv.{part}": f"conv.{part}" for part in ("in_proj", "conv", "out_proj")}
_LFM2_STEMS = {
    "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm", "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2", **_CONV_STEMS,
}  # fmt: skip
_SSM = {
    "ssm_in.weight": "in_proj.weight", "ssm_in.bias": "in_proj.bias",
    "ssm_conv1d.weight": "conv1d.weight", "ssm_conv1d.bias": "conv1d.bias", "ssm_a": "A_log",
    "ssm_d": "D", "ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight",
    "ssm_out.weight": "out_proj.weight", "ssm_out.bias": "out_proj.bias",
}  # fmt: skip
_GRANITE = {
    **{k: v for k, v in _DENSE.items() if not k.startswith("ffn_")},
    **{stored: f"mamba.{name}" for stored, name in _SSM.items()},
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "shared_mlp.gate_linear.weight",
    "ffn_up.weight": "shared_mlp.up_linear.weight",
    "ffn_down.weight": "shared_mlp.output_linear.weight",
}
_NEMOTRON_STEMS = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip
_BLOCKS: Mapping[str, Mapping[str, str]] = {
    QWEN35: _QWEN35,
    QWEN35MOE: _QWEN35MOE,
    LFM2: _both_kinds(_LFM2_STEMS),
    GRANITE: _GRANITE,
    NEMOTRON: {
        "attn_norm.weight": "norm.weight",
        **{stored: f"mixer.{name}" for stored, name in _SSM.items()},
        **{stored: f"mixer.{name}" for stored, name in _both_kinds(_NEMOTRON_STEMS).items()},
    },
}
_DELTA_RULE = (QWEN35, QWEN35MOE)  # architectures with draft heads, too
# Names outside of blocks that an architecture has of its own.
_OWN_MODEL: Mapping[str, Mapping[str, str]] = {
    LFM2: {"token_embd_norm.weight": "model.embedding_norm.weight"},  # which is the last norm
    NEMOTRON: {
        "token_embd.weight": "model.embeddings.weight",
        "output_norm.weight": "model.norm_f.weight",
    },
}
_DRAFT = {
    "nextn.eh_proj.weight": "fc.weight",
    "nextn.enorm.weight": "pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "norm.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.shared_head_head.weight": "lm_head.weight",
}


def placements(
    file: GgufFile, architecture: str, config: Mapping[str, object]
) -> dict[str, Placement]:
    """All tensors by canonical names. Raises CheckpointError for names that are not known, and
    where a tensor does not have the rows or columns that its order is about.
    """
    placed, unknown = {}, []
    for stored, tensor in file.tensors.items():
        if stored.endswith(_IGNORED):
            continue
        name = _canonical(stored, architecture, config)
        if name is None:
            unknown.append(stored)
            continue
        for own, part in apart(name, tensor).items():
            placed[own] = _placement(file, own, part, architecture, config)
    if unknown:
        scales = any(name.endswith(("scale", "scale_2")) for name in unknown)
        more = "; scales beside a weight are not supported" if scales else ""
        raise CheckpointError(
            f"{file.path}: flashrt does not know what {listed(sorted(unknown))} are in a model of "
            f"{architecture}{more}; take another file of the model"
        )
    return placed


def _canonical(stored: str, architecture: str, config: Mapping[str, object]) -> str | None:
    if name := {**_MODEL, **_OWN_MODEL.get(architecture, {})}.get(stored):
        return name
    match = _BLOCK.fullmatch(stored)
    if match is None:
        return None
    layer, rest, n_layers = int(match[1]), match[2], _size(config, "num_hidden_layers")
    known = _BLOCKS.get(architecture, _DENSE)
    if layer < n_layers:
        return f"model.layers.{layer}.{known[rest]}" if rest in known else None
    draft = layer - n_layers
    if architecture not in _DELTA_RULE or draft >= _size(config, "mtp_num_hidden_layers"):
        return None
    if rest in _DRAFT:
        return f"mtp.{_DRAFT[rest]}" if draft == 0 else f"mtp.{draft}.{_DRAFT[rest]}"
    return f"mtp.layers.{draft}.{known[rest]}" if rest in known else None


def _placement(
    file: GgufFile, name: str, tensor: Tensor, architecture: str, config: Mapping[str, object]
) -> Placement:
    if architecture in _DELTA_RULE:
        return _of_qwen35(file, name, tensor, config)
    part = name.rpartition(".")[0].rpartition(".")[2]
    if architecture in PAIRED and part in ("q_proj", "k_proj"):
        return _of_pairs(file, part, tensor, config)
    if part in ("conv", "conv1d") and name.endswith(".weight"):
        return Placement(_with_middle_axis(tensor))
    if name.endswith((".mamba.norm.weight", ".mixer.norm.weight", ".D", ".A_log")):
        flat, is_decay = replace(tensor, shape=(math.prod(tensor.shape),)), name.endswith(".A_log")
        return Placement(flat, values=Values.LOG_OF_MINUS if is_decay else Values.STORED)
    return Placement(tensor)


def _with_middle_axis(tensor: Tensor) -> Tensor:
    """Taps [C, K] as [C, 1, K]."""
    if len(tensor.shape) != 2:
        return tensor
    channels, taps = tensor.shape
    return replace(tensor, shape=(channels, 1, taps))


def _of_pairs(file: GgufFile, part: str, tensor: Tensor, config: Mapping[str, object]) -> Placement:
    heads = _size(config, "num_attention_heads" if part == "q_proj" else "num_key_value_heads")
    head_dim = _size(config, "head_dim")
    _check(file, tensor, 0, heads * head_dim)
    pairs = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)
    return Placement(tensor, rows=_in_each(np.arange(heads), head_dim, pairs))


def _of_qwen35(
    file: GgufFile, name: str, tensor: Tensor, config: Mapping[str, object]
) -> Placement:
    part = name.rpartition(".linear_attn.")[2] if ".linear_attn." in name else ""
    if name.endswith("shared_expert_gate.weight") and len(tensor.shape) == 1:
        return Placement(replace(tensor, shape=(1, *tensor.shape)))
    if not part:
        is_norm = name.endswith(("norm.weight", "norm_embedding.weight", "norm_hidden.weight"))
        return Placement(tensor, values=Values.ONE_PLUS if is_norm else Values.STORED)
    if part == "conv1d.weight":
        tensor = _with_middle_axis(tensor)
    values = Values.LOG_OF_MINUS if part == "A_log" else Values.STORED
    key_heads, value_heads = (_size(config, f"linear_num_{k}_heads") for k in ("key", "value"))
    if value_heads == key_heads or part == "norm.weight":
        return Placement(tensor, values=values)
    width = _size(config, "linear_value_head_dim")
    is_wide = part in ("in_proj_qkv.weight", "conv1d.weight")  # rows of q and k come first
    before = 2 * key_heads * _size(config, "linear_key_head_dim") if is_wide else 0
    run = width if is_wide or part in ("in_proj_z.weight", "out_proj.weight") else 1
    _check(file, tensor, -1 if part == "out_proj.weight" else 0, before + value_heads * run)
    heads = np.arange(value_heads).reshape(-1, key_heads).T.reshape(-1)
    if part == "out_proj.weight":
        return Placement(tensor, columns=heads, run=run)
    rows = before + _in_each(heads, run, np.arange(run))
    return Placement(tensor, rows=np.concatenate([np.arange(before), rows]), values=values)


def _check(file: GgufFile, tensor: Tensor, axis: int, expected: int) -> None:
    """Before an order is made: metadata may say any size."""
    if (size := tensor.shape[axis]) != expected:
        raise CheckpointError(
            f"{file.path}: {printable(tensor.stored_name)} has {size:,} "
            f"{'rows' if axis == 0 else 'columns'}, but its metadata make it {expected:,}; take "
            "another file of the model"
        )


def _in_each(heads: Order, width: int, inside: Order) -> Order:
    """Places of all rows, from those of heads and those inside a head."""
    return (heads[:, None] * width + inside).reshape(-1)


def _size(config: Mapping[str, object], name: str) -> int:
    value = config[name]
    assert isinstance(value, int)  # as gguf.config made it
    return value
