"""Clients: who is connected, the one observation that each has waiting, and its lane of a policy.

IS: sessions, which a client's Ready begins and the next one ends with all that was in them; the
filter of observations; lanes, given and taken. IS NOT: payloads, or gRPC (server, listen).

A session object is never emptied: it is ended and another one takes its place, so that a call which
began before a reset can neither bring anything into what follows nor take anything out of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashrt.base.locks import reentrant_lock
from flashrt.capsule.lineage import Lane
from flashrt.capsule.turn import Turn, exclusive
from flashrt.engine.actions import ActionEngine
from flashrt.engine.numbers import Action, checked_action
from flashrt.policy_server.observations import Sight, Values
from flashrt.policy_server.payloads import Instructions, Seen

_MOST_TAKEN = 256
_SEED_STEPS = 1 << 40  # timesteps that have noise of their own


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the operator chooses."""

    fps: float = 30.0  # of the robots: actions of a chunk are 1 / fps seconds apart
    # Observations whose joints are nearer than that to the last one's are left out; LeRobot has 1,
    # in whatever unit joints are, and a robot in radians then waits until its actions run out.
    similar: float = 0.0
    wait_s: float = 2.0  # for an observation, in a call for actions
    idle_s: float = 10.0  # without a call: its lane may be had by others
    seed: int = 0  # of the noise of chunks


@dataclass(frozen=True, slots=True)
class Waiting:
    """An observation that a chunk may be made from."""

    seen: Seen
    joints: Values
    task: str


class Session:
    """From a Ready, or from new instructions, to the next: at most one observation waits."""

    def __init__(self, similar: float) -> None:
        self._similar = similar
        self._changed = threading.Condition()
        self._waiting: Waiting | None = None
        # Timesteps of observations that chunks were made from, the last ones: time goes on.
        self._taken: deque[int] = deque(maxlen=_MOST_TAKEN)
        self._last: Waiting | None = None  # of these
        self._turn = 0  # of the calls that wait; the last to come has it
        self.is_ended = False

    def end(self) -> None:
        """Nothing waits any more, and whoever waits goes away empty."""
        with self._changed:
            self.is_ended = True
            self._waiting = None
            self._changed.notify_all()

    def put(self, new: Waiting) -> str | None:
        """An observation takes the place of the one that waits; if it is left out, why."""
        with self._changed:
            why = "the session is over" if self.is_ended else self._skipped(new)
            if why is None:
                self._waiting = new
                self._changed.notify_all()
            return why

    def take(self, wait_s: float, is_wanted: Callable[[], bool]) -> Waiting | None:
        """The observation that waits, as soon as there is one; None after `wait_s` seconds, at the
        session's end, when another call wants it too, and when the caller has gone.
        """
        until = time.monotonic() + wait_s
        with self._changed:
            self._turn += 1
            mine = self._turn
            self._changed.notify_all()
            while self._waiting is None:
                left = until - time.monotonic()
                is_mine = self._turn == mine and not self.is_ended
                if left <= 0 or not is_mine or not is_wanted():
                    return None
                self._changed.wait(left)
            if self._turn != mine or not is_wanted():
                return None
            found, self._waiting = self._waiting, None
            self._taken.append(found.seen.timestep)
            self._last = found
            return found

    def forget(self, taken: Waiting) -> None:
        """No actions of that observation came to the client: no other is held against it."""
        with self._changed:
            if self._last is taken:
                self._last = None
                self._taken.pop()

    def wake(self) -> None:
        """A caller may have gone."""
        with self._changed:
            self._changed.notify_all()

    def _skipped(self, new: Waiting) -> str | None:
        last = self._last
        if new.seen.must_go or last is None or new.task != last.task:
            return None
        if new.seen.timestep in self._taken:
            return "its timestep has actions"
        if np.linalg.norm(new.joints.astype(np.float64) - last.joints) < self._similar:
            return "its joints are where those of the last one were"
        return None


class Driver:
    """A policy's engine on the lane of one client. Threads take turns."""

    def __init__(self, engine: ActionEngine, instructions: Instructions, seed: int) -> None:
        """Raises LaneBusy; ObservationError where robot and policy do not fit."""
        self.engine, self.instructions = engine, instructions
        self.lock = reentrant_lock()
        self.sight = self._sight(instructions)
        self._seed = seed
        self._lane = self._taken()

    @property
    def turn(self) -> Turn:
        """The engine's."""
        return self.engine.turn

    def _sight(self, instructions: Instructions) -> Sight:
        engine = self.engine
        names, size = engine.observation_names(), engine.config.observation_dim
        return Sight(instructions, names, engine.policy.parts, size, engine.optional_names())

    def instruct(self, instructions: Instructions) -> None:
        """Others for the same policy, on the same lane. Raises ObservationError, and nothing has
        changed then.
        """
        self.sight = self._sight(instructions)
        self.instructions = instructions
        self.reset()

    @exclusive
    def _taken(self) -> Lane:
        lane = self.engine.take_lane(self)
        self.engine.reset(lane, self._seed)
        return lane

    @exclusive
    def reset(self) -> None:
        """A new episode: nothing remembered, nothing promised."""
        self.engine.reset(self._lane, self._seed)

    def chunk(self, seen: Seen) -> Action:
        """Actions [n, action_dim] from an observation, n as the client wants, at most a chunk.

        No action is taken here, so the lane stays before its tick 0: what the policy remembers goes
        on, and no chunk is joined to, or averaged with, the one before: the client does that. Noise
        is a function of seed and timestep. Raises ObservationError.
        """
        parts = self.sight.parts(seen)  # images are resized while others have their turn
        chunk = self._planned(parts, self._seed + seen.timestep % _SEED_STEPS)
        return checked_action(chunk[: self.instructions.actions_per_chunk])

    @exclusive
    def _planned(self, parts: Values | Mapping[str, Any], seed: int) -> Action:
        engine, lane = self.engine, self._lane
        engine.set_seed(lane, seed)
        engine.observe(lane, parts)
        engine.plan(lane)
        return engine.chunk(lane)

    @exclusive
    def close(self) -> None:
        """Give the lane back."""
        if not self.engine.is_closed:
            self.engine.release_from(self._lane, self)


class Client:
    """One connection of a client."""

    def __init__(self, peer: str, similar: float) -> None:
        self.peer = peer
        self.planning = threading.Lock()  # whoever has it uses the driver, or exchanges it
        self.session = Session(similar)
        self.driver: Driver | None = None
        self.key: str | None = None  # of the driver's policy
        self.n_calls = 0  # at this moment
        self.called_s = 0.0  # when the last one ended
        self.is_gone = False  # a call broke off, and none came after it
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        """Of the connection, without its port."""
        return host_of(self.peer)

    def begin(self, similar: float) -> Session:
        """Another session, in place of the one that ends."""
        with self._lock:
            ended, self.session = self.session, Session(similar)
            ended.end()
            return self.session


def host_of(peer: str) -> str:
    """gRPC's ipv4:127.0.0.1:5000 without the port."""
    return peer.rpartition(":")[0]
