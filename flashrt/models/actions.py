"""What an engine on actions asks of a policy's model: phases, sizes, and which regions are what.

IS: the phases that verbs replay, and the protocol. IS NOT: a family (flow_policy, act), nor the
choice of one (policies).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flashrt.models.model import Model
from flashrt.models.scaling import Scaling

OBSERVE, ACT_PHASE, TICK, PLAN = "observe", "act", "tick", "plan"
PLAN_BEGIN, PLAN_STEP = "plan_begin", "plan_step"  # a plan in slices; PLAN_STEP has a tape per step

# The same of several lanes, in one replay.
OBSERVE_EACH, ACT_EACH, TICK_EACH, PLAN_EACH = "observe_each", "act_each", "tick_each", "plan_each"
PLAN_BEGIN_EACH, PLAN_STEP_EACH = "plan_begin_each", "plan_step_each"
SHARED = {
    OBSERVE_EACH: OBSERVE, ACT_EACH: ACT_PHASE, TICK_EACH: TICK, PLAN_EACH: PLAN,
    PLAN_BEGIN_EACH: PLAN_BEGIN, PLAN_STEP_EACH: PLAN_STEP,
}  # fmt: skip


# Sizes of the stacks of layers in a policy, by their names: for people. Sizes are called as in the
# configs of the Hugging Face hub.
Stacks = Mapping[str, Mapping[str, int | str]]


class ActionConfig(Protocol):
    """Sizes of a policy; see robot.policy.PolicyShape."""

    @property
    def observation_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...
    @property
    def num_inference_steps(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Input:
    """An IO region and the numbers of an observation, [start, stop), that it takes."""

    region: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an observation by its name, and where its numbers, [start, stop), are.

    `shape`: of a vector (n,), of an image (H, W, 3), channels last.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


def parts_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[Part, ...]:
    """Parts of these names and shapes, one after the other."""
    parts, at = [], 0
    for name, shape in shapes:
        parts.append(Part(name, at, at + math.prod(shape), shape))
        at = parts[-1].stop
    return tuple(parts)


class ActionModel(Model, Protocol):
    """A model of actions: regions `cursor`, `previous`, `action` and `queue` [H, A], of actions as
    the model has them, and weights `stats.action.scale` and `.offset`, that make them the
    environment's.
    """

    @property
    def config(self) -> Any:
        """An ActionConfig, and what else a family has."""
        ...

    @property
    def inputs(self) -> tuple[Input, ...]: ...
    @property
    def parts(self) -> tuple[Part, ...]:
        """Of an observation that is given by names; none where it is a vector alone."""
        ...

    @property
    def has_memory(self) -> bool:
        """Whether every observation counts; else one does that a plan is made from, and is kept by
        the host until then.
        """
        ...

    @property
    def action_limit(self) -> float:
        """Of actions as the model has them, in absolute value."""
        ...

    @property
    def finite(self) -> tuple[str, ...]:
        """Regions of a lane that hold numbers which no loop leaves infinite or NaN."""
        ...

    @property
    def cut_off(self) -> tuple[str, ...]:
        """Regions of a lane, float32, that an interrupt sets to 0: what later chunks would take
        over from earlier ones.
        """
        ...

    @property
    def positive(self) -> tuple[str, ...]:
        """Statistics that must be, as they are divided by."""
        ...

    @property
    def scaling(self) -> Scaling | None:
        """By processor files; None where statistics are among the tensors."""
        ...

    @property
    def stacks(self) -> Stacks: ...
