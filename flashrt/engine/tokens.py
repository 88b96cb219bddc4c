"""Verbs of an engine on tokens: prefill, decode, sample, draft, verify, commit; a replay each.

IS: what a language model's engine does to a lane. IS NOT: sessions, policy or files of capsules;
see session/.

Per step: write io -> replay(key) -> read io -> commit. An interrupt between replay and commit
leaves the device ahead: see `recover`.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import SessionError, TokenError
from flashrt.capsule.file import CapsuleHeader
from flashrt.capsule.lineage import Lane
from flashrt.core.backend import Backend, Bytes
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.planner import Band
from flashrt.core.runs import MAX_RUNS, Run
from flashrt.engine.admission import check_state
from flashrt.engine.engine import Engine, PoolDefault
from flashrt.engine.sight import Sight
from flashrt.models.model import (
    COMMIT,
    COMMIT_EACH,
    DECODE,
    DRAFT,
    DRAFT_EACH,
    DRAFT_NEXT,
    DRAFT_NEXT_EACH,
    PREFILL,
    SAMPLE,
    SAMPLE_EACH,
    STEP,
    STEP_ROWS,
    TOGETHER,
    VERIFY,
    VERIFY_EACH,
    VERIFY_EACH_ROWS,
    TokenModel,
)
from flashrt.models.sight import DELTA, FIRST_WORD, GROWTH, OFFSETS, SEEN
from flashrt.ops.cursor import CursorWord
from flashrt.ops.rows import STOP_WORDS
from flashrt.ops.sample import SamplerParams, mask_words
from flashrt.text.constraint import Grammars
from flashrt.weights.checkpoint import Checkpoint

POOL_DEFAULT = PoolDefault(fixed=16, lanes=2)
_ON_ITS_WAY = np.array([-1], np.int32)  # a token that is committed before it is known here


@dataclass(slots=True)
class DraftCounters:
    """What drafting has come to since loading; each verify also yields one token undrafted."""

    verifies: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _HostView:
    """What the host knows of a lane's words on the device; void once the lane was put elsewhere."""

    moves: int = -1
    rows: int = -1  # rows word of the cursor; -1: unknown
    token: int = -1  # the token sampled last; -1: unknown
    sampler: SamplerParams | None = None
    in_flight: NDArray[np.int32] | None = None  # what the replay at hand commits
    following: Callable[[], int] | None = None  # waits for the token that is sampled last
    is_plain: bool = False  # whether nothing of an image is left in the lane's io


