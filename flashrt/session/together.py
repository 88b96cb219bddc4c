"""Generations of several sessions side by side: lanes that decode share a replay.

IS: which steps of generations can be one replay, in which order tokens are yielded, and what
becomes of the others when one fails. IS NOT: a step itself (session, tail), or a scheduler of
prompts. Tokens, states and capsules are those of each session alone, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

from flashrt.base.errors import FlashrtError, SessionError
from flashrt.capsule.turn import Turn, exclusive
from flashrt.session.session import Generation


def together(*generations: Generation) -> Iterator[tuple[int, int]]:
    """(index, token) of each generation in turn, as one pass over the weights gives them.

        for index, token in flashrt.together(*(fork.generate(64, seed=i) for i, fork in ...)):

    Each is what `Session.generate` returned, of sessions of one engine; each ends by its own stop,
    and its `reason` says why. Steps that are not a plain decode (the first token after a prefill,
    drafting) run alone. A generation that fails ends alone: the others go on, then the first
    failure is raised, with a note of its index. Raises SessionError for sessions of several
    engines, and for two generations of one session.
    """
    replays = _Replays(generations)
    return _turns(generations, replays)


def _turns(generations: Sequence[Generation], replays: _Replays) -> Iterator[tuple[int, int]]:
    live = dict(enumerate(generations))
    failures: list[FlashrtError] = []
    while live:
        replays.run(list(live.values()))
        for index, generation in list(live.items()):
            try:
                token = next(generation)
            except StopIteration:
                del live[index]
            except FlashrtError as error:
                error.add_note(f"in generation {index} of together(); the others went on")
                failures.append(error)
                del live[index]
            else:
                yield index, token
    if failures:
        raise failures[0]


class _Replays:
    """Shared replays of some generations."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        sessions = [generation.session for generation in generations]
        for session in sessions:
            if session.is_closed:
                raise SessionError(
                    "together: a session is closed; open another with engine.session()"
                )
        if len({id(session.engine) for session in sessions}) > 1:
            raise SessionError("together: the sessions are of several engines; a replay has one")
        if len({id(session) for session in sessions}) < len(sessions):
            raise SessionError("together: two generations are of one session; fork it first")
        self._ordered = sorted(sessions, key=lambda session: session.lane.index)
        self.lock = _Locks([session.lock for session in self._ordered])
        if sessions:
            self.turn: Turn = sessions[0].turn
            self._engine = sessions[0].engine

    def run(self, live: Sequence[Generation]) -> None:
        """The next step of all that only decode, as many at once as a replay holds."""
        if len(live) > 1:
            self._run(live)

    @exclusive
    def _run(self, live: Sequence[Generation]) -> None:
        engine = self._engine
        due = []
        for generation in live:
            token = generation.session.fed_next(generation.draft) if generation.left else None
            if token is not None:
                due.append((generation, token))
        most = engine.most_together
        for first in range(0, len(due), most):
            group = due[first : first + most]
            if len(group) < 2:
                return  # its own step does that
            for generation, _ in group:
                engine.set_sampler(generation.session.lane, generation.params)
            lanes = [generation.session.lane for generation, _ in group]
            following = engine.decode_together(lanes, [token for _, token in group])
            for (generation, _), token in zip(group, following, strict=True):
                generation.session.fed(generation.params, token)


class _Locks:
    """Several locks as one. Always taken in the order of lanes: two threads cannot wait for each
    other.
    """

    def __init__(self, locks: Sequence[contextlib.AbstractContextManager[object]]) -> None:
        self._locks = locks
        self._held: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            self._held.append(stack.pop_all())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.pop().close()
