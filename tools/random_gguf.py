"""A seeded random model of a named shape as a GGUF file, to run here and in llama.cpp.

    python tools/random_gguf.py 0.8b q4_0 out.gguf

IS: the tensors of flashrt's own random checkpoints under GGUF's names and conventions (norms hold
1 + w, ssm_a is -exp(A_log)), matrices in one type, head and embedding too; a vocabulary of made-up
words. Needs the `gguf` package. IS NOT: a converter: shapes with more value heads than key heads,
whose heads a GGUF file has in another order, are refused.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.commands.checkpoints import cached_random_checkpoint
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint

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
}  # fmt: skip


def name_of(name: str) -> str:
    """The name in a GGUF file."""
    if name in _WHOLE:
        return _WHOLE[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_LAYER[rest]}"


def values_of(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """A tensor as GGUF wants it."""
    tensor = checkpoint.tensors[name]
    is_half = tensor.dtype == "BF16"
    stored = np.empty(math.prod(tensor.shape), ml_dtypes.bfloat16 if is_half else np.float32)
    checkpoint.read_into(tensor, 0, stored.view(np.uint8).data)
    values = stored.astype(np.float32).reshape(tensor.shape)
    if name.endswith("A_log"):
        return -np.exp(values)
    if name.endswith("conv1d.weight"):
        return values[:, 0, :]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return np.float32(1) + values
    return values


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, object]) -> None:
    """Sizes, and a vocabulary that no text was made of."""
    arch, c = "qwen35", config
    heads, dim = int(c["linear_num_value_heads"]), int(c["linear_value_head_dim"])  # type: ignore[call-overload]
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    rope = c["rope_parameters"]
    assert isinstance(rope, dict)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(c["head_dim"] * rope["partial_rotary_factor"]))  # type: ignore[operator]
    writer.add_array(f"{arch}.rope.dimension_sections", [11, 11, 10, 0])
    writer.add_uint32(f"{arch}.full_attention_interval", 4)
    writer.add_uint32(f"{arch}.ssm.conv_kernel", c["linear_conv_kernel_dim"])
    writer.add_uint32(f"{arch}.ssm.state_size", c["linear_key_head_dim"])
    writer.add_uint32(f"{arch}.ssm.group_count", c["linear_num_key_heads"])
    writer.add_uint32(f"{arch}.ssm.time_step_rank", heads)
    writer.add_uint32(f"{arch}.ssm.inner_size", heads * dim)
    n_tokens = int(c["vocab_size"])  # type: ignore[call-overload]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["w", "0", "w0", *(f"w{i}" for i in range(3, n_tokens))])
    writer.add_token_types([gguf.TokenType.NORMAL] * n_tokens)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(0)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    folder, _ = cached_random_checkpoint(options.shape)
    checkpoint, kind = open_checkpoint(folder), TYPES[options.type]
    config = dict(checkpoint.config)
    if config["linear_num_value_heads"] != config["linear_num_key_heads"]:
        parser.error(f"shape {options.shape} has more value heads than key heads")
    writer = gguf.GGUFWriter(options.out, "qwen35")
    add_metadata(writer, config)
    for name, tensor in checkpoint.tensors.items():
        values = values_of(checkpoint, name)
        if len(tensor.shape) == 2:
            writer.add_tensor(name_of(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name_of(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
