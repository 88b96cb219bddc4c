"""Random checkpoints in the Hugging Face format, of real shapes.

IS: config.json, generation_config.json and model.safetensors of a Qwen3.5 text model, dense or with
experts, the same bytes for the same seed, streamed to disk. Weights are scaled so that each
sublayer writes O(1) into the residual stream and decay rates span slow to fast: greedy text does
not fall into a loop and the recurrent state matters. IS NOT: a trained model, or knowledge that the
loader uses. Exists because tests, benchmarks and demonstrations need models of any size, where no
network is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.core.backend import Progress
from flashrt.weights.checkpoint import GENERATION_FILE
from flashrt.weights.folder import CONFIG_FILE, WEIGHTS_FILE

CHUNK_SIZE = 1 << 18  # elements drawn at a time; the work of a chunk stays in a second-level cache
# Standard deviation of a matrix times sqrt(inputs); 1 where not named.
_GAIN = {
    "in_proj_b": 1.5, "gate_proj": 1.2, "up_proj": 1.2, "down_proj": 1.6, "out_proj": 1.5,
    "o_proj": 2.5, "conv1d": 1.4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Of experts in place of an MLP. `shared`: of the expert that every token goes to."""

    n: int
    picked: int
    intermediate: int
    shared: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model; every fourth layer is full attention."""

    hidden: int
    n_layers: int
    intermediate: int  # 0 in models of experts
    heads: tuple[int, int, int]  # query heads, key/value heads, size
    linear_heads: tuple[int, int, int]  # key heads, value heads, size
    vocab_size: int
    rope_theta: float = 1e7
    is_tied: bool = True  # the head is the embedding table
    experts: ExpertSizes | None = None


# The named sizes are those of config.json of Qwen/Qwen3.5-0.8B, -4B, -9B and -27B on the Hugging
# Face hub. Each was checked by its sum: 0.75, 4.2, 8.95 and 26.9 billion parameters without the
# vision tower and the draft head; those with experts by 34.7 and 122 billion.
SHAPES = {
    "tiny": Shape(64, 4, 128, (4, 2, 32), (2, 4, 16), 512),
    "mini": Shape(256, 8, 768, (4, 2, 64), (4, 8, 64), 4096),
    "0.8b": Shape(1024, 24, 3584, (8, 2, 256), (16, 16, 128), 248320),
    "4b": Shape(2560, 32, 9216, (16, 4, 256), (16, 32, 128), 248320),
    "9b": Shape(4096, 32, 12288, (16, 4, 256), (16, 32, 128), 248320, is_tied=False),
    "27b": Shape(5120, 64, 17408, (24, 4, 256), (16, 48, 128), 248320, is_tied=False),
    "tiny-moe": Shape(64, 4, 0, (4, 2, 32), (2, 4, 16), 512, experts=ExpertSizes(8, 3, 32, 64)),
    "35b-a3b": Shape(
        2048, 40, 0, (16, 2, 256), (16, 32, 128), 248320, is_tied=False,
        experts=ExpertSizes(256, 8, 512, 512),
    ),
    "122b-a10b": Shape(
        3072, 48, 0, (32, 2, 256), (16, 64, 128), 248320, is_tied=False,
        experts=ExpertSizes(256, 8, 1024, 1024),
    ),
}  # fmt: skip
_CONV_TAPS, _FULL_INTERVAL = 4, 4


def write_random_checkpoint(
    path: str | Path,
    shape: str | Shape = "tiny",
    *,
    seed: int = 0,
    is_tied: bool | None = None,
    has_draft_head: bool = False,
    ssm_dtype: Literal["F32", "BF16"] = "F32",
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint directory; it appears under its name when it is whole. Returns its path.

    `is_tied`: None = as the shape says. `ssm_dtype` is that of A_log and linear_attn.norm.weight:
    F32 in released checkpoints.
    Raises CheckpointError if the path is taken, the shape is unknown or the disk refuses.
    """
    target = Path(path)
    sizes = sizes_of(shape)
    is_tied = sizes.is_tied if is_tied is None else is_tied
    if target.exists():
        raise CheckpointError(f"{target}: already exists; remove it or give another path")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        config = shape_config(sizes, is_tied=is_tied, has_draft_head=has_draft_head)
        partial.mkdir(parents=True)
        _write_json(partial / CONFIG_FILE, config)
        _write_json(partial / GENERATION_FILE, {"_from_model_config": True, "use_cache": True})
        tensors = dict(tensor_shapes(sizes, is_tied, has_draft_head))
        with (partial / WEIGHTS_FILE).open("wb") as file:
            _write_tensors(file, tensors, Draw(seed, sizes.hidden, is_tied), ssm_dtype, progress)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def shape_config(
    shape: str | Shape, *, is_tied: bool | None = None, has_draft_head: bool = False
) -> dict[str, object]:
    """The config.json of a shape (`is_tied`: None = as it says). Raises CheckpointError if it is
    unknown.
    """
    s = sizes_of(shape)
    kinds = [
        "linear_attention" if (i + 1) % _FULL_INTERVAL else "full_attention"
        for i in range(s.n_layers)
    ]
    if (e := s.experts) is None:
        mlp: dict[str, object] = {"intermediate_size": s.intermediate}
    else:
        mlp = {
            "num_experts": e.n,
            "num_experts_per_tok": e.picked,
            "moe_intermediate_size": e.intermediate,
            "shared_expert_intermediate_size": e.shared,
        }
    return {
        "architectures": [f"Qwen3_5{'Moe' * (e is not None)}ForCausalLM"],
        "model_type": "qwen3_5_text" if e is None else "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": None,
        "full_attention_interval": _FULL_INTERVAL,
        "head_dim": s.heads[2],
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        **mlp,
        "layer_types": kinds,
        "linear_conv_kernel_dim": _CONV_TAPS,
        "linear_key_head_dim": s.linear_heads[2],
        "linear_num_key_heads": s.linear_heads[0],
        "linear_num_value_heads": s.linear_heads[1],
        "linear_value_head_dim": s.linear_heads[2],
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": int(has_draft_head),
        "num_attention_heads": s.heads[0],
        "num_hidden_layers": s.n_layers,
        "num_key_value_heads": s.heads[1],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "partial_rotary_factor": 0.25,
            "rope_theta": s.rope_theta,
            "rope_type": "default",
        },
        "tie_word_embeddings": s.is_tied if is_tied is None else is_tied,
        "vocab_size": s.vocab_size,
    }


