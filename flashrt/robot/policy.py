"""What a control loop asks of a policy: verbs on lanes, as a protocol.

IS: the verbs, the sizes and the cursor that a loop needs: flashrt's ActionEngine has them, and so
may a policy of your own, with the verbs on several lanes or without. IS NOT: the loop, nor when it
plans (schedule).

Every verb is a graph boundary: whole, or not begun. Observations and actions are float32, in the
environment's units. The loop checks observations at its own door, hence the `_trusted` verbs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.capsule.turn import Turn
from flashrt.engine.numbers import Given

Array = NDArray[np.float32]
# As a loop is given it: a vector, or its parts by name.
Observation = ArrayLike | Mapping[str, ArrayLike]


class PolicyShape(Protocol):
    """Sizes that a loop needs."""

    @property
    def observation_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def chunk_size(self) -> int:
        """Actions of a chunk."""
        ...

    @property
    def n_action_steps(self) -> int:
        """Of which are executed before the next chunk takes over, beyond those committed."""
        ...

    @property
    def num_inference_steps(self) -> int:
        """Euler steps of a chunk."""
        ...


class Cursor(Protocol):
    """What decides when to plan; see ops.cursor."""

    @property
    def tick(self) -> int:
        """Actions taken since the reset; the number of the tick to come."""
        ...

    @property
    def observed(self) -> int:
        """Tick of the last observation; -1: none since the reset or since an interrupt."""
        ...

    @property
    def stop(self) -> int:
        """The first tick that no action is promised for."""
        ...

    @property
    def seed(self) -> int:
        """Of the noise of chunks, with the tick."""
        ...

    @property
    def plan_steps_left(self) -> int:
        """Euler steps until the chunk in the making is done; 0: none is in the making."""
        ...


class Policy(Protocol):
    """Verbs on lanes."""

    @property
    def config(self) -> PolicyShape: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def turn(self) -> Turn:
        """Whoever changes a lane has it; `Turn(lambda created: None)` for a policy without books
        of capsules.
        """
        ...

    def check_open(self) -> None:
        """Raises SessionError once the policy is closed."""
        ...

    def take_lane(self, owner: object) -> Lane:
        """A free lane in any state, until it is released or its owner is no more; the policy may
        hold the owner weakly only. Raises LaneBusy.
        """
        ...

    def release_from(self, lane: Lane, owner: object) -> None:
        """Take the lane back, if it is still the owner's."""
        ...

    def reset(self, lane: Lane, seed: int) -> None:
        """Tick 0, nothing remembered, nothing promised."""
        ...

    def set_seed(self, lane: Lane, seed: int) -> None:
        """The noise of chunks from here on."""
        ...

    def cursor(self, lane: Lane) -> Cursor:
        """Where the lane is; asked for a few times per tick, so the host had better know it."""
        ...

    def observe_trusted(self, lane: Lane, observation: Array) -> None:
        """Take in the coming tick's observation [observation_dim], which the loop has checked."""
        ...

    def act(self, lane: Lane) -> Array:
        """The coming tick's action [action_dim], as promised."""
        ...

    def action(self, lane: Lane) -> Array:
        """The action executed last [action_dim]."""
        ...

    def tick_trusted(self, lane: Lane, observation: Array) -> Array:
        """observe_trusted and act in one replay."""
        ...

    def plan(self, lane: Lane, committed: int = 0) -> None:
        """Put a chunk from the last observation into force; its first rows as promised before."""
        ...

    def begin_plan(self, lane: Lane, committed: int) -> None:
        """The same in slices, to the same bits: num_inference_steps of `continue_plan` follow."""
        ...

    def continue_plan(self, lane: Lane) -> bool:
        """One Euler step; True when it was the last, and the chunk is in force."""
        ...

    def cut(self, lane: Lane, stop: int) -> None:
        """Nothing is promised from tick `stop` on, and what was seen so far is not planned from."""
        ...

    def override(self, lane: Lane, action: ArrayLike) -> None:
        """Something else than the last action was executed. Raises ObservationError."""
        ...

    def snapshot(self, lane: Lane, name: str | None = None) -> Capsule:
        """Raises PoolFull."""
        ...

    def keep_boundary(self, lane: Lane) -> Capsule:
        """A snapshot that is dropped with the lane's release. Raises PoolFull."""
        ...

    def kept_boundaries(self, lane: Lane) -> tuple[Capsule, ...]:
        """Those of the lane that were kept and not dropped, the oldest first."""
        ...

    def check_capsule(self, capsule: Capsule) -> None:
        """Raises CapsuleError unless the capsule can be restored here."""
        ...

    def restore(self, lane: Lane, capsule: Capsule) -> None:
        """Raises CapsuleError, and nothing has changed then."""
        ...

    def fork(self, source: Lane, target: Lane) -> None: ...
    def digest(self, lane: Lane) -> str: ...
    def stats(self) -> Mapping[str, Any]: ...


