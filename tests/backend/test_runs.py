"""Several lanes in one replay: each run has the bits of its lane alone, and touches no other lane.

IS: launches over three runs of different rows, in lanes that are not in order, with strides by
hand. IS NOT: the choice of strides, which is the arena's; nor whole tapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from flashrt.backends.cuda.device import CudaDevice
from flashrt.core.backend import BoundLaunch, Graph
from flashrt.core.op import bind
from flashrt.core.region import View
from flashrt.core.runs import STRIDE_UNIT, TABLE_WORDS, Run, Stride, table_of
from flashrt.ops.sample import SamplerWord, mask_words
from flashrt.ops.table import OPS
from tests.backend.cases import (
    advance,
    attention,
    conv_biased,
    conv_window,
    delta_rule,
    embed,
    gated_conv,
    hold,
    randn,
    rope_append,
    ssm,
)
from tests.backend.runner import ALIGNMENT, POISON, Array, Case, Runner, rng_for
from tests.backend.test_sample import sample_case, sampler

Kind = Literal["lane", "row", "run", "still"]  # what an operand moves with
RUNS = (Run(2, 3), Run(0, 1), Run(5, 2))
LANES, ROWS, MAX_RUNS = (
    6,
    8,
    4,
)  # of the arena; of the launch, two more than the runs have; one more
_OPS = {op.name: op for op in OPS}


@dataclass(frozen=True, slots=True)
class Shared:
    """An op: its launch for the lane of a run, alone, and what each operand moves with."""

    alone: Callable[[int, int], Case]  # of the number of the run, and its rows
    moves: Mapping[str, Kind]


def _sample(i: int, rows: int) -> Case:
    assert rows >= 1
    logits = randn(rng_for("runs", i), 3000, scale=3)
    history = rng_for("history", i).integers(0, 3000, 11).tolist()
    mask = rng_for("mask", i).integers(0, 2**32, mask_words(3000)).astype(np.uint32)
    words = sampler(0.8, 20 + i, 0.9, seed=i)
    words[SamplerWord.MASKED] = i % 3 > 0  # some lanes have one
    return sample_case(logits, words, history=history, mask=mask)


SHARED = {
    "embed": Shared(
        lambda i, n: embed(n, n, V=33, H=96, position=5 + i, S=77),
        {"tokens": "row", "cursor": "lane", "journal": "lane", "x": "row"},
    ),
    "conv_window": Shared(
        lambda i, n: conv_window(n, n, C=240, W=3, margin=(0, 0)),
        {"u": "row", "window": "lane", "cursor": "lane", "y": "row"},
    ),
    "delta_rule": Shared(
        lambda i, n: delta_rule(n, n, (1, 2), (32, 16)),
        {"y": "row", "decay": "row", "beta": "row", "state": "lane", "cursor": "lane", "o": "row"},
    ),
    "conv_biased": Shared(
        lambda i, n: conv_biased(n, n, C=240, W=3, margin=(0, 0)),
        {"u": "row", "window": "lane", "cursor": "lane", "y": "row"},
    ),
    "ssm": Shared(
        lambda i, n: ssm(n, n, (1, 2), (32, 16), margin=(0, 0)),
        {"y": "row", "dt": "row", "state": "lane", "cursor": "lane", "o": "row"},
    ),
    "rope_append": Shared(
        lambda i, n: rope_append(n, n, (4, 2), D=32, R2=4, position=9 * i, S=77, kv="bf16"),
        {
            "u": "row", "q": "row", "cursor": "lane", "keys": "lane", "values": "lane",
            "key_scales": "lane", "value_scales": "lane",
        },
    ),
    "attention": Shared(
        lambda i, n: attention(n, n, (4, 2), D=32, position=250 * i, S=600, kv="bf16"),
        {
            "q": "row", "u": "row", "partials": "row", "y": "row", "cursor": "lane",
            "keys": "lane", "values": "lane", "key_scales": "lane", "value_scales": "lane",
        },
    ),
    "sample": Shared(
        _sample,
        {
            "logits": "run", "work": "run", "sampler": "lane", "bias": "lane", "mask": "lane",
            "journal": "lane", "cursor": "lane",
        },
    ),
    "gated_conv": Shared(
        lambda i, n: gated_conv(n, n, C=240, W=2),
        {"u": "row", "window": "lane", "cursor": "lane", "y": "row"},
    ),
    "hold": Shared(lambda i, n: hold(5, 4, 5 + i), {"cursor": "lane", "stops": "lane"}),
    "advance": Shared(lambda i, n: advance(5 + i, n), {"cursor": "lane"}),
}  # fmt: skip
UNREAD = ("partials", "work")  # what is left in scratch is nobody's


class Lanes:
    """A launch over lanes: memory in which operands lie for every lane, row and run."""

    def __init__(self, runner: Runner, op: str) -> None:
        self.runner, self.backend, self.shared = runner, runner.backend, SHARED[op]
        cases = [self.shared.alone(i, run.rows) for i, run in enumerate(RUNS)]
        self.still = {
            name: array for name, array in cases[0].operands.items() if self.kind(name) == "still"
        }
        self.cases = [case.but(**self.still) for case in cases]
        first = self.cases[0]
        whole = first.but(**{
            name: (ROWS, *self._shape(given)[1:])
            for name, given in first.operands.items() if self.kind(name) == "row"
        })  # fmt: skip
        self.views = runner._views(whole)
        self.one = [runner._views(case) for case in self.cases]
        self.offsets: dict[str, int] = {}
        strides, self.used = [], -(-4 * TABLE_WORDS // ALIGNMENT) * ALIGNMENT  # the table is first
        for param in _OPS[op].params:
            view = self.views[param.name]
            self.offsets[param.name] = self.used
            stride, nbytes = self._stride(param.name, view)
            strides.append(stride)
            self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        launch = bind(_OPS[op], self.views, dict(first.attrs))
        base = runner.memory.address
        addresses = tuple(base + self.offsets[p.name] for p in _OPS[op].params)
        self.strides = dict(zip(self.offsets, strides, strict=True))
        bound = BoundLaunch(launch, addresses, base, tuple(strides), MAX_RUNS)
        self.graph: Graph = self.backend.capture([bound])

    def kind(self, name: str) -> Kind:
        """What an operand moves with."""
        return self.shared.moves.get(name, "still")

    def run(self, table: Sequence[Run], wanted: Sequence[int]) -> list[dict[str, Array]]:
        """What the runs of RUNS by these numbers have after a replay with `table`.

        Their lanes and rows are filled before, all else is poison.
        """
        self.backend.fill(self.runner.memory.address, self.used, POISON)
        for i in wanted:
            for name, given in self.cases[i].operands.items():
                if isinstance(given, np.ndarray):
                    at = self._place(name, i, wanted)
                    self.runner._write(self.one[i][name], at, given, (0, 0))
        self.backend.replay(self.graph, table_of(tuple(table)), self.runner.memory.address)
        self.backend.sync()
        return [
            {
                name: self.runner._read(view, self._place(name, i, wanted))
                for name, view in self.one[i].items()
            }
            for i in wanted
        ]

    def idle_bytes(self) -> Array:
        """All bytes of the lanes that no run of RUNS is about."""
        parts = []
        for name, at in self.offsets.items():
            step = self.strides[name].lane * STRIDE_UNIT
            for lane in sorted(set(range(LANES)) - {run.lane for run in RUNS}) if step else ():
                raw = np.empty(step, np.uint8)
                self.backend.read(self.runner.memory.address + at + lane * step, raw)
                parts.append(raw)
        return np.concatenate(parts)

    def _place(self, name: str, i: int, wanted: Sequence[int]) -> int:
        """Where run `i` of RUNS has an operand, in a replay of the runs by the numbers `wanted`."""
        by, number = self.strides[name], list(wanted).index(i)
        row = sum(RUNS[k].rows for k in wanted[:number])
        moved = RUNS[i].lane * by.lane * STRIDE_UNIT + row * by.row + number * by.run
        return self.offsets[name] + moved

    def _stride(self, name: str, view: View) -> tuple[Stride, int]:
        """How an operand moves, and the bytes of all of it."""
        storage = self.backend.storage(view.region)
        units = -(-storage.nbytes // STRIDE_UNIT)
        if self.kind(name) == "lane":
            return Stride(lane=units), LANES * units * STRIDE_UNIT
        if self.kind(name) == "run":
            return Stride(run=units * STRIDE_UNIT), MAX_RUNS * units * STRIDE_UNIT
        is_row = self.kind(name) == "row"
        return Stride(row=storage.nbytes // ROWS if is_row else 0), storage.nbytes

    @staticmethod
    def _shape(given: Array | tuple[int, ...]) -> tuple[int, ...]:
        return given.shape if isinstance(given, np.ndarray) else given


def same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Equal bits, but for scratch."""
    return all(a[name].tobytes() == b[name].tobytes() for name in a if name not in UNREAD)


