"""Recordings: what a control loop takes in and answers, and the same again to the bit.

IS: `record`, and `replay`, which names the first tick that differs. IS NOT: the file
(recording_file), nor a recording of a session of tokens (session.recording).

Clocks are not recorded: a missed deadline is, with the action that was executed in its place. So a
replay takes as long as it takes, and gives the same actions and digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import RecordingError, SessionError
from flashrt.capsule.capsule import Capsule
from flashrt.robot.loop import ControlLoop
from flashrt.robot.policy import Array, Policy
from flashrt.robot.recording_file import (
    DIGEST,
    HELD,
    LATE,
    NO_DIGEST,
    ON_TIME,
    Event,
    Recording,
    read_recording,
    write_recording,
)

ROOM = 1024  # ticks that arrays grow by at first; made in the slack, long before they are needed


@contextmanager
def record(loop: ControlLoop, path: str | os.PathLike[str]) -> Iterator[LoopRecorder]:
    """In a `with` block: what the loop takes in and answers goes to a file, written whole when the
    block ends; see `replay`. Raises RecordingError when it cannot be written.
    """
    if loop.listener is not None:
        raise SessionError("record: the loop is being recorded already")
    loop.listener = recorder = LoopRecorder(loop, path)
    try:
        yield recorder
    finally:
        if not loop.is_closed:
            recorder.event(DIGEST, digest=loop.digest())
        loop.listener = None
        recorder.write()


class LoopRecorder:
    """Writes down what a loop does. Made by `record`."""

    def __init__(self, loop: ControlLoop, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.ticks = 0
        self._loop = loop
        self._seed = loop.seed
        config = loop.engine.config
        self._observations = np.zeros((ROOM, config.observation_dim), np.float32)
        self._actions = np.zeros((ROOM, config.action_dim), np.float32)
        self._outcomes = np.zeros(ROOM, np.uint8)
        self._events: list[Event] = []
        self.event(DIGEST, 0, loop.digest())

    def tick(self, observation: Array, action: Array, *, is_late: bool) -> None:
        """One tick."""
        at = self.ticks
        if at == len(self._outcomes):
            self._grow()
        self._observations[at], self._actions[at] = observation, action
        self._outcomes[at] = LATE if is_late else ON_TIME
        self.ticks += 1

    def override(self, executed: Array) -> None:
        """In the last tick something else than the policy's action was executed."""
        self._actions[self.ticks - 1] = executed
        self._outcomes[self.ticks - 1] = HELD

    def slack(self, digest: str | None) -> None:
        """The slack after a tick is over; at boundaries the state has a digest."""
        if len(self._outcomes) - self.ticks < ROOM // 2:
            self._grow()
        if digest is not None:
            self.event(DIGEST, 0, digest)

    def event(self, what: str, value: int = 0, digest: str | None = None) -> None:
        """Something between two ticks."""
        self._events.append(Event(self.ticks, what, value, digest or NO_DIGEST))

    def recording(self) -> Recording:
        """So far."""
        options = self._loop.options
        return Recording(
            fingerprint=self._loop.engine.fingerprint,
            seed=self._seed,
            hz=options.hz,
            overlap=options.overlap,
            keep_seconds=options.keep_seconds,
            boundary_seconds=options.boundary_seconds,
            observations=self._observations[: self.ticks].copy(),
            actions=self._actions[: self.ticks].copy(),
            outcomes=self._outcomes[: self.ticks].copy(),
            events=tuple(self._events),
        )

    def write(self) -> None:
        """The file, whole or not at all. Raises RecordingError."""
        write_recording(self.recording(), self.path)

    def _grow(self) -> None:
        self._observations = _doubled(self._observations)
        self._actions = _doubled(self._actions)
        self._outcomes = np.append(self._outcomes, np.zeros_like(self._outcomes))


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found. `first_difference` is the number of the first tick that differs, counted
    from 0 (the digests of a boundary are those of the tick before it), and `mismatch` says how;
    both None when all bits agreed.
    """

    ticks: int  # that were run
    digests: int  # that agreed
    first_difference: int | None
    mismatch: str | None


def replay(
    engine: Policy, path: str | os.PathLike[str], capsules: Iterable[Capsule] = ()
) -> ReplayReport:
    """Run a recording on a free lane of an engine, and compare every action and digest.

    capsules: those that the recording begins with or restores, but did not snapshot itself; one
    that begins after a reset needs none. Stops at the first difference. Raises RecordingError for a
    file that is foreign or damaged, or needs a capsule that was not given; LaneBusy.
    """
    recording = read_recording(path)
    if recording.fingerprint != engine.fingerprint:
        raise RecordingError(
            f"{path}: recorded with fingerprint {recording.fingerprint}, the engine's is "
            f"{engine.fingerprint}"
        )
    shapes = recording.observations.shape[1], recording.actions.shape[1]
    wanted = engine.config.observation_dim, engine.config.action_dim
    if shapes != wanted:
        raise RecordingError(f"{path}: observations and actions of {shapes}, expected {wanted}")
    with ControlLoop(
        engine,
        recording.hz,
        overlap=recording.overlap,
        seed=recording.seed,
        keep_seconds=recording.keep_seconds,
        boundary_seconds=recording.boundary_seconds,
    ) as loop:
        return _Replay(loop, recording, f"{path}", capsules).run()


class _Replay:
    """One recording, run on one loop."""

    def __init__(
        self, loop: ControlLoop, recording: Recording, path: str, capsules: Iterable[Capsule]
    ) -> None:
        self._loop, self._recording, self._path = loop, recording, path
        self._known = {capsule.digest: capsule for capsule in capsules}
        self._made: list[Capsule] = []
        self._digests = 0

    def run(self) -> ReplayReport:
        """All of it, or up to the first difference."""
        first = self._recording.events[0]
        if self._loop.digest() != first.digest and not self._is_reset_first():
            self._loop.restore(self._capsule(first.digest))
        try:
            return self._run()
        finally:
            for capsule in self._made:
                capsule.drop()

    def _run(self) -> ReplayReport:
        recording = self._recording
        n_ticks, events = len(recording.outcomes), iter(recording.events)
        event = next(events, None)
        if self._is_reset_first():
            event = next(events)
        for tick in range(n_ticks + 1):
            while event is not None and event.tick == tick:
                if (mismatch := self._do(event)) is not None:
                    at = max(0, tick - 1)
                    text = f"{self._path}, after {tick} ticks ({event.what}): {mismatch}"
                    return ReplayReport(tick, self._digests, at, text)
                event = next(events, None)
            if tick < n_ticks and (mismatch := self._tick(tick)) is not None:
                text = f"{self._path}, tick {tick}: {mismatch}"
                return ReplayReport(tick, self._digests, tick, text)
        return ReplayReport(n_ticks, self._digests, None, None)

    def _is_reset_first(self) -> bool:
        """Whether nothing of the state that it began with matters."""
        following = self._recording.events[1:2]
        return any(e.tick == 0 and e.what == "reset" for e in following)

    def _tick(self, tick: int) -> str | None:
        """One tick again; what differs, or None."""
        recorded = self._recording.actions[tick]
        is_held = self._recording.outcomes[tick] == HELD
        executed = recorded if is_held else None
        action = self._loop.tick_as_recorded(self._recording.observations[tick], executed)
        if is_held or action.tobytes() == recorded.tobytes():
            return None
        return f"action {action.tolist()}, recorded {recorded.tolist()}"

    def _do(self, event: Event) -> str | None:
        """One event again; what differs, or None."""
        loop = self._loop
        match event.what:
            case "reset":
                loop.reset(event.value)
            case "set_seed":
                loop.set_seed(event.value)
            case "interrupt":
                loop.interrupt(event.value)
            case "rewind":
                loop.rewind_ticks(event.value)
            case "restore":
                self._restore(event.digest)
            case _:
                return self._compare(event)
        return None

    def _restore(self, digest: str) -> None:
        """A capsule; none is needed where the loop is in that state already."""
        if digest in self._known or self._loop.digest() != digest:
            self._loop.restore(self._capsule(digest))

    def _compare(self, event: Event) -> str | None:
        if (digest := self._loop.digest()) != event.digest:
            return f"digest {digest}, recorded {event.digest}"
        self._digests += 1
        is_needed = any(e.what == "restore" and e.digest == digest for e in self._recording.events)
        if event.what == "snapshot" and is_needed and digest not in self._known:
            self._known[digest] = self._loop.snapshot()
            self._made.append(self._known[digest])
        return None

    def _capsule(self, digest: str) -> Capsule:
        if digest not in self._known:
            raise RecordingError(
                f"{self._path} needs the capsule with digest {digest}; give it in `capsules`"
            )
        return self._known[digest]


def _doubled(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([rows, np.zeros_like(rows)])