def sizes_of(shape: str | Shape) -> Shape:
    """A shape by its name, or as it is. Raises CheckpointError if it is unknown."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise CheckpointError(f"unknown shape {shape!r}; shapes: {', '.join(SHAPES)}")
    return SHAPES[shape] if isinstance(shape, str) else shape


def tensor_shapes(
    s: Shape, is_tied: bool, has_draft_head: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in file order."""
    yield "model.embed_tokens.weight", (s.vocab_size, s.hidden)
    for i in range(s.n_layers):
        mixer = _linear_attention(s) if (i + 1) % _FULL_INTERVAL else _full_attention(s)
        for name, shape in {**mixer, **_mlp(s)}.items():
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (s.hidden,)
    if not is_tied:
        yield "lm_head.weight", (s.vocab_size, s.hidden)
    if has_draft_head:
        yield "mtp.fc.weight", (s.hidden, 2 * s.hidden)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{norm}.weight", (s.hidden,)
        for name, shape in {**_full_attention(s), **_mlp(s)}.items():
            yield f"mtp.layers.0.{name}", shape


def _linear_attention(s: Shape) -> dict[str, tuple[int, ...]]:
    key_heads, value_heads, size = s.linear_heads
    inner, channels = value_heads * size, (2 * key_heads + value_heads) * size
    return {
        "linear_attn.in_proj_qkv.weight": (channels, s.hidden),
        "linear_attn.in_proj_z.weight": (inner, s.hidden),
        "linear_attn.in_proj_b.weight": (value_heads, s.hidden),
        "linear_attn.in_proj_a.weight": (value_heads, s.hidden),
        "linear_attn.conv1d.weight": (channels, 1, _CONV_TAPS),
        "linear_attn.A_log": (value_heads,),
        "linear_attn.dt_bias": (value_heads,),
        "linear_attn.norm.weight": (size,),
        "linear_attn.out_proj.weight": (s.hidden, inner),
    }


