"""A seeded random model of a named shape as a GGUF file, to run here and in llama.cpp.

    python tools/random_gguf.py 0.8b q4_0 out.gguf
    python tools/random_gguf.py 35b-a3b q4_0 out.gguf     # 19.6 GB, in less than 1 GB of memory
    python tools/random_gguf.py 35b-a3b q4_0 out.gguf --layers 4

IS: the tensors of flashrt's own random checkpoints under GGUF's names and conventions (norms hold
1 + w, ssm_a is -exp(A_log)), matrices in one type, head and embedding too; a vocabulary of made-up
words. Of shapes with experts, those are drawn as blocks of uniform codes and all else as values,
tensor by tensor, so that no file is needed to make a file of any size. Needs the `gguf` package.
IS NOT: a converter: values are drawn where GGUF has them, so a shape with more value heads than key
heads, whose heads a GGUF file has in another order, is another model than the checkpoint of that
shape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.weights.random_checkpoint import (
    Draw,
    Shape,
    shape_config,
    sizes_of,
    tensor_shapes,
)

TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight", "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight", "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    **{
        f"mlp.shared_expert.{name}_proj.weight": f"ffn_{name}_shexp.weight"
        for name in ("gate", "up", "down")
    },
}  # fmt: skip
_ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")  # float32, as llama.cpp keeps them
_SEED = 0


def name_of(name: str) -> str:
    """The name in a GGUF file."""
    if name in _WHOLE:
        return _WHOLE[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_LAYER[rest]}"


def values_of(draw: Draw, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor as GGUF wants it."""
    chunks = [
        c.view(ml_dtypes.bfloat16) if c.dtype == np.uint16 else c.astype(ml_dtypes.bfloat16)
        for c in draw.chunks(name, shape)
    ]
    values = np.concatenate(chunks).astype(np.float32).reshape(shape)
    if name.endswith("A_log"):
        return -np.exp(values)
    if name.endswith("conv1d.weight"):
        return values[:, 0, :]
    if name.endswith("shared_expert_gate.weight"):
        return values[0]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return np.float32(1) + values
    return values


def stacked_blocks(
    shape: tuple[int, int, int], kind: gguf.GGMLQuantizationType, deviation: float, seed: list[int]
) -> NDArray[np.uint8]:
    """[experts, rows, bytes of a row] of blocks with uniform codes and one scale."""
    experts, rows, columns = shape
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    bits = {gguf.GGMLQuantizationType.Q4_0: 4, gguf.GGMLQuantizationType.Q8_0: 8}[kind]
    n_blocks = experts * rows * columns // elements
    bits_of = np.random.SFC64(np.random.SeedSequence(seed))
    blocks = np.empty((n_blocks, nbytes), np.uint8)
    blocks[:, :2] = np.array([deviation * math.sqrt(12) / 2**bits], np.float16).view(np.uint8)
    step = 1 << 20
    for first in range(0, n_blocks, step):
        part = blocks[first : first + step, 2:]
        part[:] = (
            bits_of.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size].reshape(part.shape)
        )
    return blocks.reshape(experts, rows, -1)


def add_metadata(writer: gguf.GGUFWriter, arch: str, shape: Shape) -> None:
    """Sizes, and a vocabulary that no text was made of."""
    c = shape_config(shape)
    key_heads, value_heads, dim = shape.linear_heads
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    if (e := shape.experts) is None:
        writer.add_feed_forward_length(shape.intermediate)
    else:
        writer.add_expert_count(e.n)
        writer.add_expert_used_count(e.picked)
        writer.add_expert_feed_forward_length(e.intermediate)
        writer.add_expert_shared_feed_forward_length(e.shared)
    writer.add_head_count(shape.heads[0])
    writer.add_head_count_kv(shape.heads[1])
    writer.add_key_length(shape.heads[2])
    writer.add_value_length(shape.heads[2])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.heads[2] // 4)
    writer.add_array(f"{arch}.rope.dimension_sections", [11, 11, 10, 0])
    writer.add_uint32(f"{arch}.full_attention_interval", 4)
    writer.add_uint32(f"{arch}.ssm.conv_kernel", c["linear_conv_kernel_dim"])
    writer.add_uint32(f"{arch}.ssm.state_size", dim)
    writer.add_uint32(f"{arch}.ssm.group_count", key_heads)
    writer.add_uint32(f"{arch}.ssm.time_step_rank", value_heads)
    writer.add_uint32(f"{arch}.ssm.inner_size", value_heads * dim)
    n_tokens = shape.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["w", "0", "w0", *(f"w{i}" for i in range(3, n_tokens))])
    writer.add_token_types([gguf.TokenType.NORMAL] * n_tokens)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(0)


