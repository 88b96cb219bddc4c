"""The engine of a robot policy: planned, loaded, captured and sealed; one graph replay per verb.

IS: the verbs on lanes (observe, act, tick, plan), and capsules of them. IS NOT: a control loop with
a clock, deadlines or files; see session. Called by: `flashrt.load_policy`, session, commands.

A lane's whole control state is its fixed band: cursor, memory, previous action, queue, and the plan
in the making. An interrupt falls between two replays: the cursor on the device says where.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from flashrt.backends.choose import open_backend
from flashrt.base import tracing
from flashrt.base.errors import CheckpointError, LaneBusy, PlanError, SessionError
from flashrt.base.flags import flags
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.capsule.table import CapsuleTable
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, Progress
from flashrt.core.graph import GraphKey, GraphTable
from flashrt.core.planner import Slot, plan_arena, plan_band
from flashrt.core.region import Role
from flashrt.models.flow_policy.config import PolicyConfig, config_of
from flashrt.models.flow_policy.model import ACT, OBSERVE, PLAN, PLAN_BEGIN, PLAN_STEP, TICK, Policy
from flashrt.ops import OPS
from flashrt.ops.cursor import (
    NO_OBSERVATION,
    PolicyCursor,
    Word,
    checked_vector,
    read_cursor,
    seed_words,
)
from flashrt.ops.table import CURSOR_WORDS, REQUEST_WORDS
from flashrt.weights.bundled_policies import policy_path
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.loader import fill_weights

DEFAULT_POOL_CAPSULES = 256  # that a default pool has room for
# Graphs that touch less run on the calling thread, a millisecond at most: two threads were a third
# faster when both were awake, and ten times slower when one was not.
CPU_ALONE_NBYTES = 32 << 20
Action = NDArray[np.float32]


class PolicyEngine:
    """Verbs on lanes. Built by `load_policy`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        lanes: int = 1,
        pool_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Plan, allocate, load, capture, seal. Raises FlashrtError from any of these."""
        if lanes < 1:
            raise PlanError(f"lanes={lanes}; at least 1 is needed")
        self.config: PolicyConfig = config_of(checkpoint)
        self.model = Policy(self.config)
        self.backend = backend
        backend.build(OPS)
        tapes = [self.model.record(phase, rows) for phase, rows in self.model.phases]
        regions, storage = self.model.lane_regions, backend.storage
        if pool_bytes is None:
            fixed = plan_band([r for r in regions if r.role is Role.FIXED], storage)
            pool_bytes = DEFAULT_POOL_CAPSULES * fixed.nbytes
        plan = plan_arena(regions, tapes, storage, lanes=lanes, pool_nbytes=pool_bytes)
        weights = plan_band([rule.region for rule in self.model.weights], storage)
        self.arena = Arena(backend, plan, weights)
        self.load_report = fill_weights(self.model.weights, checkpoint, self.arena, progress)
        self.fingerprint = self._fingerprint()
        self.lanes = [Lane(i, np.zeros(0, np.int32)) for i in range(lanes)]
        self.capsules = CapsuleTable(self.arena, self.lanes, self.fingerprint)
        self.graphs = GraphTable(backend, self.arena)
        for lane in self.lanes:
            for tape in tapes:
                self.graphs.capture(tape, lane.index)
        self._addresses = {
            (lane.index, slot.region.name): self.arena.memory.address + slot.offset
            for lane in self.lanes
            for band in (plan.lanes[lane.index].fixed, plan.lanes[lane.index].io)
            for slot in band.slots
        }
        self._cursor_words = np.empty(CURSOR_WORDS, np.int32)  # where cursors are read to
        self._cursor_bytes = self._cursor_words.view(np.uint8)
        self._scale, self._offset = self._statistics()
        self._free = self.lanes[::-1]
        self.forgotten: list[Callable[[], None]] = []  # lanes of loops dropped without `close`
        for lane in self.lanes:
            self.reset(lane)
        self.graphs.seal()
        backend.seal()
        tracing.trace(tracing.PLAN, f"{self.stats()}")

    @property
    def device(self) -> str:
        """Name of the backend."""
        return self.backend.name

    # -- lanes ----------------------------------------------------------------------------------

    def take_lane(self) -> Lane:
        """A free lane, reset. Raises LaneBusy when there is none."""
        if not self._free:
            gc.collect()
        while self.forgotten:
            self.forgotten.pop()()
        if not self._free:
            raise LaneBusy(f"all {len(self.lanes)} lanes are in use; release one, or load more")
        lane = self._free.pop()
        self.reset(lane)
        return lane

    def release(self, lane: Lane) -> None:
        """Take a lane back, with its waypoints."""
        for waypoint in list(lane.waypoints):
            self.capsules.drop_waypoint(lane, waypoint)
        self._free.append(lane)

    # -- verbs, a replay each --------------------------------------------------------------------

    def observe(self, lane: Lane, observation: ArrayLike) -> None:
        """An observation, float32 [observation_dim], into the memory; no action is taken.

        Raises ObservationError for another shape or dtype, or a value that is not finite, and
        changes nothing.
        """
        self._write(
            lane,
            "observation",
            checked_vector("observation", observation, self.config.observation_dim),
        )
        self._replay(OBSERVE, lane)

    def act(self, lane: Lane, *, hold: bool = False) -> Action:
        """The coming tick's action, float32 [action_dim], in the environment's units.

        Raises SessionError when the queue has none (`plan` first), unless `hold`: then the action
        before is repeated. Nothing is changed by a refusal.
        """
        self._need_action(lane, hold)
        self._replay(ACT, lane)
        return self._acted(lane)

    def tick(self, lane: Lane, observation: ArrayLike, *, hold: bool = False) -> Action:
        """`observe` and `act` in one replay."""
        checked = checked_vector("observation", observation, self.config.observation_dim)
        self._need_action(lane, hold)
        self._write(lane, "observation", checked)
        self._replay(TICK, lane)
        return self._acted(lane)

    def plan(self, lane: Lane, committed: int = 0) -> None:
        """A new chunk of actions from the last observation, in place of the queue's.

        Row j of the chunk is for tick t + j, t the tick of that observation. The first `committed`
        rows keep the action promised for their tick, bit for bit (after `act`, that of row 0 is the
        one just taken). Then `cursor.stop` = t + committed + n_action_steps, at most t +
        chunk_size. Raises SessionError when there is no fresh observation, or fewer actions were
        promised; nothing is changed then.
        """
        self._write(lane, "request", self._request(lane, committed))
        self._replay(PLAN, lane)

    def begin_plan(self, lane: Lane, committed: int = 0) -> None:
        """`plan` in slices: begins one, in place of any that is in the making."""
        self._write(lane, "request", self._request(lane, committed))
        self._replay(PLAN_BEGIN, lane)

    def continue_plan(self, lane: Lane) -> bool:
        """One Euler step of the plan in the making; True when that was the last, and the queue was
        replaced. Ticks may lie between steps. Raises SessionError if none is in the making.
        """
        left = self.cursor(lane).plan_steps_left
        if not 1 <= left <= self.config.num_inference_steps:
            raise SessionError(f"lane {lane.index}: no plan is in the making; begin_plan first")
        self._replay(PLAN_STEP, lane, self.config.num_inference_steps - left + 1)
        return left == 1

    # -- words and regions -----------------------------------------------------------------------

    def cursor(self, lane: Lane) -> PolicyCursor:
        """The lane's time, read from the device."""
        return read_cursor(self._words(lane))

    def reset(self, lane: Lane, seed: int = 0) -> None:
        """The empty state before tick 0; `seed` is that of the noise of plans."""
        words = seed_words(seed)
        self.capsules.reset(lane)
        self._write(lane, "cursor", words, Word.SEED_LOW)
        self._write_word(lane, Word.OBSERVED, NO_OBSERVATION)

    def set_seed(self, lane: Lane, seed: int) -> None:
        """Other noise for plans from here on, as of a fork."""
        self._write(lane, "cursor", seed_words(seed), Word.SEED_LOW)

    def cut(self, lane: Lane, stop: int = 0) -> None:
        """An interrupt: the queue has no action from tick `stop` on, no plan is in the making, and
        none is made from what was observed so far.
        """
        self._write_word(lane, Word.STOP, max(0, min(stop, self.cursor(lane).stop)))
        self._write_word(lane, Word.PLAN_STEPS_LEFT, 0)
        self._write_word(lane, Word.OBSERVED, NO_OBSERVATION)

    def action(self, lane: Lane) -> Action:
        """The action executed last, [action_dim] in the environment's units; 0 after a reset."""
        out = np.empty(self.config.action_dim, np.float32)
        self.backend.read(self._addresses[lane.index, "action"], out.view(np.uint8))
        return out

    def override(self, lane: Lane, action: ArrayLike) -> None:
        """Something else than the last action was executed: this, [action_dim], in the
        environment's units. Raises ObservationError, as `observe` does.
        """
        executed = checked_vector("action", action, self.config.action_dim)
        previous = np.clip((executed - self._offset) / self._scale, -1, 1).astype(np.float32)
        self._write(lane, "previous", previous)
        self._write(lane, "action", executed)

    def lane_array(self, lane: Lane, name: str) -> NDArray[np.generic]:
        """A lane's region as an array; see models.policy for their names."""
        return self.arena.read(self.arena.lane(lane.index).slot(name))

    def set_lane_array(self, lane: Lane, name: str, array: NDArray[np.generic]) -> None:
        """Overwrite a lane's region, for ablations and experiments. Raises PlanError for a wrong
        name, shape or dtype.
        """
        slot = self.arena.lane(lane.index).slot(name)
        wanted = self.arena.read(slot).dtype
        if array.dtype != wanted:
            raise PlanError(f"region {name!r} is {wanted}, got {array.dtype}")
        self.arena.write(slot, array)

    # -- capsules ---------------------------------------------------------------------------------

    def snapshot(
        self, lane: Lane, name: str | None = None, parent: Capsule | None = None
    ) -> Capsule:
        """Freeze a lane between two verbs. Raises PoolFull and changes nothing."""
        return self.capsules.snapshot(lane, name, parent)

    def restore(self, lane: Lane, capsule: Capsule) -> None:
        """Put a lane into a capsule's state. Raises CapsuleError and changes nothing."""
        self.capsules.restore(lane, capsule)

    def fork(self, source: Lane, target: Lane) -> None:
        """Put `target` into the present state of `source`."""
        self.capsules.fork(source, target)

    def digest(self, lane: Lane) -> str:
        """32 hex digits of a lane's state; a capsule of it has the same."""
        return self.capsules.digest_lane(lane)

    # -- the rest ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, in bytes."""
        plan, pool = self.arena.plan, self.capsules.pool
        return {
            **dataclasses.asdict(self.backend.counters),
            "device": self.device,
            "graphs": len(self.graphs.graphs),
            "lanes": len(self.lanes),
            "arena_bytes": plan.nbytes,
            "weights_bytes": self.arena.weights.nbytes,
            "fixed_bytes": plan.lanes[0].fixed.nbytes,
            "scratch_bytes": plan.scratch.nbytes,
            "pool_bytes": pool.nbytes,
            "pool_used_bytes": pool.used_nbytes,
            "capsules": len(self.capsules.capsules),
        }

    def close(self) -> None:
        """Give the device's memory back; lanes and capsules are dead."""
        self.backend.close()

    # -- inside -----------------------------------------------------------------------------------

    def _replay(self, phase: str, lane: Lane, rows: int = 1) -> None:
        self.graphs.replay(GraphKey(phase, rows, lane.index))
        if flags().poison:
            self.arena.poison_scratch()

    def _words(self, lane: Lane) -> list[int]:
        self.backend.read(self._addresses[lane.index, "cursor"], self._cursor_bytes)
        return self._cursor_words.tolist()

    def _need_action(self, lane: Lane, hold: bool) -> None:
        words = self._words(lane)
        if not hold and words[Word.TICK] >= words[Word.STOP]:
            raise SessionError(
                f"lane {lane.index}: the queue has no action for tick {words[Word.TICK]}; observe "
                "and plan, or hold the action before (hold=True)"
            )

    def _request(self, lane: Lane, committed: int) -> NDArray[np.int32]:
        """What a plan is asked for, checked against the cursor."""
        c = self.cursor(lane)
        if c.observed == NO_OBSERVATION or c.observed < c.tick - 1:
            seen = "none" if c.observed == NO_OBSERVATION else f"of tick {c.observed}"
            raise SessionError(
                f"lane {lane.index}: a plan wants the observation of tick {c.tick} or the one "
                f"before, the last is {seen}; observe first"
            )
        promised = max(c.stop, c.tick) - c.observed  # ticks done have their action
        most = min(promised, self.config.chunk_size - 1)
        if not 0 <= committed <= most:
            raise SessionError(
                f"lane {lane.index}: committed={committed} is not in [0, {most}]: actions are "
                f"promised for ticks [{c.observed}, {c.observed + promised})"
            )
        words = np.zeros(REQUEST_WORDS, np.int32)
        words[0] = committed
        return words

    def _acted(self, lane: Lane) -> Action:
        action = self.action(lane)
        if not np.isfinite(action).all():
            raise CheckpointError(f"the action is {action}: the policy's weights overflow")
        return action

    def _write(self, lane: Lane, name: str, array: NDArray[np.generic], word: int = 0) -> None:
        self.backend.write(self._addresses[lane.index, name] + 4 * word, array.view(np.uint8))

    def _write_word(self, lane: Lane, word: Word, value: int) -> None:
        self._write(lane, "cursor", np.array([value], np.int32), word)

    def _statistics(self) -> tuple[Action, Action]:
        """Scale and offset of actions, all statistics checked. Raises CheckpointError."""
        found = {
            slot.region.name: self._weight(slot)
            for slot in self.arena.weights.slots
            if slot.region.name.startswith("stats.")
        }
        for name, values in found.items():
            is_divisor = name.endswith(("std", "scale"))
            if not np.isfinite(values).all() or (is_divisor and (values <= 0).any()):
                wanted = "positive" if is_divisor else "finite"
                raise CheckpointError(f"{name} is {values}; {wanted} numbers are needed")
        return found["stats.action.scale"], found["stats.action.offset"]

    def _weight(self, slot: Slot) -> Action:
        """A weight vector as it is on the device."""
        out = np.empty(slot.region.size, np.float32)
        address = self.arena.weight_memory.address + slot.offset
        self.backend.read(address, out.view(np.uint8))
        return out

    def _fingerprint(self) -> str:
        """Identity of weights + config + kernels + what capsules look like; 32 hex digits."""
        described: dict[str, object] = {
            "format": 1,
            "model": self.model.name,
            "config": dataclasses.asdict(dataclasses.replace(self.config, card={})),
            "weights": self.load_report.digest,
            "kernels": self.backend.kernel_digest,
            "device": self.backend.name,
            "fixed": [
                (s.region.name, s.region.shape, s.region.dtype, s.offset)
                for s in self.arena.lane(0).fixed.slots
            ],
        }
        return xxhash.xxh3_128(json.dumps(described, sort_keys=True).encode()).hexdigest()


def load_policy(
    checkpoint: str | os.PathLike[str],
    device: str = "auto",
    lanes: int = 1,
    pool_bytes: int | None = None,
    *,
    progress: Progress | None = None,
) -> PolicyEngine:
    """Load a policy: a directory with config.json and model.safetensors, or a bundled one by name.

    device: "cpu", "cuda", "simt", or "auto": cuda where it is usable, else cpu. lanes: states that
    live at once. pool_bytes: room for capsules (default: 256 of them). progress(what, done, total)
    is called while loading. Raises CheckpointError, BackendError, PlanError.
    """
    source = open_checkpoint(policy_path(checkpoint))
    config_of(source)
    backend = open_backend(device, cpu_alone_nbytes=CPU_ALONE_NBYTES)
    return PolicyEngine(source, backend, lanes=lanes, pool_bytes=pool_bytes, progress=progress)
