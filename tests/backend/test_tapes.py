"""Every launch of a model's tapes on every backend, held against the reference, op by op.

Operands are those of the tiny golden model, computed by the reference, so each op meets the
windows, dtypes and values of a real forward; test_ops has sizes off the grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashrt.core.op import Launch
from flashrt.core.region import DType
from flashrt.models import Model, model_for
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from tests.backend.runner import Case, Runner
from tests.backend.test_ops import check
from tests.families import SETS
from tests.golden.tape_interpreter import TapeInterpreter

CHECKPOINT = Path(__file__).parents[1] / "golden" / "tiny"


class Lockstep(TapeInterpreter):
    """A lane whose launches a backend does first, from the same operands."""

    def __init__(self, model: Model, checkpoint: Checkpoint, runner: Runner) -> None:
        super().__init__(model, checkpoint)
        self.runner = runner
        self.checked: set[str] = set()

    def launch(self, launch: Launch) -> None:
        op = launch.op
        operands = {
            name: array.astype(np.float32 if array.dtype == np.float64 else array.dtype)
            for name, array in self.operands(launch).items()
        }
        attrs = dict(zip([a.name for a in op.attrs], launch.attrs, strict=True))
        names = [p.name for p in op.params]
        dtypes = {n: v.region.dtype for n, v in zip(names, launch.operands, strict=True)}
        case = Case(op.name, operands, attrs, dtypes, label=f"{op.name} of {sorted(operands)}")
        check(self.runner, case, self.runner.run(case))
        self.checked.add(op.name)
        super().launch(launch)


@pytest.mark.parametrize("kv_dtype", [DType.F32, DType.BF16], ids=str)
def test_each_launch_of_prefill_and_decode(runner: Runner, kv_dtype: DType) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    model = model_for(checkpoint.config, max_positions=128, kv_dtype=kv_dtype)
    lane = Lockstep(model, checkpoint, runner)
    lane.prefill(range(1, 40))
    lane.greedy(3)
    assert lane.checked >= {"embed", "linear", "attention", "delta_rule", "last_row", "sample"}


@pytest.mark.parametrize("name", ["lfm2-odd", "granite-odd", "nemotron"])
def test_each_launch_of_another_family(runner: Runner, name: str) -> None:
    """Of one set of each family whose ops the tiny model has not."""
    checkpoint = open_checkpoint(SETS / name)
    model = model_for(checkpoint.config, max_positions=128, kv_dtype=DType.F32, is_tied=False)
    lane = Lockstep(model, checkpoint, runner)
    lane.prefill(range(1, 40))
    lane.greedy(3)
    ops = {launch.op.name for phase in model.phases for launch in model.record(*phase).launches}
    assert lane.checked == ops


def test_each_launch_of_drafting(runner: Runner) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    model = model_for(checkpoint.config, max_positions=128, kv_dtype=DType.F32, has_draft_head=True)
    lane = Lockstep(model, checkpoint, runner)
    lane.prefill(range(1, 40))
    lane.sample()
    lane.run(model.record("draft", 1))
    lane.run(model.record("draft_next", 1))
    lane.lane["cursor"][1] = 3
    lane.run(model.record("verify", 8))
    lane.lane["cursor"][1] = int(lane.lane["verdict"][0])
    lane.run(model.record("commit", 9))
    ops = {launch.op.name for phase in model.phases for launch in model.record(*phase).launches}
    assert lane.checked == ops
