"""A policy on a vision-language model: the regions of a lane, its phases, and what they record.

IS: what families have in common, see `Vla`. IS NOT: layers, weights, words, or a config.

A chunk of actions is integrated from noise by Euler's method, S steps from time 1 to 0. Its rows
see what a plan stands on: see models.prefix. What is state: the cursor, the queue, the action
executed last, the chunk in the making, and the rows of the observation that was planned from last.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.core.region import DType, Layout, Operand, Region, Role, as_view
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.actions import (
    ACT_EACH,
    ACT_PHASE,
    OBSERVE,
    OBSERVE_EACH,
    PLAN,
    PLAN_BEGIN,
    PLAN_STEP,
    SHARED,
    TICK,
    TICK_EACH,
    ActionConfig,
    Input,
    Part,
)
from flashrt.models.blocks import bias_name
from flashrt.models.chunks import ChunkRecorder
from flashrt.models.features import Camera
from flashrt.models.prefix import LOOK, READ, READ_STATE, prefix_regions
from flashrt.models.scaling import Scaling
from flashrt.models.sight import LEAST_ROWS
from flashrt.models.vla.guidance import Guidance
from flashrt.ops import table as ops
from flashrt.weights.lerobot import Mode
from flashrt.weights.rules import WeightRule

Action = NDArray[np.float32]
_SHARED = (OBSERVE_EACH, ACT_EACH, TICK_EACH)  # plans fill a device alone


class VlaConfig(ActionConfig, Protocol):
    """Sizes that every family has."""

    @property
    def cameras(self) -> tuple[Camera, ...]: ...
    @property
    def parts(self) -> tuple[Part, ...]: ...
    @property
    def max_action_dim(self) -> int:
        """Columns of a chunk in the making; the first `action_dim` are actions."""
        ...

    @property
    def tokenizer_max_length(self) -> int:
        """Tokens of an instruction, at most."""
        ...

    @property
    def guidance(self) -> Guidance | None: ...


class VlaRecorder(ChunkRecorder, abc.ABC):
    """Records the launches of one tape; families say what lies between."""

    config: VlaConfig

    @abc.abstractmethod
    def look(self, camera: int) -> None:
        """What the tower makes of an image, among the rows of all cameras."""

    @abc.abstractmethod
    def read(self) -> None:
        """Rows of images and of the instruction, which all see each other."""

    def read_state(self) -> None:
        """The state's row, in families that have one. Raises PlanError in others."""
        raise PlanError(f"tape {self.tape.phase}: the state has no row")

    @abc.abstractmethod
    def velocity(self, step: int) -> Region:
        """Of the actions at an Euler step, [chunk_size, max_action_dim]."""

    def dense(
        self, layer: str, x: Operand, y: Operand, bias: Operand | None = None,
        activation: int = ops.IDENTITY,
    ) -> None:  # fmt: skip
        """A dense layer in float32, over rows."""
        rows, width = as_view(y).shape
        self.tape.record(
            ops.CONV2D, x=as_view(x).reshape(1, rows, 1, as_view(x).shape[1]),
            w=self.regions[layer], b=bias or self.regions[bias_name(layer)],
            y=as_view(y).reshape(1, rows, 1, width), taps_y=1, taps_x=1, stride=1, padding=0,
            dilation=1, activation=activation,
        )  # fmt: skip

    def begin(self) -> None:
        """Promised rows, and noise."""
        regions = self.regions
        self.keep_promised()
        self.launch(
            ops.FLOW_NOISE, given=regions["given"], request=regions["request"], x=regions["flow"]
        )

    def integrate(self, first: int, stop: int) -> None:
        """Euler steps [first, stop); the last of all puts the chunk into force."""
        c, regions = self.config, self.regions
        for step in range(first, stop):
            self.tape.scope = f"step {step}: "
            v = self.velocity(step)
            if c.guidance is not None:
                time = 1.0 + step * (-1.0 / c.num_inference_steps)
                self.tape.record(
                    ops.GUIDE, x=regions["flow"], target=regions["target"],
                    weights=regions["weights"], v=v, time=time,
                    strength=c.guidance.strength(time),
                )  # fmt: skip
            self.launch(ops.EULER, v=v, x=regions["flow"], step=-1.0 / c.num_inference_steps)
        if stop == c.num_inference_steps:
            self.put_in_force(regions["flow"].view().cols(0, c.action_dim))


