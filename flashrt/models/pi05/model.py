"""pi0.5 (Physical Intelligence 2025, arXiv 2504.16054) as LeRobot has it: cameras, a task, a state.

IS: the regions of a lane and the phases. IS NOT: config fields (config), sizes (sizes), weights
(weights), text (text), launches (tapes), when to plan (robot/schedule) or kernels (ops/).

A chunk of actions is integrated from noise by Euler's method, S steps from time 1 to 0. Its rows
see what a plan stands on: see models.prefix. The state is part of the text, so all of a plan's rows
are one block, and another state makes the block anew. What is state: the cursor, the queue, the
action executed last, the chunk in the making, and the rows of the observation that was planned from
last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.core.region import DType, Layout, Region, Role
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
    Input,
)
from flashrt.models.lane import kv_regions
from flashrt.models.pi05.config import Pi05Config, parse_config
from flashrt.models.pi05.sizes import named, sizes_of
from flashrt.models.pi05.tapes import Pi05Recorder
from flashrt.models.pi05.text import Text, tokenizer_of
from flashrt.models.pi05.weights import Weights, scaling_of
from flashrt.models.prefix import LOOK, READ, prefix_regions
from flashrt.models.scaling import Scaling
from flashrt.models.sight import LEAST_ROWS
from flashrt.models.vla.reading import Words, reading_of
from flashrt.ops import table as ops
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.lerobot import Mode

_SHARED = (OBSERVE_EACH, ACT_EACH, TICK_EACH)  # plans fill a device alone


class Pi05:
    """Regions, weight rules and tapes of one policy.

    The `rows` of a phase are 1, but for LOOK, where they number the cameras, READ, where they are
    the rows that a block has room for, and PLAN_STEP, where they number the Euler steps; from 1.
    """

    name = "pi05"
    has_memory = False
    action_limit = float("inf")
    cut_off = ()
    positive = ()
    state_rows = 0  # of a plan: the state is in the text

    def __init__(self, config: Pi05Config, filled: Weights, text: Text, words: Words) -> None:
        """Raises CheckpointError for images that are normalised, or that do not fit the tower."""
        self.config = config
        self.filled = filled
        self.parts = config.parts
        guided = ("target", "weights") if config.guidance is not None else ()
        self.finite = ("previous", "action", "queue", "kept", "flow", *guided)
        self.weights = filled.rules
        self.cameras = config.cameras
        self.vocab_size = filled.sizes.vocab_size
        self.rows_per_camera = filled.tower.tokens
        _check_images(config, filled)
        self.most_block_rows = (
            len(config.cameras) * self.rows_per_camera + config.tokenizer_max_length
        )
        self.most_prefix_rows = self.most_block_rows
        self.identity: Mapping[str, object] = dataclasses.asdict(config) | {
            "modes": {name: str(mode) for name, mode in filled.scaling.modes.items()},
            "sizes": dataclasses.asdict(filled.sizes),
        }
        self.inputs: tuple[Input, ...] = ()  # see engine.prefix
        self.lane_regions = _lane_regions(self)
        self.phases: tuple[tuple[str, int], ...] = (
            *((phase, 1) for phase in (OBSERVE, ACT_PHASE, TICK, PLAN, PLAN_BEGIN)),
            *((PLAN_STEP, step + 1) for step in range(config.num_inference_steps)),
            *((LOOK, camera + 1) for camera in range(len(config.cameras))),
            (READ, self.most_block_rows),
        )
        self._text, self._words = text, words
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def guided(
        self, left_over: NDArray[np.float32] | None, delay: int, horizon: int | None
    ) -> dict[str, NDArray[np.float32]]:
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

    def task_tokens(self, task: str, state: NDArray[np.float32]) -> list[int]:
        """See PrefixModel."""
        return self._words.tokens(self._text.of(task, state))

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
        recorder = Pi05Recorder(self.filled, self._regions, tape)
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
        return tape


def _check_images(c: Pi05Config, filled: Weights) -> None:
    scaling: Scaling = filled.scaling
    for camera in c.cameras:
        if scaling.modes[camera.name] is not Mode.IDENTITY:
            raise CheckpointError(
                f"{scaling.inputs.file}: {camera.name} is normalised by "
                f"{scaling.modes[camera.name]}; images are supported as they are (IDENTITY)"
            )
    if c.side % filled.sizes.patch:
        raise CheckpointError(
            f"image_resolution {c.side} is no multiple of the tower's patches of "
            f"{filled.sizes.patch} pixels"
        )
    if filled.tower.tokens < LEAST_ROWS:
        raise CheckpointError(
            f"an image becomes {filled.tower.tokens} rows; {LEAST_ROWS} are needed to tell it from "
            "others"
        )


def _lane_regions(model: Pi05) -> tuple[Region, ...]:
    c, s = model.config, model.filled.sizes

    def fixed(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.F32, Role.FIXED, is_digested=True)

    positions = model.most_prefix_rows + c.chunk_size
    guided = (fixed("target", c.chunk_size, c.max_action_dim), fixed("weights", c.chunk_size))
    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED, is_digested=True),
        fixed("previous", c.action_dim),  # the action executed last, normalised
        fixed("action", c.action_dim),  # the same in the environment's units
        fixed("queue", c.chunk_size, c.action_dim),  # normalised
        fixed("kept", c.chunk_size * (c.action_dim + 1)),  # of the plan in the making: see ops
        fixed("flow", c.chunk_size, c.max_action_dim),  # likewise
        *(guided if c.guidance is not None else ()),
        Region("journal", (1, positions, 1), DType.I32, Role.ROWS, Layout.PLAIN, is_digested=True),
        *kv_regions("keys", "values", (s.depth * s.kv_heads, positions, s.head_dim), DType.F32),
        *prefix_regions(c.cameras, model.rows_per_camera, model.most_block_rows, s.hidden),
        Region("given", (c.chunk_size, c.max_action_dim), DType.F32, Role.IO),
        Region("request", (ops.REQUEST_WORDS,), DType.I32, Role.IO),
    )


def pi05_of(checkpoint: Checkpoint, weights: str | None = None) -> tuple[Pi05, Checkpoint]:
    """The model of a policy's checkpoint, and the checkpoint as its weight rules name it.
    `weights`: see flashrt.load. Raises CheckpointError; PlanError.
    """
    try:
        config = parse_config(checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    root, source, reading = checkpoint.path, named(checkpoint), reading_of(checkpoint.path)
    config = dataclasses.replace(config, tokenizer_max_length=reading.most)
    filled = Weights(config, sizes_of(source), scaling_of(source, config), source, weights)
    words = Words(tokenizer_of(root, reading.name), reading, filled.sizes.vocab_size)
    return Pi05(config, filled, Text(root, filled), words), filled.checkpoint
