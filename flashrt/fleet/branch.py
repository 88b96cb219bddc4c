"""What goes into a fleet and what comes out of it: trunks, branches, rollouts.

IS: the nouns that a caller sees. IS NOT: how they travel (message), or where they run (placement).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import FlashrtError
from flashrt.session.session import EndReason


@dataclass(slots=True, eq=False, weakref_slot=True)
class Trunk:
    """A state that branches begin at. Made by `Fleet.trunk`, or the end of a rollout.

    Its bytes lie in Ray's object store or in a store for as long as somebody refers to the trunk.
    """

    address: str  # the digest of its state: equal states are one trunk
    position: int  # committed tokens
    nbytes: int  # that travel to a worker that has its base
    parcel: Any = field(repr=False)  # Ray's reference to them
    base: Trunk | None = field(default=None, repr=False)  # the trunk that it is packed against

    @property
    def lineage(self) -> list[Trunk]:
        """The trunks whose bytes make up this state, oldest first, itself last."""
        return [*(self.base.lineage if self.base is not None else ()), self]


@dataclass(frozen=True, slots=True)
class Branch:
    """One continuation of a trunk. Sampling is as in `Session.generate`: a token is a function of
    the state, these parameters, and its position. A wrong value is that branch's error.

    suffix: tokens that are committed after the trunk, before the first is sampled. start: another
    trunk than that of the call, for a search that branches from many nodes.
    """

    seed: int = 0
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: Sequence[int] = ()
    suffix: Sequence[int] = ()
    start: Trunk | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """What became of a branch. `error`: why it ended before its time; the fleet goes on."""

    index: int  # of the branch, in the order given
    branch: Branch
    tokens: NDArray[np.int32]  # that were sampled, without the suffix
    logprobs: NDArray[np.float64] | None  # of each token, at temperature 1, if asked for
    reason: EndReason | None  # as of a Generation
    digest: str | None  # of the state at its end, 32 hex digits; None with an error
    error: FlashrtError | None
    end: Trunk | None  # that state, if it was to be kept
    worker: int
    losses: int  # workers that died with it
    resumed: int  # tokens that it had at its last boundary before the last loss
    seconds: float  # from its last start on a lane to its end


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a call of `rollouts` stands. `total`: None while the branches are not counted."""

    done: int  # results that were handed out
    failed: int  # of those, with an error
    total: int | None
    in_flight: int  # branches that were sent, and results that were not handed out
    n_tokens: int  # sampled for those that are done
    losses: int  # workers that died meanwhile
    workers: int  # that are up