@pytest.mark.parametrize("op", SHARED)
def test_each_run_has_the_bits_of_its_lane_alone(runner: Runner, op: str) -> None:
    """Red: a pointer that stays in lane 0, or moves by too much; a write beside the own lane."""
    lanes = Lanes(runner, op)
    together = lanes.run(RUNS, range(len(RUNS)))
    assert (lanes.idle_bytes() == POISON).all()
    for i, run in enumerate(RUNS):
        (alone,) = lanes.run([run], [i])
        assert same(together[i], alone), f"run {i} is not what its lane gives alone"
        unmoved = runner.run(lanes.cases[i])
        assert same(together[i], unmoved), f"run {i} is not what a launch without runs gives"


@pytest.mark.parametrize("op", [op for op in SHARED if op not in ("advance", "hold")])
def test_lanes_that_change_places_give_another_result(runner: Runner, op: str) -> None:
    """The control: that equal bits say something. (`advance` sees lanes alone, in any order.)"""
    lanes = Lanes(runner, op)
    right = lanes.run(RUNS, range(len(RUNS)))
    first, second, third = RUNS
    table = [Run(second.lane, first.rows), Run(first.lane, second.rows), third]
    wrong = lanes.run(table, range(len(RUNS)))
    assert not all(same(a, b) for a, b in zip(right, wrong, strict=True))


def test_a_table_is_written_again_after_another_write(runner: Runner) -> None:
    """Red: a table that is taken for written although its memory was filled since."""
    lanes = Lanes(runner, "advance")
    for _ in range(2):
        after = lanes.run(RUNS, range(len(RUNS)))  # fills the table's memory too
        assert [int(a["cursor"][0]) for a in after] == [5 + 3, 6 + 1, 7 + 2]


@pytest.mark.only_on("simt", "simt-high", "cuda", "cuda-high")
def test_a_table_goes_up_once(runner: Runner) -> None:
    """A lane that decodes replays with the same table at every token: one driver call each."""
    assert isinstance(runner.backend, CudaDevice)
    lanes, driver = Lanes(runner, "advance"), runner.backend.driver
    lanes.run(RUNS, range(len(RUNS)))
    before = driver.counts["cuMemcpyHtoDAsync"]
    base = runner.memory.address
    for table, uploads in ((RUNS, 0), (RUNS[:1], 1), (RUNS[:1], 1), (RUNS, 2)):
        runner.backend.replay(lanes.graph, table_of(table), base)
        assert driver.counts["cuMemcpyHtoDAsync"] - before == uploads
    runner.backend.sync()
