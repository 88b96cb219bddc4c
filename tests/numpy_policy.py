"""A policy engine in plain numpy, its whole state copied by deepcopy: what a control loop is tested
against, and with.

IS: the verbs of robot.policy.Policy in float64 and ten-line formulas. IS NOT: the reference of the
kernels.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashrt.base.errors import CapsuleError, LaneBusy, PoolFull, SessionError
from flashrt.capsule.turn import Turn


@dataclass
class State:
    """All there is to a lane."""

    memory: np.ndarray
    previous: np.ndarray
    queue: np.ndarray
    flow: np.ndarray | None = None
    tick: int = 0
    observed: int = -1
    seed: int = 0
    chunk: int = 0
    stop: int = 0
    plan_tick: int = -1
    plan_steps_left: int = 0

    def digest(self) -> str:
        parts = [v.tobytes() if isinstance(v, np.ndarray) else repr(v) for v in vars(self).values()]
        return hashlib.md5(repr(parts).encode()).hexdigest()


@dataclass(eq=False)
class NumpyCapsule:
    engine: NumpyPolicy
    state: State | None
    name: str | None = None

    @property
    def is_dropped(self) -> bool:
        return self.state is None

    @property
    def digest(self) -> str:
        assert self.state is not None
        return self.state.digest()

    def drop(self) -> None:
        self.state = None
        self.engine.capsules.discard(self)


@dataclass(eq=False)
class NumpyLane:
    index: int
    state: State = field(default=None)  # type: ignore[assignment]
    owner: weakref.ref[object] | None = None
    kept: list[NumpyCapsule] = field(default_factory=list)
    is_trusted: bool = True


class NumpyPolicy:
    """`room`: capsules that it has room for. `log`: the verbs that were called."""

    def __init__(self, lanes: int = 2, room: int = 64, **sizes: int) -> None:
        self.config = SimpleNamespace(
            observation_dim=3, action_dim=2, chunk_size=8, n_action_steps=4, num_inference_steps=5
        )
        vars(self.config).update(sizes)
        rng = np.random.default_rng(5)
        c = self.config
        self.inward = rng.normal(size=(6, c.observation_dim + c.action_dim + 6)) / 3
        self.outward = rng.normal(size=(c.chunk_size * c.action_dim, 6 + 2 * c.chunk_size)) / 3
        self.fingerprint = "numpy"
        self.capsules: set[NumpyCapsule] = set()
        self.room = room
        self.log: list[tuple[Any, ...]] = []
        self.lanes = [NumpyLane(i) for i in range(lanes)]
        self.turn = Turn(lambda created: None)
        self.is_closed = False

    @property
    def free(self) -> list[NumpyLane]:
        return [lane for lane in self.lanes if lane.owner is None or lane.owner() is None]

    def check_open(self) -> None:
        if self.is_closed:
            raise SessionError("the engine is closed; load another one")

    def take_lane(self, owner: object) -> NumpyLane:
        if not self.free:
            gc.collect()
        if not self.free:
            raise LaneBusy("all lanes are in use")
        for forsaken in self.free:
            self.release(forsaken)
        lane = self.free[-1]
        lane.owner = weakref.ref(owner)
        return lane

    def release(self, lane: NumpyLane) -> None:
        lane.owner = None
        for capsule in self.kept_boundaries(lane):
            capsule.drop()

    def release_from(self, lane: NumpyLane, owner: object) -> None:
        if lane.owner is not None and lane.owner() is owner:
            self.release(lane)

    def reset(self, lane: NumpyLane, seed: int) -> None:
        c = self.config
        queue = np.zeros((c.chunk_size, c.action_dim), np.float32)
        lane.state = State(np.zeros(6), np.zeros(c.action_dim, np.float32), queue, seed=seed)

    def set_seed(self, lane: NumpyLane, seed: int) -> None:
        lane.state.seed = seed

    def cursor(self, lane: NumpyLane) -> State:
        return lane.state

    def observe(self, lane: NumpyLane, observation: np.ndarray) -> None:
        s = lane.state
        s.memory = np.tanh(self.inward @ np.concatenate([observation, s.previous, s.memory]))
        s.observed = s.tick
        self.log.append(("observe", s.tick))

    def act(self, lane: NumpyLane) -> np.ndarray:
        s = lane.state
        if s.tick >= s.stop:
            raise SessionError(f"nothing is promised for tick {s.tick}")
        s.previous = s.queue[s.tick - s.chunk].copy()
        s.tick += 1
        self.log.append(("act", s.tick - 1))
        return s.previous.copy()

    def action(self, lane: NumpyLane) -> np.ndarray:
        return lane.state.previous.copy()

    def tick(self, lane: NumpyLane, observation: np.ndarray) -> np.ndarray:
        s = lane.state
        if s.tick >= s.stop:
            raise SessionError(f"nothing is promised for tick {s.tick}")
        self.observe(lane, observation)
        return self.act(lane)

    def observe_trusted(self, lane: NumpyLane, observation: np.ndarray) -> None:
        self.observe(lane, observation)

    def tick_trusted(self, lane: NumpyLane, observation: np.ndarray) -> np.ndarray:
        return self.tick(lane, observation)

    def plan(self, lane: NumpyLane, committed: int = 0) -> None:
        self.begin_plan(lane, committed)
        self.log[-1] = ("plan", lane.state.observed, committed)
        while not self.continue_plan(lane):
            pass

    def begin_plan(self, lane: NumpyLane, committed: int) -> None:
        s, c = lane.state, self.config
        assert s.observed >= 0 and s.observed in (s.tick, s.tick - 1) and not s.plan_steps_left
        assert s.observed + committed <= s.stop or committed == 0
        s.plan_tick, s.plan_steps_left = s.observed, c.num_inference_steps
        prefix = np.zeros((c.chunk_size, c.action_dim), np.float32)
        for j in range(committed):
            at = s.plan_tick + j
            prefix[j] = s.previous if at < s.tick else s.queue[at - s.chunk]
        noise = np.random.default_rng((s.seed, s.plan_tick)).normal(size=prefix.shape)
        mask = np.arange(c.chunk_size) < committed
        s.flow = np.where(mask[:, None], prefix, noise)
        s.condition = np.concatenate([s.memory, mask, mask])  # type: ignore[attr-defined]
        s.committed = committed  # type: ignore[attr-defined]
        self.log.append(("begin", s.plan_tick, committed))

    def continue_plan(self, lane: NumpyLane) -> bool:
        s: Any = lane.state
        c = self.config
        assert s.plan_steps_left > 0
        cond = s.condition.copy()
        cond[6:] += np.resize(s.flow, 2 * c.chunk_size)
        v = np.tanh(self.outward @ cond).reshape(s.flow.shape)
        keep = (np.arange(c.chunk_size) < s.committed)[:, None]
        s.flow = np.where(keep, s.flow, s.flow + v / c.num_inference_steps)
        s.plan_steps_left -= 1
        self.log.append(("step", s.plan_tick))
        if s.plan_steps_left:
            return False
        s.queue, s.chunk = s.flow.astype(np.float32), s.plan_tick
        s.stop = s.plan_tick + min(s.committed + c.n_action_steps, c.chunk_size)
        return True

    def cut(self, lane: NumpyLane, stop: int) -> None:
        s = lane.state
        s.stop, s.observed, s.plan_steps_left = stop, -1, 0

    def override(self, lane: NumpyLane, action: np.ndarray) -> None:
        lane.state.previous = np.array(action, np.float32)

    def snapshot(self, lane: NumpyLane, name: str | None = None) -> NumpyCapsule:
        if len(self.capsules) == self.room:
            raise PoolFull("no room")
        capsule = NumpyCapsule(self, copy.deepcopy(lane.state), name)
        self.capsules.add(capsule)
        return capsule

    def keep_boundary(self, lane: NumpyLane) -> NumpyCapsule:
        capsule = self.snapshot(lane)
        lane.kept = [*self.kept_boundaries(lane), capsule]
        return capsule

    def kept_boundaries(self, lane: NumpyLane) -> tuple[NumpyCapsule, ...]:
        return tuple(c for c in lane.kept if not c.is_dropped)

    def check_capsule(self, capsule: NumpyCapsule) -> None:
        if capsule.engine is not self or capsule.state is None:
            raise CapsuleError("the capsule is foreign or dropped")

    def restore(self, lane: NumpyLane, capsule: NumpyCapsule) -> None:
        self.check_capsule(capsule)
        assert capsule.state is not None
        lane.state = copy.deepcopy(capsule.state)

    def fork(self, source: NumpyLane, target: NumpyLane) -> None:
        target.state = copy.deepcopy(source.state)

    def digest(self, lane: NumpyLane) -> str:
        return lane.state.digest()

    def stats(self) -> dict[str, int]:
        return {"allocations": 0, "captures": 0, "compilations": 0}
