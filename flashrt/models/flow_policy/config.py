"""The configuration of a robot policy, read from config.json.

IS: fields and every check on them, all problems in one error. IS NOT: shapes of tensors (model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, listed, shown
from flashrt.weights.checkpoint import Checkpoint

MODEL_TYPE = "flashrt_policy"
MEMORIES = ("gru",)
FREQUENCIES = (1, 2, 4, 8)  # of the time features, in periods per integration
TIME_FEATURES = 2 * len(FREQUENCIES)
_MOST_FPS = 1_000_000
# The most of each size: no product of two, which a tensor has, comes near 2^31, and each Euler step
# is a tape of its own.
_MOST = {
    "observation_dim": 1 << 14, "action_dim": 1 << 10, "encoder_dim": 1 << 14,
    "memory_dim": 1 << 13, "chunk_size": 1 << 10, "n_action_steps": 1 << 10,
    "num_inference_steps": 256, "head_dim": 1 << 10, "head_blocks": 256,
}  # fmt: skip


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
    config = checkpoint.config
    if config.get("model_type") == MODEL_TYPE:
        return parse_config(config)
    if "model_type" not in config and isinstance(config.get("type"), str):
        what = f"a policy of type {shown(config['type'])}, as LeRobot stores them"
        way_out = f"flashrt.load_policy runs those of type 'act', or model_type {MODEL_TYPE!r}"
    else:
        what = f"model_type is {shown(config.get('model_type'))}, a policy's is {MODEL_TYPE!r}"
        way_out = "language models load with flashrt.load"
    raise CheckpointError(f"{checkpoint.path}: {what}; {way_out}")


def parse_config(config: Mapping[str, object]) -> PolicyConfig:
    """Read a config.json object. Raises CheckpointError listing every problem."""
    problems: list[str] = []
    sizes = {name: _size(config, name, problems) for name in _MOST}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    if config.get("memory") not in MEMORIES:
        problems.append(f"memory is {shown(config.get('memory'))}; supported: {listed(MEMORIES)}")
    if config.get("time_features", TIME_FEATURES) != TIME_FEATURES:
        problems.append(
            f"time_features is {shown(config['time_features'])}; only {TIME_FEATURES} is supported"
        )
    if images := sorted(name for name in config if "image" in name):
        problems.append(
            f"{listed(images)}: observations are vectors; run an image encoder of your own and "
            "give its features as part of the observation"
        )
    fps = config.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= _MOST_FPS:
        problems.append(f"fps is {shown(fps)}, expected ticks per second, up to {_MOST_FPS:,}")
        fps = 1.0
    if problems:
        raise CheckpointError(f"config.json does not fit:{indented(problems)}")
    known = {*_MOST, "model_type", "memory", "time_features", "fps"}
    card = {name: value for name, value in config.items() if name not in known}
    return PolicyConfig(**sizes, fps=float(fps), card=card)


def _size(config: Mapping[str, object], name: str, problems: list[str]) -> int:
    value = config.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST[name]:
        return value
    problems.append(f"{name} is {shown(value)}, expected an integer from 1 to {_MOST[name]:,}")
    return 1
