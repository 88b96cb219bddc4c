"""Sessions: one live sequence with prefill, generate, snapshot, restore, fork and rollback.

IS: validation and policy over an engine's verbs; the public face of a lane. IS NOT: kernels, copies
or file formats.

A token that `generate` yields is history at once, but fed to the model only when something needs
the state after it (`tail`): the last token of a turn costs nothing until it is built upon.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from flashrt.base.checks import shown
from flashrt.base.errors import CapsuleError, GrammarError, PoolFull, SessionError
from flashrt.base.locks import reentrant_lock
from flashrt.base.tracing import PLAN, trace
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane, Waypoint
from flashrt.capsule.turn import exclusive
from flashrt.engine.tokens import TokenEngine, as_tokens
from flashrt.ops.sample import SamplerParams
from flashrt.session import waypoints
from flashrt.session.choice import Choice
from flashrt.session.speculate import Draft, DraftLength
from flashrt.session.tail import Due, Tail
from flashrt.text.grammar import Grammar

WHOLE = ("fixed", "rows")
RESTORE_BANDS = (WHOLE, ("rows",))
_NO_TOKENS = np.empty(0, np.int32)


EndReason = Literal["stop", "length", "context"]


class Generation(Iterator[int]):
    """Tokens as they are sampled. Made by `Session.generate`; nothing runs before the first."""

    def __init__(
        self, session: Session, choice: Choice, draft: DraftLength, max_tokens: int,
        steps: Generator[int, None, EndReason],
    ) -> None:  # fmt: skip
        self.session, self.choice, self.draft = session, choice, draft
        self.turn, self.lock = session.turn, session.lock
        self.left = max_tokens  # tokens that it may still yield
        self._steps = steps
        self._reason: EndReason | None = None

    @property
    def params(self) -> SamplerParams:
        """What the next token is sampled by."""
        return self.choice.params

    def due(self) -> Due | None:
        """What its next step will do on the device, if lanes can share it."""
        try:
            is_over = not self.left or self.choice.is_over()
        except GrammarError:
            return None  # its own step raises that
        return None if is_over else self.session.due(self.params, self.draft, self.left)

    @property
    def reason(self) -> EndReason | None:
        """Why it ended: "stop" (a stop token came next, or the grammar is complete), "length"
        (max_tokens) or "context" (the lane is full). None while it runs, and when it was closed or
        failed.
        """
        return self._reason

    @exclusive
    def __next__(self) -> int:
        left, self.left = self.left, 0
        try:
            token = next(self._steps)
        except StopIteration as end:
            if end.value is not None:
                self._reason = end.value
            raise StopIteration from None
        self.left = 0 if self.choice.is_stopped else left - 1
        return token

    @exclusive
    def close(self) -> None:
        """End it here; what was yielded is history."""
        self.left = 0
        self._steps.close()


class Session:
    """One sequence on one lane. Made by `engine.session()`. Threads take turns, see
    capsule.turn; what two of them do to one session comes in any order.
    """

    def __init__(
        self, engine: TokenEngine, begin: Callable[[Lane], object], parent: Capsule | None = None
    ) -> None:
        """On a free lane of its own, which `begin` puts into the state to begin with; `parent`: the
        capsule that this state descends from. Raises LaneBusy.
        """
        self.turn = engine.turn  # the engine's: calls of several threads take turns
        self._engine = engine
        self._table = engine.capsules
        self._parent = parent
        self._epoch = 0  # counts changes from outside a generator
        self._kept: tuple[int, ...] = ()  # positions of waypoints that somebody asked for
        self._closed_with: NDArray[np.int32] | None = None  # its tokens, once it is closed
        self.lock = reentrant_lock()  # held through a call, kernels included
        self._lane = engine.take_lane(self)
        try:
            begin(self._lane)
            self._tail = Tail(engine, self._lane, self._place_waypoint)
            self._adaptive = DraftLength("auto" if engine.max_draft else 0, engine.max_draft)
        except BaseException:
            engine.release(self._lane)
            raise

    # -- what it is -----------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Number of committed tokens, the position of the next; as it was once it is closed."""
        if self._closed_with is not None:
            return len(self._closed_with)
        self._catch_up()
        owed = self._lane.owed
        return self._tail.end if owed is None else len(owed)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """All committed tokens, int32 [position]; as they were once it is closed."""
        if self._closed_with is not None:
            return self._closed_with.copy()
        self._catch_up()
        if self._lane.owed is not None:
            return self._lane.tokens
        committed = self._lane.tokens[: self._tail.end]
        return np.append(committed, np.array(self._tail.pending, np.int32))

    @property
    def engine(self) -> TokenEngine:
        """Whose lane it has."""
        return self._engine

    @property
    def lane(self) -> Lane:
        """Where the session lives: its rows, waypoints and boundary. Not to be changed."""
        return self._lane

    @property
    def is_closed(self) -> bool:
        """Whether the lane was given back."""
        return self._closed_with is not None

    @exclusive
    def digest(self) -> str:
        """128-bit value of the live state, as 32 hex digits; equal states, equal digests."""
        self._settle()
        return self._table.digest_lane(self._lane)

    @exclusive
    def logits(self) -> NDArray[np.float32]:
        """Logits of the next position, float32 [vocab_size].

        Raises SessionError while nothing is committed.
        """
        self._check_open()
        if self.position == 0:
            raise SessionError("logits: the session is empty; prefill at least one token first")
        logits = self._tail.logits(self.position)
        if logits is None:
            self._tail.sample()
            logits = self._engine.logits(self._lane)
        return logits

    @exclusive
    def logprobs(self, top: int = 0) -> tuple[float, list[tuple[int, float]]]:
        """Log of the probability, at temperature 1 and without grammar, filters, bias or penalties,
        of the token that `generate` yielded last; and the `top` likeliest tokens with theirs, by
        descending probability, then by id.

        To be asked between tokens of `generate`: raises SessionError once something else ran.
        """
        self._check_open()
        last = self._tail.last
        logits = None if last is None else self._tail.logits(self.position - 1)
        if last is None or logits is None:
            raise SessionError("logprobs: ask right after generate has yielded a token")
        wide = logits.astype(np.float64)
        logs = wide - wide.max()
        logs -= np.log(np.exp(logs).sum())
        best = _largest(logs, min(top, len(logs)))
        return float(logs[last]), [(int(i), float(logs[i])) for i in best]

    # -- going on -------------------------------------------------------------------------------

    @exclusive
    def prefill(self, tokens: Iterable[int] | NDArray[np.integer]) -> None:
        """Append tokens and commit them.

        Raises TokenError for ids outside [0, vocab_size), SessionError when they do not fit; the
        state is unchanged then. Where the model sees, tokens of `engine.image(...)` may be among
        them, as long as the image is in memory: ImageError is raised otherwise.
        """
        array = self._checked(tokens)
        self._check_room(len(array), "prefill")
        if len(array):
            pending = self._tail.take_pending()
            self._feed(np.concatenate([pending, array]) if len(pending) else array)

    @exclusive
    def generate(
        self,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Iterable[int] = (),
        draft: Draft = 0,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Sample up to `max_tokens` tokens; each is history when it is yielded.

        temperature 0 is greedy. A token is a function of the logits, these parameters, the tokens
        before it and its position; penalties count all committed tokens. draft: how many tokens to
        guess and verify at once, or "auto"; it changes the speed and nothing else. A token in
        `stop` ends generation and is not committed; so does the end of the context. grammar: what
        the text of the tokens may be; a token of `stop` comes only where it may end, and where it
        must, generation ends. It begins at the present position, or see `Grammar.after`; nothing is
        drafted then, which changes the speed alone. Closing the
        iterator early leaves exactly what was yielded; its `reason` says why it ended. Raises
        SessionError for bad parameters, an empty session, a lane that is full already, or if the
        session is changed by other calls meanwhile; GrammarError for a grammar that cannot be used.
        """
        bias = _checked_bias(logit_bias, self._engine.vocab_size)
        params = SamplerParams(
            temperature, top_k, top_p, min_p, seed,
            repetition_penalty, presence_penalty, frequency_penalty, bias,
        )  # fmt: skip
        length = DraftLength(draft, self._engine.max_draft)
        if max_tokens < 0:
            raise SessionError(f"generate: max_tokens={max_tokens} is negative")
        stops = frozenset(as_tokens(stop, self._engine.vocab_size).tolist())
        self._check_open()
        if self.position == 0:
            raise SessionError("generate: the session is empty; prefill at least one token first")
        if draft == "auto":
            length = self._adaptive
        choice = Choice(params)
        if grammar is not None:  # a mask is known one token ahead: there is nothing to draft
            choice = Choice(params, self._engine.grammars.begin(grammar, stops))
            length = DraftLength(0, self._engine.max_draft)
        if max_tokens:
            self._check_room(1, "generate")
        steps = self._generate(max_tokens, choice, stops, length)
        return Generation(self, choice, length, max_tokens, steps)

    def due(self, params: SamplerParams, draft: DraftLength, wanted: int) -> Due | None:
        """What the next step of `generate` will do on the device, if lanes can share it."""
        lane = self._lane
        is_ready = self._closed_with is None and lane.is_trusted
        if not is_ready or self._engine.is_in_flight(lane):
            return None
        end = self._tail.end
        if end >= self._engine.max_positions or end < lane.position:
            return None
        return self._tail.due(params, draft, wanted)

    def piece(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """What is to be fed for a piece of a prompt: pending tokens, then the piece. Raises what
        `prefill` raises.
        """
        array = self._checked(tokens)
        self._check_room(len(array), "step")
        return np.append(self._tail.take_pending(), array)

    def fed(self, params: SamplerParams | None, following: int) -> None:
        """A piece was committed in a replay that lanes shared; `following` was sampled after it, to
        be believed if there are parameters.
        """
        self._epoch += 1
        if params is None:
            self._tail.clear()
            self._place_waypoint()
        else:
            self._tail.fed(params, following)

    @property
    def tail(self) -> Tail:
        """What it knows beyond its lane's boundary; for those who feed several lanes at once."""
        return self._tail

    def _generate(
        self, max_tokens: int, choice: Choice, stops: frozenset[int], draft: DraftLength
    ) -> Generator[int, None, EndReason]:
        epoch = self._epoch
        for wanted in range(max_tokens, 0, -1):
            if self._epoch != epoch:
                raise SessionError("generate: the session was changed meanwhile; start another one")
            self._check_open()
            if choice.is_over():
                return "stop"
            if self._tail.end >= self._engine.max_positions:
                return "context"
            token = self._tail.next(choice.params, draft, wanted, stops)
            if token < 0:
                raise SessionError(
                    f"generate: the logits at position {self.position} hold NaN, or leave no token"
                )
            if token in stops:
                return "stop"
            choice.take(token)
            self._tail.take()
            yield token
        return "stop" if choice.is_stopped else "length"

    # -- capsules -------------------------------------------------------------------------------

    @exclusive
    def snapshot(self, name: str | None = None) -> Capsule:
        """Freeze the present state. Raises PoolFull, changing nothing, when there is no room."""
        self._settle()
        lane, parent = self._lane, self._parent
        try:
            made = self._table.snapshot_within(lane, name, parent)
        except PoolFull:
            made = self._engine.with_room(lambda: self._table.snapshot(lane, name, parent))
        self._parent = made
        return made

    @exclusive
    def restore(self, capsule: Capsule, bands: tuple[str, ...] = WHOLE) -> None:
        """Continue from a capsule.

        `bands=("rows",)` is for ablation only: it brings back rows and cursor but leaves recurrent
        state, convolution window and last hidden as they are, which is what a cache of keys and
        values alone would do. Raises CapsuleError for a foreign or dropped capsule or one beyond
        max_positions; the session is unchanged then.
        """
        if self._closed_with is not None or self._engine.is_closed:
            self._check_not_closed()  # in doubt or not: what was there before is not needed
        if not isinstance(capsule, Capsule):
            _check_type(capsule)
        moves = None
        if bands is not WHOLE and bands != WHOLE:
            if bands not in RESTORE_BANDS:
                raise CapsuleError(f"restore: bands={bands}; choose one of {RESTORE_BANDS}")
            cursor = self._engine.arena.lane(0).fixed.slot("cursor")
            moves = self._table.moves_to_restore_rows(self._lane, capsule, cursor)
        self._table.restore_within(self._lane, capsule, moves)
        self._lane.owed = None
        self._parent = capsule
        self._epoch += 1

    @overload
    def fork(self, capsule: Capsule | None = None) -> Session: ...
    @overload
    def fork(self, capsule: int) -> list[Session]: ...
    def fork(self, capsule: Capsule | int | None = None) -> Session | list[Session]:
        """Another session, on a free lane, in this one's present state or in a capsule's; or as
        many as a number says, all in this one's present state.

        Raises LaneBusy when so many lanes are not free; none is taken then.
        """
        return self._forks(capsule) if isinstance(capsule, int) else self._fork(capsule)

    @exclusive
    def _fork(self, capsule: Capsule | None = None) -> Session:
        self._check_open()
        if capsule is not None:
            _check_type(capsule)
            self._table.check(capsule)
        else:
            self._settle()
        if capsule is not None:
            source = capsule
            return Session(self._engine, lambda lane: self._table.restore(lane, source), capsule)
        made = Session(self._engine, lambda lane: self._table.fork(self._lane, lane), self._parent)
        made._take_along(self)
        return made

    @exclusive
    def _forks(self, n: int) -> list[Session]:
        if n < 0:
            raise SessionError(f"fork: n={n} is negative")
        forks: list[Session] = []
        try:
            while len(forks) < n:
                forks.append(self._fork())
        except BaseException:
            for fork in forks:
                fork.close()
            raise
        return forks

    @exclusive
    def rollback(self, position: int) -> None:
        """Back to any earlier position: the nearest boundary below it, then the journal.

        The state is the one that the session had there, to the bit. A capsule that cannot be read
        is passed over for an older boundary; FLASHRT_DEBUG=1 says so. Raises SessionError when
        `position` is not in [0, self.position].
        """
        self._check_open()
        target = operator.index(position)
        if not 0 <= target <= self.position:
            raise SessionError(f"rollback: position {target} is not in [0, {self.position}]")
        if target == self.position:
            self._settle()
            return
        if target >= self._lane.position:
            self._epoch += 1
            self._tail.cut(target)
            return
        self._go_back(target)

    @exclusive
    def keep_waypoint(self) -> None:
        """Keep the present boundary: a rollback to it replays nothing.

        The last 16 that were asked for stay, and the last two go along with a fork. Where the pool
        has no room, this session's other waypoints give way, oldest first; without any, nothing is
        kept: only speed is lost.
        """
        self._settle()
        lane, position = self._lane, self._lane.position
        if not position:
            return
        while not lane.waypoints or lane.waypoints[-1].position < position:
            try:
                self._table.keep_waypoint(lane)
            except PoolFull:
                others = [w for w in lane.waypoints if w.position not in self._kept]
                if not (others or lane.waypoints):
                    return
                self._table.drop_waypoint(lane, (others or lane.waypoints)[0])
        kept = (*(p for p in self._kept if p < position), position)
        self._kept = kept[-waypoints.MOST_KEPT :]

    @exclusive
    def close(self) -> None:
        """Give the lane back. Capsules stay. A second close does nothing."""
        if self._closed_with is None:
            self._closed_with = self.tokens
        self._engine.release_from(self._lane, self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------

    def _feed(self, tokens: NDArray[np.int32]) -> None:
        """Tokens through prefill graphs; waypoints at the boundaries between launches."""
        if not len(tokens):
            return
        self._epoch += 1
        for start, stop in self._engine.chunks(len(tokens)):
            self._engine.prefill(self._lane, tokens[start:stop])
            self._tail.clear()
            self._place_waypoint()

    def _go_back(self, position: int) -> None:
        """To a position that was committed: the nearest boundary below it, then the journal."""
        journal = self._lane.journal[:position].copy()
        self._return_to_boundary(position, journal)
        self._parent = _at_or_below(self._parent, self._lane.position)
        self._epoch += 1
        self._feed(journal[self._lane.position :])

    def _return_to_boundary(self, position: int, journal: NDArray[np.int32]) -> None:
        """The deepest one at or below a position whose bytes can be read; what follows it in the
        journal can be fed again, or ImageError is raised.
        """
        unreadable: set[Capsule] = set()
        while True:
            boundary = self._table.boundaries(self._lane, position, unreadable)
            at = 0 if boundary is None else boundary.position
            self._engine.check_seen(journal[:at], journal[at:])
            if boundary is None:
                self._table.reset(self._lane)
            elif isinstance(boundary, Waypoint):
                self._table.return_to(self._lane, boundary)
            else:
                try:
                    self._table.restore(self._lane, boundary)
                except CapsuleError as error:  # found before anything moved
                    trace(PLAN, f"rollback to {position} passes over {boundary}: {error}")
                    unreadable.add(boundary)
                    continue
            return

    def _settle(self) -> None:
        """All history becomes state."""
        self._check_open()
        self._tail.settle()

    def _place_waypoint(self) -> None:
        record = self._lane.record
        kept, position = record.waypoints, record.position
        last = kept[-1].position if kept else 0
        if not waypoints.is_due(position, last):
            return
        try:
            self._table.keep_waypoint(self._lane)
        except PoolFull:
            return  # only speed is lost: a rollback replays from an older boundary
        gone = set(waypoints.superfluous([w.position for w in kept], position)) - set(self._kept)
        for waypoint in [w for w in kept if w.position in gone]:
            self._table.drop_waypoint(self._lane, waypoint)

    def _take_along(self, source: Session) -> None:
        """The last waypoints that were asked for, of the session that this one is a fork of."""
        wanted = source._kept[-waypoints.FORKED :]
        for waypoint in reversed([w for w in source._lane.waypoints if w.position in wanted]):
            try:
                self._table.copy_waypoint(waypoint, self._lane)
            except PoolFull:
                return
            self._kept = (waypoint.position, *self._kept)

    def _check_open(self) -> None:
        if self._closed_with is not None or self._engine.is_closed:
            self._check_not_closed()
        lane = self._lane
        if lane.owed is not None or lane.record.is_moving:  # not to be trusted
            self._make_again()
        elif self._engine.is_in_flight(lane):
            self._engine.recover(lane)
        if (end := self._tail.end) < lane.position:
            self._go_back(end)

    def _catch_up(self) -> None:
        """What the device did and the host did not note, as an exception fell in between."""
        if self._engine.is_in_flight(self._lane):
            self._recover()

    @exclusive
    def _recover(self) -> None:
        if self._lane.is_trusted:
            self._engine.recover(self._lane)

    def _check_not_closed(self) -> None:
        if self._closed_with is not None:
            raise SessionError("the session is closed; open another with engine.session()")
        self._engine.check_open()

    def _make_again(self) -> None:
        """An exception fell into a move: nobody knows what the lane holds. The state is made again
        from the session's tokens, beginning with the deepest capsule of them.
        """
        lane = self._lane
        if lane.owed is None:
            lane.owed = self.tokens
        self._epoch += 1
        owed = lane.owed
        known = [c for c in self._table.capsules if np.array_equal(c.tokens, owed[: c.position])]
        for capsule in sorted(known, key=lambda c: -c.position):
            try:
                self._table.restore(lane, capsule)
                break
            except CapsuleError as error:  # found before anything moved
                trace(PLAN, f"the state is not made again from {capsule}: {error}")
        else:
            self._table.reset(lane)
        self._feed(owed[lane.position :])
        lane.owed = None

    def _checked(self, tokens: Iterable[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        """Tokens to follow those that are history: int32 [n]. Raises TokenError, ImageError."""
        before = _NO_TOKENS if self._engine.sight is None else self.tokens
        return self._engine.checked_tokens(tokens, before)

    def _check_room(self, n_tokens: int, what: str) -> None:
        self._check_open()
        limit = self._engine.max_positions
        if self.position + n_tokens > limit:
            raise SessionError(
                f"{what}: position {self.position} + {n_tokens} tokens > max_positions {limit}; "
                "load with a larger max_positions, or roll back"
            )


def _largest(x: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """Indices of the n largest, then by index: a vocabulary need not be sorted for that."""
    if n <= 0:
        return np.empty(0, np.intp)
    some = np.flatnonzero(x >= np.partition(x, len(x) - n)[len(x) - n])
    return some[np.argsort(-x[some], kind="stable")][:n]


def _checked_bias(
    logit_bias: Mapping[int, float] | None, vocab_size: int
) -> tuple[tuple[int, float], ...]:
    """Entries by token. Raises SessionError for keys that are no tokens."""
    if logit_bias is None:
        return ()
    if not isinstance(logit_bias, Mapping):
        raise SessionError(f"logit_bias is {shown(logit_bias)}, expected a dict of token to number")
    tokens = as_tokens(logit_bias.keys(), vocab_size).tolist()
    return tuple(sorted(zip(tokens, logit_bias.values(), strict=True)))


def _check_type(capsule: Capsule) -> None:
    if not isinstance(capsule, Capsule):
        raise CapsuleError(f"expected a Capsule, got {type(capsule).__name__}")


def _at_or_below(capsule: Capsule | None, position: int) -> Capsule | None:
    """The nearest ancestor, or the capsule itself, that lies at or below a position."""
    while capsule is not None and capsule.position > position:
        capsule = capsule.parent
    return capsule
