"""Admission: whether a request can be carried out at all, and from which lane its way is shortest.

IS: the check of an ask before it waits; the choice among free lanes, and the move to the deepest
boundary of the prompt that is known. IS NOT: who is next (queue), or room in it (scheduler).
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, SessionError
from flashrt.base.tracing import PLAN, trace
from flashrt.capsule.lineage import segment_layout
from flashrt.engine.tokens import as_tokens
from flashrt.ops.sample import SamplerParams
from flashrt.serve.ask import Ask
from flashrt.serve.prefix import Entry, PrefixIndex
from flashrt.serve.work import Asked, Limits, Worker
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.store.opening import restore_nbytes
from flashrt.store.reuse import Action, Boundary, Decision, Live, Rates, decide

_OPTIONS = frozenset(inspect.signature(Session.generate).parameters) - {
    "self", "max_tokens", "stop",
}  # fmt: skip
_NO_TOKENS = np.empty(0, np.int32)
_PARAMS = frozenset(SamplerParams.__dataclass_fields__)


class Admission:
    """Of one engine. `checked` is for any thread, `placed` for the scheduler's."""

    def __init__(
        self, engine: SessionEngine, index: PrefixIndex, limits: Limits, rates: Rates
    ) -> None:
        self._engine, self._index, self._limits, self._rates = engine, index, limits, rates

    def checked(self, ask: Ask) -> NDArray[np.int32]:
        """The prompt. Raises SessionError for what cannot be carried out, whatever comes, and
        ImageError for words of images that are not in memory.
        """
        engine = self._engine
        tokens = engine.checked_tokens(ask.tokens, _NO_TOKENS)
        if not len(tokens):
            raise SessionError("the prompt is empty; give at least one token")
        if len(tokens) + (ask.max_tokens > 0) > engine.max_positions:
            raise SessionError(
                f"the prompt has {len(tokens):,} tokens; a lane holds {engine.max_positions:,}, "
                "with the reply; shorten it, or serve with a larger --max-positions"
            )
        if not 1 <= ask.n <= self._limits.most_choices:
            raise SessionError(f"n={ask.n} is not in [1, {self._limits.most_choices}]")
        if ask.max_tokens < 0:
            raise SessionError(f"max_tokens={ask.max_tokens} is negative")
        if ask.logprobs is not None and not 0 <= ask.logprobs <= engine.vocab_size:
            raise SessionError(f"logprobs={ask.logprobs} is not in [0, {engine.vocab_size}]")
        if any(not 0 <= p <= len(tokens) for p in ask.turn_starts):
            raise SessionError(f"turn_starts: a position is not in [0, {len(tokens)}]")
        as_tokens(ask.stop_tokens, engine.vocab_size)
        if unknown := sorted(set(ask.sampling) - _OPTIONS):
            raise SessionError(
                f"sampling: {', '.join(unknown)}: Session.generate has no such option"
            )
        for index in range(ask.n):
            given = {k: v for k, v in sampling_of(ask, index).items() if k in _PARAMS}
            if (bias := given.get("logit_bias")) is not None:
                as_tokens(bias.keys(), engine.vocab_size)
                given["logit_bias"] = tuple(bias.items())
            SamplerParams(**given)
        return tokens

    def placed(self, asked: Asked, free: list[Worker]) -> tuple[Worker, Decision]:
        """The free lane from which the prompt is nearest, gone there."""
        tokens, index = asked.tokens, self._index
        entries = index.find(asked.owner, tokens)
        while True:
            best: tuple[float, float, Worker, Decision] | None = None
            for worker in sorted(free, key=lambda w: w.used):
                decision = self._decision(worker, asked, entries)
                if best is None or decision.estimate_us < best[0]:
                    best = decision.estimate_us, worker.used, worker, decision
            assert best is not None
            _, _, worker, decision = best
            session = worker.session
            if decision.action is Action.COLD:
                session.rollback(0)
            elif decision.action is Action.ROLLBACK:
                session.rollback(decision.position)
            elif decision.action is Action.RESTORE:
                assert decision.boundary is not None
                entry = decision.boundary.key
                assert isinstance(entry, Entry)
                try:
                    session.restore(index.need(entry, tokens))
                except CapsuleError as error:
                    trace(PLAN, f"passed over a boundary at {entry.position}: {error}")
                    entries.remove(entry)
                    continue
            return worker, decision

    def _decision(self, worker: Worker, asked: Asked, entries: list[Entry]) -> Decision:
        lane, table = worker.session.lane, self._engine.capsules
        live = None
        if worker.owner == asked.owner:
            boundaries = [w.position for w in lane.waypoints if w.position]
            live = Live(worker.session.tokens, boundaries)
        rows = self._engine.arena.plan.lanes[lane.index].rows
        known = []
        for entry in entries:
            if entry.capsule is not None:
                nbytes, tier = restore_nbytes(lane, entry.capsule), entry.capsule.tier
            else:
                nbytes = table.fixed_nbytes + segment_layout(rows, 0, entry.position)[1]
                tier = "disk"
            known.append(Boundary(entry.position, nbytes, tier, entry))
        return decide(asked.tokens, known, live, table.fixed_nbytes, self._rates)


def sampling_of(ask: Ask, index: int) -> dict[str, Any]:
    """Options of `generate` for one of the choices: each has a seed of its own."""
    return {**ask.sampling, "seed": (ask.sampling.get("seed", 0) + index) % (1 << 64)}
