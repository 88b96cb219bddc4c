"""The configuration of a robot policy, read from config.json.

IS: fields and every check on them, all problems in one error. IS NOT: shapes of tensors (see
policy). Called by: policy, policy_engine, tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashrt.base.errors import CheckpointError
from flashrt.weights.checkpoint import Checkpoint

MODEL_TYPE = "flashrt_policy"
MEMORIES = ("gru",)
FREQUENCIES = (1, 2, 4, 8)  # of the time features, in periods per integration
TIME_FEATURES = 2 * len(FREQUENCIES)
_MOST = 1 << 16  # of any size; products stay far from 2^31
_SIZES = (
    "observation_dim", "action_dim", "encoder_dim", "memory_dim", "chunk_size", "n_action_steps",
    "num_inference_steps", "head_dim", "head_blocks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Sizes of a policy, named as in config.json; the comment of each gives its symbol."""

    observation_dim: int  # O
    action_dim: int  # A
    encoder_dim: int  # E
    memory_dim: int  # M
    chunk_size: int  # H: actions that a plan makes
    n_action_steps: int  # N <= H: of those, how many are executed beyond the committed ones
    num_inference_steps: int  # S: Euler steps of a plan
    head_dim: int  # F
    head_blocks: int  # B
    fps: float  # ticks per second that the policy was trained at
    card: Mapping[str, object] = field(default_factory=dict)  # everything else, as it was read

    @property
    def flow_size(self) -> int:
        """Numbers of a flow: a chunk, and a mask over its rows."""
        return self.chunk_size * (self.action_dim + 1)


def config_of(checkpoint: Checkpoint) -> PolicyConfig:
    """The config of a policy. Raises CheckpointError for another model, or naming all problems."""
    model_type = checkpoint.config.get("model_type")
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{checkpoint.path}: model_type is {model_type!r}, a policy's is {MODEL_TYPE!r}; "
            "language models load with flashrt.load"
        )
    return parse_config(checkpoint.config)


def parse_config(config: Mapping[str, object]) -> PolicyConfig:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    sizes = {name: _size(config, name, problems) for name in _SIZES}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    if config.get("memory") not in MEMORIES:
        problems.append(f"memory is {config.get('memory')!r}; supported: {', '.join(MEMORIES)}")
    if config.get("time_features", TIME_FEATURES) != TIME_FEATURES:
        problems.append(
            f"time_features is {config['time_features']!r}; only {TIME_FEATURES} is supported"
        )
    if images := sorted(name for name in config if "image" in name):
        problems.append(
            f"{', '.join(images)}: observations are vectors; run an image encoder of your own and "
            "give its features as part of the observation"
        )
    fps = config.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf:
        problems.append(f"fps is {fps!r}, expected ticks per second")
        fps = 1.0
    if problems:
        raise CheckpointError("config.json does not fit:\n  " + "\n  ".join(problems))
    known = {*_SIZES, "model_type", "memory", "time_features", "fps"}
    card = {name: value for name, value in config.items() if name not in known}
    return PolicyConfig(**sizes, fps=float(fps), card=card)


def _size(config: Mapping[str, object], name: str, problems: list[str]) -> int:
    value = config.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST:
        return value
    problems.append(f"{name} is {value!r}, expected an integer in [1, {_MOST})")
    return 1