@runtime_checkable
class SharedVerbs(Protocol):
    """Verbs on several lanes at once, to the bits of each alone: a policy may have them, or not.

    No lane is named twice. An action that is not finite is returned as it is: its loop refuses it,
    and what goes wrong in one lane is not the others'.
    """

    def observe_together_trusted(
        self, lanes: Sequence[Lane], observations: Sequence[Array]
    ) -> None: ...
    def act_together(self, lanes: Sequence[Lane]) -> list[Array]: ...
    def tick_together_trusted(
        self, lanes: Sequence[Lane], observations: Sequence[Array]
    ) -> list[Array]: ...
    def plan_together(self, lanes: Sequence[Lane], committed: int) -> None:
        """The same number of rows of each."""
        ...

    def begin_plan_together(self, lanes: Sequence[Lane], committed: Sequence[int]) -> None: ...
    def continue_plan_together(self, lanes: Sequence[Lane]) -> bool:
        """Of lanes that have the same number of Euler steps left."""
        ...


@runtime_checkable
class NamedVerbs(Protocol):
    """Verbs of a policy that knows the parts of its observations: it may have them, or not."""

    def observation_names(self) -> tuple[str, ...]:
        """Of the parts; none where an observation is a vector alone."""
        ...

    def pack(self, observation: Mapping[str, ArrayLike]) -> Array:
        """Parts by name as the vector [observation_dim]. Raises ObservationError."""
        ...

    def chunk(self, lane: Lane) -> Array:
        """All actions of the chunk in force, [chunk_size, action_dim]."""
        ...

    def is_last_observation_used(self, lane: Lane) -> bool:
        """Whether the lane's state depends on what it observed last. Where it does not, a loop does
        not keep the observation, and runs the tick again with one of no numbers.
        """
        ...


@runtime_checkable
class TakingVerbs(Protocol):
    """A policy may keep observations in a form of its own: from one door on, they are in that."""

    def taken(self, observation: Array) -> Array:
        """Of a vector that was checked. Raises ObservationError."""
        ...


@runtime_checkable
class GuidedVerbs(Protocol):
    """Verbs of a policy whose plans start from more than observations: it may have them, or not."""

    def checked_given(self, given: Given) -> Given:
        """Raises ObservationError for what does not fit."""
        ...

    def plan(self, lane: Lane, committed: int = 0, *, given: Given | None = None) -> None: ...


class SharingPolicy(SharedVerbs, Policy, Protocol):
    """A policy that has them."""

    @property
    def most_together(self) -> int:
        """Lanes that these verbs take."""
        ...


def sharing(policy: Policy) -> SharingPolicy | None:
    """The policy, if its class has the shared verbs."""
    return cast(SharingPolicy, policy) if _has_shared_verbs(type(policy)) else None


@functools.cache
def _has_shared_verbs(kind: type) -> bool:
    return issubclass(kind, SharedVerbs)


def packing(policy: Policy) -> Callable[[Mapping[str, Any]], Array] | None:
    """What makes a vector of an observation by names, if the policy's observations have names."""
    named = naming(policy)
    return named.pack if named is not None and named.observation_names() else None


def naming(policy: Policy) -> NamedVerbs | None:
    """The policy, if its class has the verbs on parts of observations."""
    return cast(NamedVerbs, policy) if _has_named_verbs(type(policy)) else None


def taking(policy: Policy) -> Callable[[Array], Array] | None:
    """What a policy makes of a vector, if its class has that verb."""
    return cast(TakingVerbs, policy).taken if _has_taking_verbs(type(policy)) else None


def guiding(policy: Policy) -> GuidedVerbs | None:
    """The policy, if its class has the verbs of plans that start from something given."""
    return cast(GuidedVerbs, policy) if _has_guided_verbs(type(policy)) else None


@functools.cache
def _has_guided_verbs(kind: type) -> bool:
    return issubclass(kind, GuidedVerbs)


@functools.cache
def _has_taking_verbs(kind: type) -> bool:
    return issubclass(kind, TakingVerbs)


@functools.cache
def _has_named_verbs(kind: type) -> bool:
    return issubclass(kind, NamedVerbs)