class Vla:
    """Regions and tapes of one policy.

    The `rows` of a phase are 1, but for LOOK, where they number the cameras, READ, where they are
    the rows that a block has room for, and PLAN_STEP, where they number the Euler steps; from 1.
    """

    has_memory = False
    action_limit = float("inf")
    cut_off = ()
    inputs: tuple[Input, ...] = ()  # see engine.prefix

    def __init__(
        self,
        name: str,
        config: VlaConfig,
        rules: Sequence[WeightRule],
        rows_per_camera: int,
        hidden: int,
        kept: Callable[[int], Sequence[Region]],
        recorder: Callable[[Mapping[str, Region], Tape], VlaRecorder],
        state_dim: int = 0,
    ) -> None:
        """rules: of weights. rows_per_camera, hidden: what the tower makes of an image. kept: rows
        of keys and values, of so many positions. state_dim: numbers of a state that has a row of
        its own.
        """
        self.name = name
        self.config = config
        self.parts = config.parts
        self.cameras = config.cameras
        self.weights = tuple(rules)
        self.rows_per_camera = rows_per_camera
        self.state_rows = int(state_dim > 0)
        self.most_block_rows = len(config.cameras) * rows_per_camera + config.tokenizer_max_length
        self.most_prefix_rows = self.most_block_rows + self.state_rows
        guided = ("target", "weights") if config.guidance is not None else ()
        state = ("state",) if state_dim else ()
        self.finite = ("previous", "action", "queue", "kept", "flow", *state, *guided)
        self.lane_regions = _lane_regions(self, hidden, kept, state_dim)
        self.phases: tuple[tuple[str, int], ...] = (
            *((phase, 1) for phase in (OBSERVE, ACT_PHASE, TICK, PLAN, PLAN_BEGIN)),
            *((PLAN_STEP, step + 1) for step in range(config.num_inference_steps)),
            *((LOOK, camera + 1) for camera in range(len(config.cameras))),
            (READ, self.most_block_rows),
            *((READ_STATE, 1) for _ in range(self.state_rows)),
        )
        self._recorder = recorder
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def guided(
        self, left_over: Action | None, delay: int, horizon: int | None
    ) -> dict[str, Action]:
        """See PrefixModel."""
        c = self.config
        if c.guidance is None:
            return {}
        target = np.zeros((c.chunk_size, c.max_action_dim), np.float32)
        weights = np.zeros(c.chunk_size, np.float32)
        if left_over is not None:
            n = min(len(left_over), c.chunk_size)
            target[:n, : c.action_dim] = left_over[:n]
            weights = c.guidance.weights(c.chunk_size, len(left_over), delay, horizon)
        return {"target": target, "weights": weights}

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model. Chunks of several lanes are made one after the other."""
        return tuple((phase, 1) for phase in _SHARED) if lanes > 1 else ()

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        if (phase, rows) not in (*self.phases, *self.shared_phases(MAX_RUNS)):
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows")
        # Rows of a chunk are more than what the phase of a plan has by name.
        is_plan = phase in (PLAN, PLAN_STEP)
        tape = Tape(phase, rows, run_rows=self.config.chunk_size if is_plan else 0)
        if phase in SHARED:
            tape = Tape(phase, rows, MAX_RUNS, is_apart=True)
            phase = SHARED[phase]
        recorder = self._recorder(self._regions, tape)
        if phase in (OBSERVE, TICK):
            recorder.see()
        if phase in (ACT_PHASE, TICK):
            recorder.act()
        if phase in (PLAN, PLAN_BEGIN):
            recorder.begin()
        if phase == PLAN:
            recorder.integrate(0, self.config.num_inference_steps)
        if phase == PLAN_STEP:
            recorder.integrate(rows - 1, rows)
        if phase == LOOK:
            recorder.look(rows - 1)
        if phase == READ:
            recorder.read()
        if phase == READ_STATE:
            recorder.read_state()
        return tape


def check_images(cameras: Sequence[Camera], scaling: Scaling, rows: int) -> None:
    """Raises CheckpointError for images that are normalised, or become too few rows to be told
    apart.
    """
    for camera in cameras:
        if scaling.modes[camera.name] is not Mode.IDENTITY:
            raise CheckpointError(
                f"{scaling.inputs.file}: {camera.name} is normalised by "
                f"{scaling.modes[camera.name]}; images are supported as they are (IDENTITY)"
            )
    if rows < LEAST_ROWS:
        raise CheckpointError(
            f"an image becomes {rows} rows; {LEAST_ROWS} are needed to tell it from others"
        )


def _lane_regions(
    model: Vla, hidden: int, kept: Callable[[int], Sequence[Region]], state_dim: int
) -> tuple[Region, ...]:
    c = model.config

    def fixed(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.F32, Role.FIXED, is_digested=True)

    positions = model.most_prefix_rows + c.chunk_size
    journal = (1, positions, 1)
    guided = (fixed("target", c.chunk_size, c.max_action_dim), fixed("weights", c.chunk_size))
    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED, is_digested=True),
        fixed("previous", c.action_dim),  # the action executed last, normalised
        fixed("action", c.action_dim),  # the same in the environment's units
        fixed("queue", c.chunk_size, c.action_dim),  # normalised
        fixed("kept", c.chunk_size * (c.action_dim + 1)),  # of the plan in the making: see ops
        fixed("flow", c.chunk_size, c.max_action_dim),  # likewise
        # Of the observation that was planned from last.
        *((fixed("state", 1, state_dim),) if state_dim else ()),
        *(guided if c.guidance is not None else ()),
        Region("journal", journal, DType.I32, Role.ROWS, Layout.PLAIN, is_digested=True),
        *kept(positions),
        *prefix_regions(c.cameras, model.rows_per_camera, model.most_block_rows, hidden),
        Region("given", (c.chunk_size, c.max_action_dim), DType.F32, Role.IO),
        Region("request", (ops.REQUEST_WORDS,), DType.I32, Role.IO),
    )