Plan = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType | None]  # name, shape, blocks if any


def plan(shape: Shape, kind: gguf.GGMLQuantizationType) -> Iterator[Plan]:
    """Tensors of the file by flashrt's names; all experts of a layer are one."""
    for name, extents in tensor_shapes(shape, shape.is_tied, False):
        before, _, after = name.partition(".experts.")
        if after:
            expert, _, rest = after.partition(".")
            if expert == "0":
                assert shape.experts is not None
                yield f"{before}.experts.{rest}", (shape.experts.n, *extents), kind
        elif name.endswith(_ROUTERS):
            yield name, extents, None
        else:
            yield name, extents, kind if len(extents) == 2 else None


def stored_name(name: str) -> str:
    """In the file, stacked experts too."""
    if ".experts." not in name:
        return name_of(name)
    layer, part = name.split(".")[2], name.rpartition(".experts.")[2].partition("_proj")[0]
    return f"blk.{layer}.ffn_{part}_exps.weight"


def made(draw: Draw, planned: Plan) -> NDArray[np.generic]:
    """The bytes of a tensor: values, or blocks [..., bytes of a row]."""
    name, extents, kind = planned
    if kind is None:
        return values_of(draw, name, extents)
    if len(extents) == 3:
        _, deviation = draw.moments(name, extents[1:])
        return stacked_blocks(extents, kind, deviation, [_SEED, *name.encode()])  # type: ignore[arg-type]
    blocks = [  # of whole chunks: blocks are 32 values, as are the smallest parts of a row
        gguf.quants.quantize(c.view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, 32), kind)
        for c in draw.chunks(name, extents)
    ]
    return np.concatenate(blocks).reshape(extents[0], -1)


def main() -> None:
    """Write the file, tensor by tensor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    options = parser.parse_args()
    shape, kind = sizes_of(options.shape), TYPES[options.type]
    if options.layers is not None:
        shape = replace(shape, n_layers=options.layers)
    if shape.experts is not None and options.type not in ("q4_0", "q8_0"):
        parser.error("experts are drawn as q4_0 or q8_0")
    arch = "qwen35" if shape.experts is None else "qwen35moe"
    writer = gguf.GGUFWriter(options.out, arch)
    add_metadata(writer, arch, shape)
    draw, planned = Draw(_SEED, shape.hidden, shape.is_tied), list(plan(shape, kind))
    for name, extents, blocks in planned:
        sizes = extents
        if name.endswith("conv1d.weight"):
            sizes = (extents[0], extents[2])
        elif name.endswith("shared_expert_gate.weight"):
            sizes = extents[1:]
        if blocks is None:
            dtype, nbytes = np.dtype(np.float32), 4 * math.prod(sizes)
        else:
            dtype, sizes = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(sizes, blocks)
            nbytes = math.prod(sizes)
        writer.add_tensor_info(stored_name(name), sizes, dtype, nbytes, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, one in enumerate(planned, 1):
        writer.write_tensor_data(made(draw, one))
        print(f"\r{i} of {len(planned)} tensors", end="", flush=True)
    print()
    writer.close()


if __name__ == "__main__":
    main()
