"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844) as LeRobot has it: cameras, a task and a state.

IS: the regions of a lane and the phases. IS NOT: config fields (config), the VLM's files (vlm),
weights (weights), launches (tapes), when to plan (robot/schedule) or kernels (ops/).

A chunk of actions is integrated from noise by Euler's method, S steps from time 1 to 0. Its rows
see what a plan stands on: see models.prefix. What is state: the cursor, the queue, the action
executed last, the chunk in the making, and the rows of the observation that was planned from last.
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
from flashrt.models.prefix import LOOK, READ, READ_STATE, prefix_regions
from flashrt.models.scaling import Scaling
from flashrt.models.sight import LEAST_ROWS
from flashrt.models.smolvla.config import SmolVlaConfig, parse_config
from flashrt.models.smolvla.tapes import SmolVlaRecorder
from flashrt.models.smolvla.vlm import Vlm, tokenizer_file, vlm_of
from flashrt.models.smolvla.weights import Weights, named, scaling_of
from flashrt.models.vla.reading import Words, reading_of
from flashrt.ops import table as ops
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.lerobot import Mode

Action = NDArray[np.float32]
_SHARED = (OBSERVE_EACH, ACT_EACH, TICK_EACH)  # plans fill a device alone


class SmolVla:
    """Regions, weight rules and tapes of one policy.

    The `rows` of a phase are 1, but for LOOK, where they number the cameras, READ, where they are
    the rows that a block has room for, and PLAN_STEP, where they number the Euler steps; from 1.
    """

    name = "smolvla"
    has_memory = False
    action_limit = float("inf")
    cut_off = ()

    def __init__(
        self,
        config: SmolVlaConfig,
        vlm: Vlm,
        scaling: Scaling,
        words: Words,
        checkpoint: Checkpoint,
        weights: str | None = None,
    ) -> None:
        """Raises CheckpointError for images that are normalised, or too small to be told apart."""
        self.config = config
        self.parts = config.parts
        guided = ("target", "weights") if config.guidance is not None else ()
        self.finite = ("previous", "action", "queue", "kept", "flow", "state", *guided)
        self.filled = Weights(config, vlm, scaling, checkpoint, weights)
        self.weights = self.filled.rules
        self.positive = ("stats.observation.state.std",)
        self.cameras = config.cameras
        self.rows_per_camera = self.filled.tower.tokens
        _check_images(config, scaling, self.rows_per_camera)
        self.most_block_rows = (
            len(config.cameras) * self.rows_per_camera + config.tokenizer_max_length
        )
        self.state_rows = 1
        self.most_prefix_rows = self.most_block_rows + self.state_rows
        self.vocab_size = vlm.vocab_size
        modes = {name: str(mode) for name, mode in scaling.modes.items()}
        self.identity: Mapping[str, object] = dataclasses.asdict(config) | {
            "modes": modes,
            "vlm": dataclasses.asdict(vlm),
        }
        self.inputs: tuple[Input, ...] = ()  # see engine.prefix
        self.lane_regions = _lane_regions(self)
        self.phases: tuple[tuple[str, int], ...] = (
            *((phase, 1) for phase in (OBSERVE, ACT_PHASE, TICK, PLAN, PLAN_BEGIN)),
            *((PLAN_STEP, step + 1) for step in range(config.num_steps)),
            *((LOOK, camera + 1) for camera in range(len(config.cameras))),
            (READ, self.most_block_rows),
            (READ_STATE, 1),
        )
        self._words = words
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def task_tokens(self, task: str, state: Action) -> list[int]:
        """See PrefixModel."""
        del state  # it has a row of its own
        return self._words.tokens(self._words.reading.line(task))

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
        recorder = SmolVlaRecorder(self.filled, self._regions, tape)
        if phase in (OBSERVE, TICK):
            recorder.see()
        if phase in (ACT_PHASE, TICK):
            recorder.act()
        if phase in (PLAN, PLAN_BEGIN):
            recorder.begin()
        if phase == PLAN:
            recorder.integrate(0, self.config.num_steps)
        if phase == PLAN_STEP:
            recorder.integrate(rows - 1, rows)
        if phase == LOOK:
            recorder.look(rows - 1)
        if phase == READ:
            recorder.read()
        if phase == READ_STATE:
            recorder.read_state()
        return tape


def _check_images(c: SmolVlaConfig, scaling: Scaling, rows: int) -> None:
    for camera in c.cameras:
        if scaling.modes[camera.name] is not Mode.IDENTITY:
            raise CheckpointError(
                f"{scaling.inputs.file}: {camera.name} is normalised by "
                f"{scaling.modes[camera.name]}; images are supported as they are (IDENTITY)"
            )
    if rows < LEAST_ROWS:
        raise CheckpointError(
            f"an image becomes {rows} rows; {LEAST_ROWS} are needed to tell it from others"
        )


def _lane_regions(model: SmolVla) -> tuple[Region, ...]:
    c, v = model.config, model.filled.vlm

    def fixed(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.F32, Role.FIXED, is_digested=True)

    positions = model.most_prefix_rows + c.chunk_size
    layers = range(c.num_vlm_layers)
    crossed = sum(c.has_expert(i) and not c.sees_itself(i) for i in layers)
    kept = kv_regions(
        "keys", "values", (c.num_vlm_layers * v.kv_heads, positions, v.head_dim), DType.F32
    )
    if crossed:
        shape = (crossed * v.kv_heads, positions, v.head_dim)
        kept += kv_regions("cross_keys", "cross_values", shape, DType.F32)
    guided = (fixed("target", c.chunk_size, c.max_action_dim), fixed("weights", c.chunk_size))
    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED, is_digested=True),
        fixed("previous", c.action_dim),  # the action executed last, normalised
        fixed("action", c.action_dim),  # the same in the environment's units
        fixed("queue", c.chunk_size, c.action_dim),  # normalised
        fixed("kept", c.chunk_size * (c.action_dim + 1)),  # of the plan in the making: see ops
        fixed("flow", c.chunk_size, c.max_action_dim),  # likewise
        fixed("state", 1, c.state_dim),  # of the observation that was planned from last
        *(guided if c.guidance is not None else ()),
        Region("journal", (1, positions, 1), DType.I32, Role.ROWS, Layout.PLAIN, is_digested=True),
        *kept,
        *prefix_regions(c.cameras, model.rows_per_camera, model.most_block_rows, v.hidden),
        Region("given", (c.chunk_size, c.max_action_dim), DType.F32, Role.IO),
        Region("request", (ops.REQUEST_WORDS,), DType.I32, Role.IO),
    )


def smolvla_of(checkpoint: Checkpoint, weights: str | None = None) -> tuple[SmolVla, Checkpoint]:
    """The model of a policy's checkpoint, and the checkpoint as its weight rules name it.
    `weights`: see flashrt.load. Raises CheckpointError; PlanError.
    """
    try:
        config = parse_config(checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    source, reading = named(checkpoint), reading_of(checkpoint.path)
    config = dataclasses.replace(config, tokenizer_max_length=reading.most)
    vlm = vlm_of(source, config)
    tokenizer = Tokenizer(tokenizer_file(checkpoint.path, config, reading))
    words = Words(tokenizer, reading, vlm.vocab_size)
    model = SmolVla(config, vlm, scaling_of(source, config), words, source, weights)
    return model, model.filled.checkpoint
