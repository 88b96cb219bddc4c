"""The actor: a worker in a process of its own, as Ray starts it.

IS: loading the engine there, and the calls that a member makes, passed on to the worker. IS NOT:
an actor by itself: it is a plain class, whose methods Ray calls from several threads (member).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashrt.base.errors import FleetError
from flashrt.capsule.parcel import Parcel
from flashrt.fleet.message import WorkerState
from flashrt.fleet.runtime import ray
from flashrt.fleet.worker import Worker
from flashrt.load import load
from flashrt.store.store import Store


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What every worker of a fleet is made of."""

    checkpoint: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of flashrt.load
    store: str | None = None
    threads: int = 0  # of the CPU; 0: as flashrt.load would


class EngineActor:
    """Nothing is loaded before `load`, so that its errors come back as they are."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def load(self, spec: WorkerSpec) -> WorkerState:
        """The engine, and what it is. Raises what `flashrt.load` raises."""
        if spec.threads:
            os.environ["FLASHRT_THREADS"] = str(spec.threads)  # before the flags are read
        store = None if spec.store is None else Store(spec.store)
        engine = load(spec.checkpoint, **spec.options)
        self._worker = Worker(engine, store, ray.get_runtime_context().get_node_id())
        return self._worker.state()

    def call(self, verb: str, *arguments: Any) -> Any:
        """A method of the worker. Parcels among the arguments are here: Ray has fetched them."""
        if self._worker is None:
            raise FleetError("the worker has no engine")
        return getattr(self._worker, verb)(*arguments)

    def fetch(self, address: str, run: str) -> tuple[Parcel | None, int]:
        """As of the worker; two results, so that a caller can wait for the second one alone."""
        fetched: tuple[Parcel | None, int] = self.call("fetch", address, run)
        return fetched
