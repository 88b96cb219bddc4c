"""The core of serving: an engine, what is known of prompts, and the thread that serves.

IS: putting the parts together; the verbs for whoever speaks to clients. IS NOT: text or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.serve.ask import Ask, Ticket
from flashrt.serve.meters import Meters
from flashrt.serve.prefix import Kept, PrefixIndex
from flashrt.serve.scheduler import Ends, LaneStatus, Limits, Scheduler
from flashrt.session.engine import SessionEngine
from flashrt.store.reuse import Rates
from flashrt.store.store import Store


@dataclass(frozen=True, slots=True)
class Status:
    """The server at one moment."""

    lanes: tuple[LaneStatus, ...]
    queued: Mapping[str, int]  # by owner's key
    meters: Meters
    capsules: Mapping[str, tuple[int, int]]  # tier -> entries, bytes of their own
    evictions: Mapping[str, int]  # by where they went
    pool_nbytes: int
    pool_used_nbytes: int


class Core:
    """Serves requests on all free lanes of an engine, from `start` to `close`."""

    def __init__(
        self,
        engine: SessionEngine,
        store: Store | None = None,
        *,
        limits: Limits | None = None,
        kept: Kept | None = None,
    ) -> None:
        """The engine stays the caller's: close it after `close`."""
        self.engine, self.store = engine, store
        self.index = PrefixIndex(engine, store, kept)
        rates = store.rates if store is not None else Rates()
        self.scheduler = Scheduler(engine, self.index, limits or Limits(), Ends(), rates)

    def start(self) -> Core:
        """Begin to serve."""
        self.scheduler.start()
        return self

    def submit(self, ask: Ask) -> Ticket:
        """See Scheduler.submit."""
        return self.scheduler.submit(ask)

    def close(self, *, drain: bool = True) -> None:
        """See Scheduler.close."""
        self.scheduler.close(drain=drain)
