"""Robot policies: an encoder, a recurrent memory, and a flow-matching head that plans a chunk.

IS: the regions of a lane, the weight rules, and the launches of each phase. IS NOT: config fields
(config), when to plan (robot/schedule) or kernels (ops/).

The head is integrated from noise to actions along x' = v(x, t), the rectified form of flow matching
(Lipman et al. 2023, arXiv 2210.02747), S Euler steps of 1 / S. Rows of the chunk that are promised
already keep their action and are marked, as in training-time action conditioning for real-time
chunking (Black et al. 2025, arXiv 2512.05964).
"""

from __future__ import annotations

import dataclasses
import math

from flashrt.base.errors import PlanError
from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Operand, Region, Role, View
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.actions import (
    ACT_PHASE,
    OBSERVE,
    PLAN,
    PLAN_BEGIN,
    PLAN_STEP,
    SHARED,
    TICK,
    Input,
    Stacks,
)
from flashrt.models.flow_policy.config import FREQUENCIES, TIME_FEATURES, PolicyConfig
from flashrt.ops import table as ops
from flashrt.weights.rules import WeightRule, dense, vector


class FlowPolicy:
    """Regions, weight rules and tapes of one policy.

    The `rows` of a phase are 1, but for PLAN_STEP and PLAN_STEP_EACH, where they number the Euler
    steps from 1.
    """

    name = "policy"
    parts = ()
    has_memory = True
    action_limit = 1.0
    finite = ("memory", "encoded", "previous", "action", "queue")
    cut_off = ()
    positive = ("stats.observation.std", "stats.action.scale")
    scaling = None

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.inputs = (Input("observation", 0, config.observation_dim),)
        self.identity = dataclasses.asdict(dataclasses.replace(config, card={}))
        self.stacks: Stacks = {
            "encoder": {"num_hidden_layers": 2, "hidden_size": config.encoder_dim},
            "memory": {"type": "gru", "hidden_size": config.memory_dim},
            "head": {"num_blocks": config.head_blocks, "hidden_size": config.head_dim},
        }
        self.weights = weight_rules(config)
        self.lane_regions = _lane_regions(config)
        self.phases: tuple[tuple[str, int], ...] = (
            *((phase, 1) for phase in (OBSERVE, ACT_PHASE, TICK, PLAN, PLAN_BEGIN)),
            *((PLAN_STEP, step + 1) for step in range(config.num_inference_steps)),
        )
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model. Each lane has launches of its own, in one replay."""
        if lanes < 2:
            return ()
        pairs = ((each, own) for each in SHARED for own in self.phases)
        return tuple((each, rows) for each, (phase, rows) in pairs if phase == SHARED[each])

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        if (phase, rows) not in (*self.phases, *self.shared_phases(MAX_RUNS)):
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows")
        tape = Tape(phase, rows)
        if phase in SHARED:
            tape = Tape(phase, rows, MAX_RUNS, is_apart=True)
            phase = SHARED[phase]
        recorder = FlowRecorder(self.config, self._regions, tape)
        if phase in (OBSERVE, TICK):
            recorder.observe()
        if phase in (ACT_PHASE, TICK):
            recorder.act()
        if phase in (PLAN, PLAN_BEGIN):
            recorder.begin()
        if phase == PLAN:
            recorder.integrate(0, self.config.num_inference_steps)
        if phase == PLAN_STEP:
            recorder.integrate(rows - 1, rows)
        return tape


def weight_rules(c: PolicyConfig) -> tuple[WeightRule, ...]:
    """All rules; regions are called as their tensors."""
    rules = [
        _vector("stats.observation.mean", c.observation_dim),
        _vector("stats.observation.std", c.observation_dim),
        *_layer("encoder.0", c.encoder_dim, c.observation_dim + c.action_dim),
        *_layer("encoder.1", c.encoder_dim, c.encoder_dim),
        _matrix("memory.weight_ih", 3 * c.memory_dim, c.encoder_dim),
        _vector("memory.bias_ih", 3 * c.memory_dim),
        _matrix("memory.weight_hh", 3 * c.memory_dim, c.memory_dim),
        _vector("memory.bias_hh", 3 * c.memory_dim),
        *_layer("head.condition", c.head_dim, c.memory_dim + c.encoder_dim),
        _matrix("head.time.weight", c.head_dim, TIME_FEATURES),
        _matrix("head.input.weight", c.head_dim, c.flow_size),
    ]
    for block in range(c.head_blocks):
        for layer in range(2):
            rules += _layer(f"head.blocks.{block}.{layer}", c.head_dim, c.head_dim)
    return (
        *rules,
        *_layer("head.output", c.chunk_size * c.action_dim, c.head_dim),
        _vector("stats.action.scale", c.action_dim),
        _vector("stats.action.offset", c.action_dim),
        _time_features(c.num_inference_steps),
    )


def time_features(t: float) -> tuple[float, ...]:
    """Of a time in [0, 1): the sine of each frequency, then the cosine of each."""
    angles = [2 * math.pi * f * t for f in FREQUENCIES]
    return (*(math.sin(a) for a in angles), *(math.cos(a) for a in angles))


def _time_features(steps: int) -> WeightRule:
    region = Region("time_features", (steps, TIME_FEATURES), DType.F32, Role.WEIGHT)
    values = [value for step in range(steps) for value in time_features(step / steps)]
    return WeightRule(region, constant=tuple(values))


def _vector(name: str, size: int) -> WeightRule:
    return vector(name, name, size)


def _matrix(name: str, rows: int, columns: int) -> WeightRule:
    return dense(name, name, rows, columns)


def _layer(name: str, rows: int, columns: int) -> tuple[WeightRule, WeightRule]:
    return _matrix(f"{name}.weight", rows, columns), _vector(f"{name}.bias", rows)


def _lane_regions(c: PolicyConfig) -> tuple[Region, ...]:
    def fixed(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.F32, Role.FIXED, is_digested=True)

    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED, is_digested=True),
        fixed("memory", c.memory_dim),
        fixed("encoded", c.encoder_dim),  # what the encoder made of the last observation
        fixed("previous", c.action_dim),  # the action executed last, normalised
        fixed("action", c.action_dim),  # the same in the environment's units
        fixed("queue", c.chunk_size, c.action_dim),  # normalised
        fixed("flow", c.flow_size),  # of the plan in the making: rows of actions, then the mask
        fixed("condition", c.head_dim),
        Region("observation", (c.observation_dim,), DType.F32, Role.IO),
        Region("request", (ops.REQUEST_WORDS,), DType.I32, Role.IO),
    )


class FlowRecorder:
    """Records the launches of one tape."""

    def __init__(self, config: PolicyConfig, regions: dict[str, Region], tape: Tape) -> None:
        self.config = config
        self.regions = regions
        self.tape = tape

    def observe(self) -> None:
        """From the observation to the memory after it."""
        c, regions = self.config, self.regions
        x = self._row("encoder.input", c.observation_dim + c.action_dim)
        self._launch(
            ops.OBSERVE, observation=regions["observation"], mean=regions["stats.observation.mean"],
            std=regions["stats.observation.std"], previous=regions["previous"], x=x.at(0),
        )  # fmt: skip
        middle = self._row("encoder.middle", c.encoder_dim)
        encoded = _as_row(regions["encoded"])
        self._dense("encoder.0", x, middle, ops.SILU)
        self._dense("encoder.1", middle, encoded, ops.SILU)
        u, v = (self._row(f"gates.{name}", 3 * c.memory_dim) for name in "uv")
        for source, suffix, gates in ((encoded, "ih", u), (_as_row(regions["memory"]), "hh", v)):
            self.tape.record(
                ops.DENSE, x=source, w=regions[f"memory.weight_{suffix}"],
                b=regions[f"memory.bias_{suffix}"], y=gates, activation=ops.IDENTITY,
            )  # fmt: skip
        self.tape.record(ops.GRU_CELL, u=u.at(0), v=v.at(0), memory=regions["memory"])

    def act(self) -> None:
        """The tick's action."""
        regions = self.regions
        self._launch(
            ops.TAKE_ACTION, queue=regions["queue"], scale=regions["stats.action.scale"],
            offset=regions["stats.action.offset"], previous=regions["previous"],
            action=regions["action"],
        )  # fmt: skip

    def begin(self) -> None:
        """Noise, committed rows, and what conditions every step."""
        c, regions = self.config, self.regions
        context = self._row("context", c.memory_dim + c.encoder_dim)
        self._launch(
            ops.FLOW_BEGIN, memory=regions["memory"], encoded=regions["encoded"],
            previous=regions["previous"], queue=regions["queue"], request=regions["request"],
            context=context.at(0), flow=regions["flow"], steps=c.num_inference_steps,
            execute=c.n_action_steps,
        )  # fmt: skip
        self._dense("head.condition", context, _as_row(regions["condition"]), ops.IDENTITY)

    def integrate(self, first: int, stop: int) -> None:
        """Euler steps [first, stop); the last of all hands the chunk over."""
        c, regions = self.config, self.regions
        times = self.tape.scratch("times", stop - first, c.head_dim)
        self.tape.record(
            ops.DENSE, x=regions["time_features"].span(first, stop - first),
            w=regions["head.time.weight"], b=regions["condition"], y=times,
            activation=ops.IDENTITY,
        )  # fmt: skip
        z, inner = self._row("z", c.head_dim), self._row("inner", c.head_dim)
        size = c.chunk_size * c.action_dim
        x = regions["flow"].view().cols(0, size)
        mask = regions["flow"].view().cols(size, c.flow_size)
        for step in range(stop - first):
            self.tape.record(
                ops.DENSE, x=_as_row(regions["flow"]), w=regions["head.input.weight"],
                b=times.at(step), y=z, activation=ops.SILU,
            )  # fmt: skip
            for block in range(c.head_blocks):
                name = f"head.blocks.{block}"
                self._dense(f"{name}.0", z, inner, ops.SILU)
                self.tape.record(
                    ops.DENSE_ADD, x=inner, w=regions[f"{name}.1.weight"],
                    b=regions[f"{name}.1.bias"], y=z,
                )  # fmt: skip
            self._launch(
                ops.FLOW_STEP, z=z, w=regions["head.output.weight"], b=regions["head.output.bias"],
                x=x, mask=mask, steps=c.num_inference_steps,
            )  # fmt: skip
        if stop == c.num_inference_steps:
            self._launch(ops.FLOW_END, x=x, queue=regions["queue"])

    def _row(self, name: str, columns: int) -> Region:
        return self.tape.scratch(name, 1, columns)

    def _dense(self, layer: str, x: Operand, y: Operand, activation: int) -> None:
        self.tape.record(
            ops.DENSE, x=x, w=self.regions[f"{layer}.weight"], b=self.regions[f"{layer}.bias"], y=y,
            activation=activation,
        )  # fmt: skip

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.regions["cursor"], **bindings)


def _as_row(region: Region) -> View:
    return region.view().reshape(1, region.size)
