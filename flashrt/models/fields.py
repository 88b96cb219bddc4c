"""Fields of a config.json: typed reads that note what is wrong, and settings of foreign models.

IS: `Fields`, the limits of sizes, and what families of token models check alike: whether the head
is tied, and that no setting of another model would change the mathematics. IS NOT: the fields of
a family (its config), nor positions (rope).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, shown

# Beyond every released model, and small enough that no product of two of them, nor a launch over
# them, leaves what planner and kernels count with.
_MOST = {
    "vocab_size": 1 << 20, "hidden_size": 1 << 16, "intermediate_size": 1 << 18,
    "num_hidden_layers": 512, "num_attention_heads": 1024, "num_key_value_heads": 1024,
    "head_dim": 1024, "linear_num_key_heads": 1024, "linear_num_value_heads": 1024,
    "linear_key_head_dim": 1024, "linear_value_head_dim": 1024, "linear_conv_kernel_dim": 16,
    "full_attention_interval": 1 << 20, "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31, "sliding_window": 1 << 31,
    "max_window_layers": 1 << 20, "no_rope_layer_interval": 1 << 20,
    "mtp_num_hidden_layers": 1024, "shared_intermediate_size": 1 << 18, "mamba_n_heads": 1024,
    "mamba_n_groups": 1024, "mamba_d_state": 1024, "mamba_d_head": 1024, "mamba_d_conv": 16,
    "num_experts": 1 << 12, "num_local_experts": 1 << 12, "num_experts_per_tok": 1 << 8,
    "moe_intermediate_size": 1 << 18, "shared_expert_intermediate_size": 1 << 18,
    "decoder_sparse_step": 1 << 20, "num_dense_layers": 512,
    "mamba_expand": 64, "ssm_state_size": 1024, "mamba_num_heads": 1024, "mamba_head_dim": 1024,
    "n_groups": 1024, "conv_kernel": 16, "conv_L_cache": 16, "block_ff_dim": 1 << 18,
    "block_multiple_of": 1 << 16,
    "depth": 512, "num_heads": 1024, "in_channels": 16, "patch_size": 256,
    "spatial_merge_size": 16, "temporal_patch_size": 16, "out_hidden_size": 1 << 16,
    "num_position_embeddings": 1 << 20, "image_token_id": 1 << 20,
}  # fmt: skip
# The sampling kernels pass words between threads in a row of V numbers, for which V >= 8.
_LEAST = {
    "vocab_size": 8, "linear_conv_kernel_dim": 2, "mamba_d_conv": 2, "conv_L_cache": 2,
    "conv_kernel": 2, "max_window_layers": 0, "num_dense_layers": 0,
}  # fmt: skip
SILU = ("silu", "swish")  # two names of one function
Neutral = dict[str, tuple[object, ...]]
# Settings of other models that would change the mathematics, and all values that change nothing.
NEUTRAL: Neutral = {
    "hidden_act": SILU,
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_softcapping": (None, 0),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "per_layer_config": (None,),
}


class Fields:
    """Typed reads that note what is wrong and go on with 1, so that one error lists everything."""

    def __init__(self, fields: Mapping[str, object], place: str = "") -> None:
        self.fields = fields
        self.place = place
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """An integer within the limits of its field, positive if nothing else is said."""
        value = self.fields.get(name, default)
        least, most = _LEAST.get(name, 1), _MOST[name]
        if value is None:
            self.problems.append(f"{self.place}{name} is missing; a positive integer is needed")
        elif not isinstance(value, int) or isinstance(value, bool) or value < min(least, 1):
            self.problems.append(
                f"{self.place}{name} is {shown(value)}, expected a positive integer"
            )
        elif not least <= value <= most:
            self.problems.append(
                f"{self.place}{name} is {shown(value)}, expected {least} to {most:,}"
            )
        else:
            return value
        return 1

    def number(
        self, name: str, default: float | None, least: float = 0.0, most: float = math.inf
    ) -> float:
        """A finite number above 0, in [least, most]."""
        value = self.fields.get(name, default)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 < value <= 1e300
            and least <= value <= most
        ):
            return float(value)
        given = "missing" if value is None else shown(value)
        self.problems.append(
            f"{self.place}{name} is {given}, expected a positive number"
            + (f" from {least:g} to {most:g}" if (least, most) != (0.0, math.inf) else "")
        )
        return 1.0

    def is_set(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self.fields.get(name)
        if isinstance(value, bool | None):
            return default if value is None else value
        self.problems.append(f"{self.place}{name} is {shown(value)}, expected true or false")
        return default

    def refuse_but(self, neutral: Neutral) -> None:
        """Notes each field that holds a value which is not among those that change nothing."""
        for name, harmless in neutral.items():
            value = self.fields.get(name, harmless[0])
            if not any(
                value == n and isinstance(value, bool) == isinstance(n, bool) for n in harmless
            ):
                wanted = " or ".join(shown(n) for n in harmless)
                self.problems.append(f"{name} is {shown(value)}; only {wanted} is supported")

    def refuse_uneven_heads(self, query_heads: int, kv_heads: int) -> None:
        """Notes query heads that no key/value head has an equal share of."""
        if query_heads % kv_heads:
            self.problems.append(
                f"num_attention_heads {query_heads} is no multiple of num_key_value_heads "
                f"{kv_heads}"
            )

    def raise_problems(self) -> None:
        """Raises CheckpointError if anything was wrong, naming all of it."""
        if self.problems:
            raise CheckpointError(f"config.json does not fit:{indented(self.problems)}")


def is_tied(
    fields: Fields,
    levels: Sequence[Mapping[str, object]],
    lacks_head: bool | None,
    default: bool = False,
) -> bool:
    """Whether the head is the embedding table.

    As in transformers: a stored lm_head.weight is used, also where the config says that it is tied
    (then it is a copy, or the config is wrong); a head that is not stored must be said to be tied.
    In a nested config the outer level may say so, or text_config: both are `levels`, the inner one
    first. `lacks_head`: whether the weight files lack it; None believes the config. `default`: of
    a config that says nothing.
    """
    name = "tie_word_embeddings"
    values = [level.get(name) for level in levels]
    said = [value for value in values if isinstance(value, bool | None)]
    if bad := [value for value in values if not isinstance(value, bool | None)]:
        fields.problems.append(f"{name} is {shown(bad[0])}, expected true or false")
        return False
    if lacks_head is None:
        return next((value for value in said if value is not None), default)
    if lacks_head and True not in said and (False in said or not default):
        fields.problems.append(
            f"{name} is {'false' if False in said else 'missing'}, so the head is lm_head.weight, "
            "which the weight files lack: fetch them again, or, if this model ties its head to the "
            f"embedding, set {name} to true"
        )
    return lacks_head
