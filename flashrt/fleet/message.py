"""What a fleet and its workers tell each other. Plain values: they travel between processes.

IS: assignments, what a run wants of all of them, and the events that come back. IS NOT: a capsule's
bytes (capsule.parcel), which travel on their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import FlashrtError
from flashrt.fleet.branch import Branch
from flashrt.session.session import EndReason
from flashrt.session.speculate import Draft
from flashrt.store.manifest import Place


@dataclass(frozen=True, slots=True)
class StoredParcel:
    """A capsule in the fleet's store, in the place of its bytes."""

    digest: str
    position: int
    place: Place
    nbytes: int  # of its objects
    base: str | None = None  # a manifest names all objects: it has no base


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run asks of each of its branches."""

    logprobs: bool = False
    keep: bool = False  # the state at the end
    boundary_every: int = 0  # tokens between boundaries that outlive the worker; 0: none
    draft: Draft = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A branch for a worker: from the capsule at `address`, `branch.start` being no part of it."""

    index: int
    address: str
    branch: Branch


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """A branch is at a boundary, whose parcel waits under `address`. Tokens since its start."""

    index: int
    address: str
    position: int
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A branch is over: by its own end, or by an error. Tokens since its start."""

    index: int
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    reason: EndReason | None
    digest: str | None
    position: int
    seconds: float
    error: FlashrtError | None


@dataclass(frozen=True, slots=True)
class Absent:
    """The worker does not have the capsule that a branch begins at."""

    index: int
    address: str


Event = Passed | Finished | Absent


@dataclass(frozen=True, slots=True)
class Installed:
    """What `install` did: bytes that came, by address; `missing`: a base that is not there."""

    nbytes: dict[str, int]
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker as it is."""

    fingerprint: str
    pid: int
    host: str  # name of its machine
    node: str  # Ray's id of it
    device: str
    n_lanes: int
    n_busy: int  # lanes with a branch
    n_waiting: int  # branches without a lane
    capsules: tuple[str, ...]  # addresses
    n_parcels: int  # that wait to be fetched
    n_branches: int  # that are over
    n_tokens: int  # sampled