class TokenEngine(Engine):
    """Verbs on lanes of tokens."""

    model: TokenModel

    def __init__(
        self, model: TokenModel, checkpoint: Checkpoint, backend: Backend, **options: Any
    ) -> None:
        """See Engine for the options."""
        self.draft_counters = DraftCounters()
        self.grammars = Grammars(None, model.vocab_size)  # text is known to who has a tokenizer
        self.sight: Sight | None = None  # of a model that was loaded with images
        super().__init__(model, checkpoint, backend, pool_default=POOL_DEFAULT, **options)
        self._views = [_HostView() for _ in self.lanes]
        self._shared = model.shared_phases(len(self.lanes))
        self._cursors = [lane.fixed.slot("cursor").offset for lane in self.arena.plan.lanes]
        # Of each lane, as they are on the device; None: unknown.
        self._stops: list[frozenset[int] | None] = [frozenset() for _ in self.lanes]
        self._logits_kept = [_logits_kept(lane.io) for lane in self.arena.plan.lanes]
        self._commit_rows = max(
            (rows for phase, rows in model.phases if phase == COMMIT), default=0
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def max_draft(self) -> int:
        """The longest draft; 0 without a draft head."""
        return max((rows for phase, rows in self.model.phases if phase == VERIFY), default=1) - 1

    # -- verbs ----------------------------------------------------------------------------------

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of the launches that prefill n tokens: largest bucket first."""
        widest = self.model.buckets[-1]
        for start in range(0, n_tokens, widest):
            yield start, min(start + widest, n_tokens)

    def prefill(self, lane: Lane, tokens: NDArray[np.int32], bucket: int | None = None) -> None:
        """One replay over at most the largest bucket of rows, then commit.

        `bucket` asks for a larger bucket than needed: the bits do not depend on it.
        """
        n = len(tokens)
        rows = bucket or next(b for b in self.model.buckets if b >= n)
        self._write_prompt(lane, tokens)
        self._replay_commit(PREFILL, rows, lane, tokens)

    def decode(self, lane: Lane, token: int) -> int:
        """Feed a token, which is on the device already if it was sampled last; commit it, sample
        the next.
        """
        self.need_token(lane, token)
        self._replay_commit(DECODE, 1, lane, np.array([token], np.int32))
        return self._read_token(lane)

    # Queued decodes: the device goes on while the host looks at the token before. A decode is
    # queued before anybody here knows its token; the replay before it leaves no row to it where
    # that token is a stop or none, so that what is not history is not fed.

    @property
    def goes_ahead(self) -> bool:
        """Whether `following` may queue: replays return before they are done."""
        return self.backend.is_async

    def begin_sample(self, lane: Lane, params: SamplerParams, stops: frozenset[int]) -> None:
        """`sample`, whose token `following` waits for; `stops`: STOP_WORDS - 1 at most."""
        self.set_sampler(lane, params)
        self._set_stops(lane, stops)
        self._set_rows(lane, 1)
        self._replay(SAMPLE, 1, lane)
        self._begin_following(lane)

    def begin_decode(
        self, lane: Lane, token: int, params: SamplerParams, stops: frozenset[int]
    ) -> None:
        """`decode` of a token, which is committed; `following` waits for the one after it."""
        self.set_sampler(lane, params)
        self._set_stops(lane, stops)
        self.need_token(lane, token)
        self._replay_commit(DECODE, 1, lane, np.array([token], np.int32))
        self._begin_following(lane)

    def has_following(self, lane: Lane, stops: frozenset[int]) -> bool:
        """Whether a token is on its way that was sampled with these stops in place."""
        return self._view(lane).following is not None and self._stops[lane.index] == stops

    def following(self, lane: Lane, *, is_more: bool) -> tuple[int, bool]:
        """The token that is on its way, -1 for none; and whether it was committed.

        `is_more`: queue its decode before it is known here. It is committed then, unless it is none
        or a stop, and the next token is on its way.
        """
        view = self._view(lane)
        wait = view.following
        assert wait is not None
        if not is_more:
            token = wait()
            view.following, view.token = None, token
            self._note_held(lane, token)
            return token, False
        lane.overwrite()
        moves, base = self._logits_kept[lane.index], self.arena.memory.address
        self.backend.copy(moves, base, base)
        view.token, view.in_flight = -1, _ON_ITS_WAY
        self._replay(DECODE, 1, lane)
        following = self.backend.begin_read_word(self._token_address(lane))
        token = wait()
        is_held = self._note_held(lane, token)
        if is_held:
            view.token, view.in_flight = token, None
        else:
            view.in_flight = np.array([token], np.int32)
            self._end_commit(lane)
            view.following = following
        self.boundary()
        return token, not is_held

    def logits_before(self, lane: Lane) -> NDArray[np.float32]:
        """The logits that chose the token that `following` returned last, and queued behind:
        [vocab_size].
        """
        array = self.arena.read(self.arena.lane(lane.index).io.slot("logits_before"))
        return np.asarray(array, np.float32).reshape(-1)

    def _begin_following(self, lane: Lane) -> None:
        view = self._view(lane)
        view.token = -1
        view.following = self.backend.begin_read_word(self._token_address(lane))

    def _set_stops(self, lane: Lane, stops: frozenset[int]) -> None:
        if self._stops[lane.index] != stops:
            words = np.zeros(STOP_WORDS, np.int32)
            words[: len(stops) + 1] = len(stops), *sorted(stops)
            self._stops[lane.index] = None  # until they are written
            self._write_io(lane, "stops", words)
            self._stops[lane.index] = stops

    def _note_held(self, lane: Lane, token: int) -> bool:
        """Whether the device left no row to what follows, as this was sampled; see op `hold`."""
        stops = self._stops[lane.index]
        is_held = token < 0 or stops is None or token in stops
        if is_held:
            self._view(lane).rows = -1
        return is_held

    @property
    def most_together(self) -> int:
        """Lanes that one replay can decode."""
        return min(len(self.lanes), MAX_RUNS)

    def decode_together(self, lanes: Sequence[Lane], tokens: Sequence[int]) -> list[int]:
        """`decode` of up to `most_together` lanes in one replay, each with its own token and
        sampler: the token after each, in order. The bits are those of each lane alone.
        """
        if len(lanes) == 1:
            return [self.decode(lanes[0], tokens[0])]
        bucket = next(n for p, n in self._shared if p == TOGETHER and n >= len(lanes))
        runs = []
        for lane, token in zip(lanes, tokens, strict=True):
            self.need_token(lane, token)
            runs.append((lane, np.array([token], np.int32)))
        return self._replay_runs(TOGETHER, bucket, runs)

    def step(self, runs: Sequence[tuple[Lane, NDArray[np.int32]]]) -> list[int]:
        """Tokens of up to `most_together` lanes in one replay, STEP_ROWS of them at most in all:
        pieces of a prompt here, the token sampled last there. They are committed; returns the token
        that each lane's sampler gives after its last one. The bits are those of each lane alone.

        For schedulers: `STEP_ROWS` bounds how long a lane that decodes waits for others' prompts.
        A session whose lane it is knows nothing ahead afterwards; tokens that it has yielded and
        not yet fed, `session.tokens[session.lane.position:]`, must come first among its tokens.
        Raises SessionError for no lane, too many, one that is named twice, and for too many tokens.
        """
        n_rows = sum(len(tokens) for _, tokens in runs)
        is_fine = 1 <= len(runs) <= self.most_together and n_rows <= STEP_ROWS
        lanes = {lane.index for lane, _ in runs}
        if not is_fine or len(lanes) < len(runs) or any(not len(tokens) for _, tokens in runs):
            raise SessionError(
                f"step: {n_rows} tokens of lanes {[lane.index for lane, _ in runs]}; a step takes "
                f"tokens of each of 1 to {self.most_together} lanes, {STEP_ROWS} in all"
            )
        for lane, tokens in runs:
            if lane.position + len(tokens) > self.max_positions:
                raise SessionError(
                    f"step: lane {lane.index}: position {lane.position} + {len(tokens)} tokens > "
                    f"max_positions {self.max_positions}"
                )
        for lane, _ in runs:
            lane.forget_ahead()
        return self.feed_together(runs)

    def feed_together(self, runs: Sequence[tuple[Lane, NDArray[np.int32]]]) -> list[int]:
        """`step`, of what was checked; a session may go on from what it knows."""
        if len(self.lanes) == 1:
            ((lane, tokens),) = runs
            self.prefill(lane, tokens)
            self._set_rows(lane, 1)
            self._replay(SAMPLE, 1, lane)
            return [self._read_token(lane)]
        for lane, tokens in runs:
            self._write_prompt(lane, tokens)
        return self._replay_runs(STEP, STEP_ROWS, runs)

    def sample_each(self, lanes: Sequence[Lane]) -> list[int]:
        """Of several lanes what `sample` is of one, in one replay; their samplers are set."""
        for lane in lanes:
            self._set_rows(lane, 1)
        self.replay(SAMPLE_EACH, MAX_RUNS, tuple(Run(lane.index, 1) for lane in lanes))
        self.boundary()
        return self._read_tokens(lanes)

    def draft_each(self, drafts: Sequence[tuple[Lane, int]]) -> None:
        """`draft` of several lanes, as many tokens as each wants."""
        for lane, _ in drafts:
            lane.overwrite()
        for i in range(max(n for _, n in drafts)):
            runs = tuple(Run(lane.index, 1) for lane, n in drafts if i < n)
            self.replay(DRAFT_NEXT_EACH if i else DRAFT_EACH, MAX_RUNS, runs)
            self.boundary()

    def verify_each(self, runs: Sequence[tuple[Lane, int]]) -> list[list[int]]:
        """`verify` of several lanes in one replay, VERIFY_EACH_ROWS rows in all. A lane of one row
        need not have drafted.
        """
        for lane, rows in runs:
            lane.overwrite()
            self._set_rows(lane, rows)
            if rows == 1:  # no draft began, which writes it
                token = self._view(lane).token
                self._write_io(lane, "drafted", np.array([token], np.int32))
        self.replay(
            VERIFY_EACH, VERIFY_EACH_ROWS, tuple(Run(lane.index, rows) for lane, rows in runs)
        )
        found = [self._verdict(lane, rows) for lane, rows in runs]
        self.boundary()
        return found

    def commit_each(self, runs: Sequence[tuple[Lane, NDArray[np.int32]]]) -> None:
        """`commit` of several lanes in one replay."""
        self._replay_runs(COMMIT_EACH, self._commit_rows, runs, samples=False)

    def _replay_runs(
        self,
        phase: str,
        bucket: int,
        runs: Sequence[tuple[Lane, NDArray[np.int32]]],
        *,
        samples: bool = True,
    ) -> list[int]:
        """A replay that commits tokens of each lane; the token sampled for each, if it samples."""
        for lane, tokens in runs:
            self._begin_commit(lane, tokens)
        self.replay(phase, bucket, tuple(Run(lane.index, len(tokens)) for lane, tokens in runs))
        for lane, _ in runs:
            self._end_commit(lane)
        self.boundary()
        return self._read_tokens([lane for lane, _ in runs]) if samples else []

    def _read_tokens(self, lanes: Sequence[Lane]) -> list[int]:
        reads = [self.backend.begin_read(self._token_address(lane), 4) for lane in lanes]
        found = [int(read().view(np.int32)[0]) for read in reads]
        for lane, token in zip(lanes, found, strict=True):
            self._view(lane).token = token
        return found

    def checked_tokens(
        self, tokens: Iterable[int] | NDArray[np.integer], before: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Token ids and words of images, to follow others: int32 [n].

        Raises TokenError unless all are integers in [0, vocab_size), or words of an image where the
        model sees; ImageError for one that is not in memory.
        """
        if self.sight is None:
            return as_tokens(tokens, self.vocab_size)
        array = as_tokens(tokens, self.vocab_size, may_see=True)
        self.sight.check(before, array)
        return array

    def check_seen(self, before: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        """Raises ImageError unless all images of committed tokens can be fed again."""
        if self.sight is not None:
            self.sight.check(before, tokens)

    def need_token(self, lane: Lane, token: int) -> None:
        """The token to go on from is this one: written where another was sampled meanwhile."""
        view = self._view(lane)
        if view.token != token:
            self.write_cursor(lane, CursorWord.TOKEN, token)
            view.token = token

    def sample(self, lane: Lane, params: SamplerParams) -> int:
        """Logits of the present boundary, and a token sampled from them."""
        self.set_sampler(lane, params)
        self._set_rows(lane, 1)  # kernels take the rows of a launch from the cursor
        self._replay(SAMPLE, 1, lane)
        return self._read_token(lane)

    def draft(self, lane: Lane, n_tokens: int) -> None:
        """Guess what follows the token sampled last (it is on the device), n tokens ahead.

        Leaves nothing but guesses: the state is as before. n_tokens is in [1, max_draft], and
        position + n_tokens within max_positions.
        """
        lane.overwrite()
        for i in range(n_tokens):
            self._replay(DRAFT_NEXT if i else DRAFT, 1, lane)
            self.boundary()

    def verify(self, lane: Lane, rows: int) -> list[int]:
        """The token sampled last and rows - 1 drafted ones through the model; state as before.

        Returns the tokens that decoding would have sampled after each row, up to the first that
        differs from what was drafted, that one included: so at least one, and `commit` may take as
        many rows as there are tokens.
        """
        bucket = min(r for phase, r in self.model.phases if phase == VERIFY and r >= rows)
        lane.overwrite()
        self._set_rows(lane, rows)
        self._replay(VERIFY, bucket, lane, rows)
        found = self._verdict(lane, rows)
        self.boundary()
        return found

    def _verdict(self, lane: Lane, rows: int) -> list[int]:
        verdict = self._read_io(lane, "verdict", rows + 1)
        n = int(verdict[0])
        if rows > 1:
            self.draft_counters.verifies += 1
            self.draft_counters.drafted += rows - 1
            self.draft_counters.accepted += n - 1
        return [int(token) for token in verdict[1 : n + 1]]

    def commit(self, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """The first rows of the last verify, which were for `tokens`, become state."""
        self._replay_commit(COMMIT, self._commit_rows, lane, tokens)

    def is_in_flight(self, lane: Lane) -> bool:
        """Whether a replay runs, or ran and was not noted: see `recover`."""
        view = self._views[lane.index]
        return view.in_flight is not None and view.moves == lane.moves

    def recover(self, lane: Lane) -> None:
        """After an interrupt: if a replay was finished on the device but not committed by the host,
        commit it.
        """
        if self.is_in_flight(lane):
            view = self._view(lane)
            tokens, view.rows, view.token = view.in_flight, -1, -1
            assert tokens is not None
            view.following = None
            if self._read_cursor(lane, CursorWord.POSITION) == lane.position + len(tokens):
                lane.commit(self._read_journal(lane) if tokens is _ON_ITS_WAY else tokens)
            view.in_flight = None

    def set_sampler(self, lane: Lane, params: SamplerParams) -> None:
        """Write the sampler's parameters into the lane. Raises SessionError for a mask of another
        size than the vocabulary's.
        """
        view = self._view(lane)
        before = view.sampler
        if before is params or before == params:
            return
        wanted = {"sampler": params.pack()}
        if before is None or before.logit_bias != params.logit_bias:
            wanted["bias"] = params.pack_bias()
        if params.allowed is not None:
            self._check_mask(params.allowed)
            wanted["mask"] = params.allowed
        view.sampler = None  # until all is written
        for name, data in wanted.items():
            slot = self.arena.lane(lane.index).fixed.slot(name)
            address = self.arena.memory.address + slot.offset
            self.backend.write(address, np.frombuffer(data, np.uint8))
        view.sampler = params

    def logits(self, lane: Lane) -> NDArray[np.float32]:
        """The logits region, [vocab_size]: of the last decode or sample."""
        array = self.arena.read(self.arena.lane(lane.index).io.slot("logits"))
        return np.asarray(array, np.float32).reshape(-1)

    def verify_logits(self, lane: Lane, row: int) -> NDArray[np.float32]:
        """Logits after one row of the last verify, [vocab_size]."""
        array = self._read_io(lane, "verify_logits", self.vocab_size, row * self.vocab_size)
        return array.view(np.float32)

    def forget_host_view(self, lane: Lane) -> None:
        """After a restore, cursor and sampler are not what the host wrote last."""
        self._views[lane.index] = _HostView(lane.moves)

    # -- for the base ---------------------------------------------------------------------------

    def admit(
        self, header: CapsuleHeader, tensors: Mapping[str, Bytes], tokens: NDArray[np.int32]
    ) -> None:
        """See Engine."""
        cursor = tensors["fixed/cursor"]
        delta = tensors.get(f"fixed/{DELTA}")
        check_state(str(header.path), cursor, tokens, header.position, self.vocab_size, delta)

    def poison_lane(self, lane: Lane) -> None:
        """See Engine."""
        super().poison_lane(lane)
        self.forget_host_view(lane)
        self._stops[lane.index] = None

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, in bytes."""
        counters = self.draft_counters
        return {
            **super().stats(),
            **dataclasses.asdict(counters),
            "mean_accepted": counters.accepted / max(1, counters.verifies),
        }

    # -- inside ---------------------------------------------------------------------------------

    def _replay_commit(self, phase: str, rows: int, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """A replay after which the tokens are history, on the device and here."""
        self._begin_commit(lane, tokens)
        self._replay(phase, rows, lane, len(tokens))
        self._end_commit(lane)
        self.boundary()

    def _begin_commit(self, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """The next replay commits the tokens."""
        lane.overwrite()
        view = self._view(lane)
        if view.rows != len(tokens):
            self._set_rows(lane, len(tokens))
        view.token, view.following = -1, None
        view.in_flight = tokens

    def _end_commit(self, lane: Lane) -> None:
        """The replay is done: what it was to commit is history."""
        view = self._views[lane.index]
        assert view.in_flight is not None
        lane.commit(view.in_flight)
        view.in_flight = None

    def _replay(self, phase: str, bucket: int, lane: Lane, rows: int = 1) -> None:
        self._view(lane).following = None
        self.replay(phase, bucket, (Run(lane.index, rows),))

    def _check_mask(self, allowed: bytes) -> None:
        n_words = mask_words(self.vocab_size)
        if len(allowed) != 4 * n_words:
            raise SessionError(
                f"sampling parameters: allowed has {len(allowed)} bytes, a mask of "
                f"{self.vocab_size} tokens has {4 * n_words}"
            )

    def _view(self, lane: Lane) -> _HostView:
        view = self._views[lane.index]
        if view.moves != lane.record.moves:
            view = self._views[lane.index] = _HostView(lane.moves)
        return view

    def _read_io(self, lane: Lane, name: str, words: int, first: int = 0) -> NDArray[np.int32]:
        slot = self.arena.lane(lane.index).io.slot(name)
        out = np.empty(words, np.int32)
        address = self.arena.memory.address + slot.offset + 4 * first
        self.backend.read(address, out.view(np.uint8))
        return out

    def _write_prompt(self, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """Tokens of the next launch, and what goes with them where there may be images."""
        sight, view = self.sight, self._view(lane)
        if sight is not None:
            has_images = bool((tokens >= FIRST_WORD).any())
            given = sight.given(lane.journal[: lane.position], tokens) if has_images else None
            if given is None and not view.is_plain:
                n = self.model.buckets[-1]
                self._write_io(lane, OFFSETS, np.zeros((n, 3), np.int32))
                self._write_io(lane, GROWTH, np.zeros(1, np.int32))
                view.is_plain = True
            elif given is not None:
                view.is_plain = False
                self._write_io(lane, SEEN, given.seen)
                self._write_io(lane, OFFSETS, given.offsets)
                self._write_io(lane, GROWTH, np.array([given.growth], np.int32))
        self._write_io(lane, "tokens", tokens)

    def _write_io(self, lane: Lane, name: str, array: NDArray[np.int32 | np.float32]) -> None:
        slot = self.arena.lane(lane.index).io.slot(name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.backend.write(self.arena.memory.address + slot.offset, data)

    def _cursor_address(self, lane: Lane, word: int) -> int:
        return self.arena.memory.address + self._cursors[lane.index] + 4 * word

    def _token_address(self, lane: Lane) -> int:
        return self._cursor_address(lane, CursorWord.TOKEN)

    def _set_rows(self, lane: Lane, rows: int) -> None:
        view = self._view(lane)
        if view.rows != rows:
            view.rows = -1  # until it is written
            self.write_cursor(lane, CursorWord.ROWS, rows)
            view.rows = rows

    def write_cursor(self, lane: Lane, word: int, value: int) -> None:
        """One word of a lane's cursor."""
        data = np.frombuffer(struct.pack("@i", value), np.uint8)
        self.backend.write(self._cursor_address(lane, word), data)

    def _read_token(self, lane: Lane) -> int:
        token = self.backend.begin_read_word(self._token_address(lane))()
        self._view(lane).token = token
        self._note_held(lane, token)
        return token

    def _read_journal(self, lane: Lane) -> NDArray[np.int32]:
        """The token that the device has at the lane's position: int32 [1]."""
        slot = self.arena.lane(lane.index).rows.slot("journal")
        out = np.empty(1, np.int32)
        address = self.arena.memory.address + slot.offset + lane.position * slot.storage.row_nbytes
        self.backend.read(address, out.view(np.uint8))
        return out

    def _read_cursor(self, lane: Lane, word: int) -> int:
        out: Bytes = np.empty(4, np.uint8)
        self.backend.read(self._cursor_address(lane, word), out)
        return int(out.view(np.int32)[0])


def _logits_kept(io: Band) -> CopyList:
    """Logits to where the next replay leaves them alone."""
    now, before = io.slot("logits"), io.slot("logits_before")
    return CopyList((Copy(now.offset, before.offset, now.storage.nbytes),))


def as_tokens(
    tokens: Iterable[int] | NDArray[np.integer], vocab_size: int, *, may_see: bool = False
) -> NDArray[np.int32]:
    """Token ids as int32 [n]; `may_see`: words of images may be among them. Raises TokenError
    unless all are integers in [0, vocab_size), or such words.
    """
    array = tokens if isinstance(tokens, np.ndarray) else np.asarray(list(tokens))
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TokenError(f"tokens must be a flat run of integers, got {array.dtype} {array.shape}")
    is_token = (array >= 0) & (array < vocab_size)
    if may_see:
        is_token |= (array >= FIRST_WORD) & (array < 2 * FIRST_WORD)
    wrong = np.flatnonzero(~is_token)
    if wrong.size:
        at = int(wrong[0])
        raise TokenError(f"token {array[at]} at index {at} is not in [0, {vocab_size})")
    return array.astype(np.int32)