def _full_attention(s: Shape) -> dict[str, tuple[int, ...]]:
    query_heads, kv_heads, size = s.heads
    return {
        "self_attn.q_proj.weight": (2 * query_heads * size, s.hidden),
        "self_attn.k_proj.weight": (kv_heads * size, s.hidden),
        "self_attn.v_proj.weight": (kv_heads * size, s.hidden),
        "self_attn.o_proj.weight": (s.hidden, query_heads * size),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
    }


def _mlp(s: Shape) -> dict[str, tuple[int, ...]]:
    norms: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (s.hidden,),
        "post_attention_layernorm.weight": (s.hidden,),
    }
    if (e := s.experts) is None:
        return norms | _projections("mlp", s.hidden, s.intermediate)
    found = norms | {
        "mlp.gate.weight": (e.n, s.hidden),
        "mlp.shared_expert_gate.weight": (1, s.hidden),
        **_projections("mlp.shared_expert", s.hidden, e.shared),
    }
    for i in range(e.n):
        found |= _projections(f"mlp.experts.{i}", s.hidden, e.intermediate)
    return found


def _projections(of: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{of}.gate_proj.weight": (intermediate, hidden),
        f"{of}.up_proj.weight": (intermediate, hidden),
        f"{of}.down_proj.weight": (hidden, intermediate),
    }


class Draw:
    """Values of tensors: each has a generator of its own, keyed by (seed, name), so order and
    chunks do not matter.
    """

    def __init__(self, seed: int, hidden: int, is_tied: bool) -> None:
        self.seed = seed
        self.embedding_std = 2.5 / math.sqrt(hidden) if is_tied else 0.5
        # A normal variate is a random entry of a table of 2^16 quantiles: one gather, no logarithm.
        normal = NormalDist()
        upper = [normal.inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
        self.quantiles = np.array([-q for q in reversed(upper)] + upper)

    def chunks(
        self, name: str, shape: tuple[int, ...]
    ) -> Iterator[NDArray[np.float32 | np.uint16]]:
        """A tensor's values in order: bfloat16 bits (uint16) for matrices, float32 for vectors."""
        key = [self.seed, *name.encode()]
        bits = np.random.SFC64(np.random.SeedSequence(key))
        size = math.prod(shape)
        if name.endswith("A_log"):  # exp of it in [0.01, 1.01]: decay rates from very slow to fast
            uniform = np.random.Generator(bits).random(size)
            yield np.log(uniform + 0.01).astype(np.float32)
            return
        mean, std = self.moments(name, shape)
        table = (mean + std * self.quantiles).astype(np.float32)
        values = table if len(shape) == 1 else table.astype(ml_dtypes.bfloat16).view(np.uint16)
        for start in range(0, size, CHUNK_SIZE):
            count = min(CHUNK_SIZE, size - start)
            index = bits.random_raw(-(-count // 4)).view(np.uint16)[:count].astype(np.intp)
            # All indices are in range; `clip` spares a check of each.
            yield values.take(index, mode="clip")

    def moments(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of a tensor's values; A_log has neither."""
        if name.endswith("dt_bias"):
            return -1.0, 1.0
        if name.endswith("linear_attn.norm.weight"):  # the one norm that is not zero-centred
            return 1.0, 0.25
        if len(shape) == 1:
            return 0.0, 0.25
        if name == "model.embed_tokens.weight":
            return 0.0, self.embedding_std
        inputs = math.sqrt(math.prod(shape[1:]))
        if name == "lm_head.weight":
            return 0.0, 3.0 / inputs
        return 0.0, _GAIN.get(name.split(".")[-2], 1.0) / inputs


def _write_tensors(
    file: BinaryIO,
    tensors: dict[str, tuple[int, ...]],
    draw: Draw,
    ssm_dtype: str,
    progress: Progress | None,
) -> None:
    dtypes = {
        name: ssm_dtype if name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"
        for name in tensors
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * (4 if dtypes[name] == "F32" else 2)
        header[name] = {
            "dtype": dtypes[name],
            "shape": shape,
            "data_offsets": [total, total + nbytes],
        }
        total += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    done = 0
    for name, shape in tensors.items():
        for chunk in draw.chunks(name, shape):
            is_wide = chunk.dtype == np.float32 and dtypes[name] == "BF16"
            data = chunk.astype(ml_dtypes.bfloat16).view(np.uint16) if is_wide else chunk
            file.write(data.data)
            done += data.nbytes
            if progress is not None:
                progress("random weights", done, total)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
