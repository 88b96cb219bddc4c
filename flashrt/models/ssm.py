"""Mamba-2 layers as families have them: sizes, weights, state of a lane.

IS: one dataclass, the rules behind `BlockRecorder.ssm`, and the regions that it keeps from token to
token. IS NOT: config fields, which each family spells in its own way, nor launches (blocks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashrt.base.messages import shown
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.models.decoder import bias_rule
from flashrt.models.fields import Fields
from flashrt.weights.rules import WeightRule, depthwise_conv, matrix, vector

NO_LIMITS = (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class SsmSizes:
    """Sizes and constants of a model's Mamba-2 layers; comments give the symbols in ops/ssm."""

    heads: int  # Hv
    head_dim: int  # dv
    state_dim: int  # dk
    groups: int
    conv_taps: int  # W + 1
    has_conv_bias: bool
    has_proj_bias: bool  # of in_proj and out_proj
    time_limits: tuple[float, float]  # of a step, after its softplus

    @property
    def inner(self) -> int:
        """Columns of all heads."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """C: x, B and C."""
        return self.inner + 2 * self.groups * self.state_dim

    def weights(self, region: str, source: str, hidden: int) -> list[WeightRule]:
        """Rules of a layer: regions `{region}.*` from tensors `{source}.*`."""
        rows = self.inner + self.conv_channels + self.heads
        in_proj, conv, out_proj = (f"{region}.{name}" for name in ("in_proj", "conv", "out_proj"))
        rules = [
            matrix(in_proj, hidden, (f"{source}.in_proj.weight", rows)),  # [z | x B C | dt]
            depthwise_conv(conv, f"{source}.conv1d.weight", self.conv_channels, self.conv_taps),
            vector(f"{region}.a_log", f"{source}.A_log", self.heads),
            vector(f"{region}.dt_bias", f"{source}.dt_bias", self.heads),
            vector(f"{region}.d", f"{source}.D", self.heads),
            vector(f"{region}.ssm_norm", f"{source}.norm.weight", self.inner),
            matrix(out_proj, self.inner, (f"{source}.out_proj.weight", hidden)),
        ]
        if self.has_conv_bias:
            rules.append(bias_rule(conv, (f"{source}.conv1d.bias", self.conv_channels)))
        if self.has_proj_bias:
            rules.append(bias_rule(in_proj, (f"{source}.in_proj.bias", rows)))
            rules.append(bias_rule(out_proj, (f"{source}.out_proj.bias", hidden)))
        return rules

    def state(self, n_layers: int) -> list[Region]:
        """State and window of so many layers of a lane; nothing for none."""
        if not n_layers:
            return []
        heads = (n_layers, self.heads, self.state_dim, self.head_dim)
        window = (n_layers, self.conv_taps - 1, self.conv_channels)
        return [
            Region("state", heads, DType.F32, Role.FIXED, Layout.COLUMN_BLOCKS, is_digested=True),
            Region("window", window, DType.F32, Role.FIXED, is_digested=True),
        ]


def time_limits(fields: Fields) -> tuple[float, float]:
    """`time_step_limit`, least and most of a step after its softplus. Infinity is a number of JSON
    as Python writes it, or an object, as transformers 5 does.
    """
    given = fields.fields.get("time_step_limit")
    if given is None:
        return NO_LIMITS
    if isinstance(given, list | tuple) and len(given) == 2:
        least, most = (math.inf if x == {"__float__": "Infinity"} else x for x in given)
        if (
            isinstance(least, int | float)
            and isinstance(most, int | float)
            and not isinstance(least, bool)
            and not isinstance(most, bool)
            and 0 <= least <= most
        ):
            return float(least), float(most)
    fields.problems.append(
        f"time_step_limit is {shown(given)}, expected two numbers, the least first, from 0 on"
    )
    return NO_LIMITS
