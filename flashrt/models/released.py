"""Released models of other families than Qwen3.5, by name: fields of config.json that fix sizes.

IS: what `flashrt plan --shape NAME` needs. IS NOT: whole configs: multipliers, eps and limits are
left out, as they change no size; nor weights. Each was checked by its sum: see the parameters in
tests/unit/test_released.py, which also says where figures are from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Config = dict[str, object]


def _lfm2(hidden: int, n_layers: int, attention: Sequence[int], **mlp: object) -> Config:
    return {
        "model_type": "lfm2", "vocab_size": 65536, "hidden_size": hidden,
        "num_hidden_layers": n_layers, "full_attn_idxs": list(attention),
        "num_attention_heads": hidden // 64, "num_key_value_heads": 8, **mlp,
    }  # fmt: skip


def _granite(
    hidden: int, mlp: int, heads: tuple[int, int], ssm: tuple[int, int], kinds: tuple[int, set[int]]
) -> Config:
    """`heads` of queries and keys; `ssm`: heads and the size of one; `kinds`: layers, and those of
    attention.
    """
    n_layers, attention = kinds
    return {
        "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": hidden,
        "num_hidden_layers": n_layers, "num_local_experts": 0, "shared_intermediate_size": mlp,
        "layer_types": ["attention" if i in attention else "mamba" for i in range(n_layers)],
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "mamba_n_heads": ssm[0], "mamba_d_head": ssm[1], "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "position_embedding_type": "nope",
        "tie_word_embeddings": True,
    }  # fmt: skip


def _with_experts(config: Config, n: int, picked: int, intermediate: int) -> Config:
    """Granite-4.0-H with experts beside its MLP."""
    return config | {
        "num_local_experts": n, "num_experts_per_tok": picked, "intermediate_size": intermediate
    }  # fmt: skip


def _nemotron(
    pattern: str, hidden: int, mlp: int, query_heads: int, ssm: tuple[int, int, int]
) -> Config:
    """`ssm`: heads, the size of one, and that of its state."""
    return {
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": hidden,
        "hybrid_override_pattern": pattern, "intermediate_size": mlp, "head_dim": 128,
        "num_attention_heads": query_heads, "num_key_value_heads": 8, "n_groups": 8,
        "mamba_num_heads": ssm[0], "mamba_head_dim": ssm[1], "ssm_state_size": ssm[2],
    }  # fmt: skip


_SIX = (2, 5, 8, 10, 12, 14)
_FOUR = (40, {5, 15, 25, 35})
_H8 = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
_H56 = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
_H47 = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
    "M-M-M-M-M-"
)
_NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NANO_12B = 6 * "M-M-M-M*-" + "M-M-M-M-"
_NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
RELEASED: Mapping[str, Config] = {
    "lfm2.5-230m": _lfm2(1024, 14, range(2, 13, 2), intermediate_size=2560,
                         block_auto_adjust_ff_dim=False),
    "lfm2-350m": _lfm2(1024, 16, _SIX, block_ff_dim=6656),
    "lfm2-700m": _lfm2(1536, 16, _SIX, block_ff_dim=10240),
    "lfm2-1.2b": _lfm2(2048, 16, _SIX, block_ff_dim=12288),
    "lfm2-2.6b": _lfm2(2048, 30, (2, 6, 9, 12, 15, 18, 21, 24), intermediate_size=10752,
                       block_auto_adjust_ff_dim=False),
    "lfm2-8b-a1b": _lfm2(2048, 24, ()) | {
        "model_type": "lfm2_moe", "intermediate_size": 7168, "num_dense_layers": 2,
        "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792,
        "full_attn_idxs": [2, 6, 10, 14, 18, 21],
    },
    "granite-4.0-h-350m": _granite(768, 2048, (12, 4), (48, 32), (32, {10, 13, 17, 27})),
    "granite-4.0-h-1b": _granite(1536, 4096, (12, 4), (48, 64), _FOUR),
    "granite-4.0-h-micro": _granite(2048, 8192, (32, 8), (64, 64), _FOUR),
    "granite-4.0-h-tiny": _with_experts(
        _granite(1536, 1024, (12, 4), (48, 64), _FOUR), 64, 6, 512
    ),
    "granite-4.0-h-small": _with_experts(
        _granite(4096, 1536, (32, 8), (128, 64), _FOUR), 72, 10, 768
    ),
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    },
    "nemotron-h-4b": _nemotron(_H8, 3072, 12288, 32, (112, 64, 128)),
    "nemotron-h-8b": _nemotron(_H8, 4096, 21504, 32, (128, 64, 128)),
    "nemotron-h-47b": _nemotron(_H47, 8192, 30720, 64, (256, 64, 256)),
    "nemotron-h-56b": _nemotron(_H56, 8192, 32768, 64, (256, 64, 256)),
    "nemotron-nano-9b-v2": _nemotron(_NANO_9B, 4480, 15680, 40, (128, 80, 128)),
    "nemotron-nano-12b-v2": _nemotron(_NANO_12B, 5120, 20480, 40, (128, 80, 128)),
    "nemotron-3-nano-4b": _nemotron(_NANO_4B, 3136, 12544, 40, (96, 80, 128)),
}  # fmt: skip
