"""Mixture of experts: each pick has the bits of `linear`, whoever shares its expert; and a router
that NaN, infinities and ties do not lead astray.

IS: the ops of experts over stored formats, held against launches of `linear` and `silu_mul` on the
same device, with picks spread, shared, and all on one expert. IS NOT: the comparison with numpy,
nor splits, schedules and threads, which tests/backend/cases.py brings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cache import Binary
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import device as cpu_device
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import PlanError
from flashrt.core.backend import Backend, BoundLaunch, Bytes
from flashrt.core.groups import Groups, Scales
from flashrt.core.op import Op, bind
from flashrt.core.region import DType, Layout, Operand, Region, Role, as_view
from flashrt.ops.experts import EXPERTS_IN, EXPERTS_OUT, Scoring
from flashrt.ops.linear import LINEAR
from flashrt.ops.rows import SILU_MUL
from flashrt.ops.table import OPS
from tests.backend.cases import cursor, route
from tests.backend.runner import Runner, rng_for
from tests.backend.test_formats_cpu import Format, Rows
from tests.backend.test_linear_integers import fma

E, P, H, I = 5, 2, 288, 64  # noqa: E741  two slices of K, of which one is not whole
ARENA_BYTES = 24 << 20
FORMATS = {
    "bf16": Format(DType.BF16),
    "gptq": Format(DType.U4, Groups(128, Scales.F16)),
    "q4_k": Format(DType.U4, Groups(32, Scales.TWO_LEVEL_MIN, 256)),
    "q6_k": Format(DType.U6, Groups(16, Scales.TWO_LEVEL, 256)),
    "fp8": Format(DType.E4M3, Groups(128, Scales.F32)),
    "nvfp4": Format(DType.E2M1, Groups(16, Scales.E4M3_OVER)),
}
MADE: dict[str, Callable[[], Backend]] = {
    "float32": lambda: CpuDevice(2),
    "int16": lambda: CpuDevice(2, activations="int16"),
    "int8": lambda: CpuDevice(2, activations="int8"),
    "bfloat16": lambda: CpuDevice(2, plain="bfloat16"),
    "simt": SimtDevice,
}
# Of simt the formats whose scales come in a way of their own; a kernel takes seconds to compile.
TRIED = [
    *((kind, name) for kind in ("float32", "int16", "int8") for name in FORMATS),
    ("bfloat16", "bf16"), ("simt", "q4_k"), ("simt", "nvfp4"),
]  # fmt: skip


class Bench:
    """A device with room for the operands of one launch."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        backend.build(OPS)
        self.memory = backend.allocate("arena", ARENA_BYTES)
        self.used = 0

    def region(self, region: Region, content: Rows | NDArray[np.generic] | None = None) -> Region:
        """Its place in the arena, and its content; NaN without."""
        storage = self.backend.storage(region)
        raw = np.full(storage.nbytes, 0xFF, np.uint8)
        if content is not None:
            self.backend.pack(region, content, raw)
        self.places[region] = self.memory.address + self.used
        self.used += -(-storage.nbytes // 256) * 256 + 256
        assert self.used <= ARENA_BYTES
        self.backend.write(self.places[region], raw)
        return region

    def clear(self) -> None:
        self.used, self.places = 0, dict[Region, int]()

    def raw(self, region: Region) -> Bytes:
        out = np.empty(self.backend.storage(region).nbytes, np.uint8)
        self.backend.read(self.places[region], out)
        return out

    def launch(self, op: Op, **operands: Operand) -> None:
        views = {name: as_view(operand) for name, operand in operands.items()}
        launch = bind(op, views, {})
        addresses = tuple(
            self.places[v.region] + v.lead * self.backend.storage(v.region).lead_nbytes
            for v in launch.operands
        )
        self.backend.eager([BoundLaunch(launch, addresses)])


def scratch(name: str, *shape: int, dtype: DType = DType.F32) -> Region:
    return Region(name, shape, dtype, Role.IO)


@pytest.fixture(scope="module", params=TRIED, ids="-".join)
def bench_of(request: pytest.FixtureRequest) -> Iterator[tuple[Bench, Format]]:
    kind, name = request.param
    bench = Bench(MADE[kind]())
    yield bench, FORMATS[name]
    bench.backend.close()
    CpuDevice().build(OPS)  # the pool is the process's


PICKS = {
    "one row": np.array([[1, 3]]),
    "one expert": np.array([[2]] * 70),  # more rows than go together
    "shared": np.array(
        [[0, 1], [1, 4], [0, 1], [1, 2], [0, 4], [1, 4], [0, 1], [1, 3], [1, 2]] * 4
    ),
}


@pytest.mark.parametrize("picks", PICKS.values(), ids=PICKS)
def test_a_pick_has_the_bits_of_linear(
    bench_of: tuple[Bench, Format], picks: NDArray[np.int64]
) -> None:
    """Fault: a pick gets another expert or row, a product another order, a row another's sum."""
    bench, form = bench_of
    rng, (T, n_picks) = rng_for("experts", str(form), picks.shape), picks.shape
    matrices = form.random(rng, 2 * E * I, H), form.random(rng, E * H, I)
    x = rng.standard_normal((T, H)).astype(np.float32)
    gates = rng.standard_normal((T, n_picks)).astype(np.float32)
    bench.clear()
    wide = DType.ACT_WIDE
    words = bench.region(scratch("cursor", 16, dtype=DType.I32), cursor(5, T))
    rows = bench.region(scratch("x", T, H, dtype=wide), x)
    w_in, w_out = (
        bench.region(replace(form.region(n, k), name=name), rows_of)
        for name, n, k, rows_of in (
            ("in", 2 * E * I, H, matrices[0]), ("out", E * H, I, matrices[1])
        )
    )  # fmt: skip
    shared = {
        "picks": bench.region(
            scratch("picks", T, n_picks, dtype=DType.I32), picks.astype(np.int32)
        ),
        "cursor": words,
        "groups": bench.region(scratch("groups", E, 2, dtype=DType.I32)),
        "members": bench.region(scratch("members", T, n_picks, 2, dtype=DType.I32)),
    }
    h = bench.region(scratch("h", T, n_picks, I, dtype=wide))
    y = bench.region(scratch("y", T, H))
    products = bench.region(scratch("products", T, n_picks, H))
    bench.launch(EXPERTS_IN, x=rows, w=w_in, h=h, **shared)
    kept = bench.region(scratch("gates", T, n_picks), gates)
    bench.launch(EXPERTS_OUT, h=h, w=w_out, gates=kept, products=products, y=y, **shared)

    u = bench.region(scratch("u", T, 2 * I))
    gated = bench.region(scratch("gated", T, I, dtype=wide))
    down = bench.region(scratch("down", T * n_picks, H))
    all_picks = bench.region(scratch("all", 16, dtype=DType.I32), cursor(5, T * n_picks))
    got = bench.raw(h).reshape(T, n_picks, -1)
    sums = np.zeros((T, H), np.float32)
    found = bench.raw(y).view(np.float32).reshape(T, H)
    flat = bench.region(scratch("flat", T * n_picks, I, dtype=wide))
    bench.backend.write(bench.places[flat], bench.raw(h))
    of_expert = {}
    for e in np.unique(picks).tolist():
        bench.launch(LINEAR, x=rows, w=w_in.span(2 * I * e, 2 * I), y=u, cursor=words)
        bench.launch(SILU_MUL, u=u, y=gated, cursor=words)
        wanted = bench.raw(gated).reshape(T, -1)
        t, j = np.nonzero(picks == e)
        assert (got[t, j] == wanted[t]).all(), e
        bench.launch(LINEAR, x=flat, w=w_out.span(H * e, H), y=down, cursor=all_picks)
        of_expert[e] = bench.raw(down).view(np.float32).reshape(T, n_picks, H)
    for j in range(n_picks):
        product = np.stack([of_expert[int(e)][t, j] for t, e in enumerate(picks[:, j])])
        sums = fma(np.broadcast_to(gates[:, j, None], sums.shape), product, sums)
    assert (found.view(np.uint32) == sums.view(np.uint32)).all()


@pytest.mark.parametrize(
    ("kind", "form"), [("float32", "q4_k"), ("int16", "q4_k"), ("bfloat16", "bf16")]
)
def test_without_scratch_rows_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    """Fault: rows are packed into memory that is not there."""
    path = Path(shutil.copy(toolchain.library(OPS).path, tmp_path / "copy.so"))  # its own workspace
    library = Binary(path, path.read_bytes(), "", was_cached=True)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: library)
    monkeypatch.setattr(cpu_device, "_workspace_nbytes", lambda *_: 0)
    bench = Bench(MADE[kind]())
    for picks in PICKS.values():
        test_a_pick_has_the_bits_of_linear((bench, FORMATS[form]), picks)
    bench.backend.close()


@pytest.mark.parametrize("scoring", list(Scoring), ids=str)
def test_a_row_that_is_no_number_picks_experts_that_there_are(
    runner: Runner, scoring: Scoring
) -> None:
    """Fault: a NaN wins, or is passed over in silence; an infinity picks what is none; a row spoils
    another.
    """
    experts, picked = 37, 4
    logits = rng_for("odd", scoring).standard_normal((8, experts)).astype(np.float32)
    logits[0, 5], logits[1, :-2], logits[2] = np.nan, np.nan, np.nan
    logits[3, 36], logits[4] = np.inf, -np.inf
    case = route(8, 8, experts, picked, form=(int(scoring), 0, 1))
    after = runner.run(case.but(logits=logits))
    picks, gates = after["picks"], after["gates"]
    assert (picks >= 0).all() and (picks < experts).all() and (np.diff(picks) > 0).all()
    assert 5 not in picks[0] and {35, 36} <= set(picks[1]) and list(picks[2]) == [0, 1, 2, 3]
    assert 36 in picks[3] and list(picks[4]) == [0, 1, 2, 3]
    assert np.isnan(gates[:3]).all() and np.isfinite(gates[5:]).all()
    alone = runner.run(
        route(1, 1, experts, picked, form=(int(scoring), 0, 1)).but(logits=logits[5:6])
    )
    assert np.array_equal(alone["picks"][0], picks[5])
    assert np.array_equal(alone["gates"][0], gates[5])


def test_of_equals_the_lower_number_is_picked(runner: Runner) -> None:
    """Fault: the order of lanes or of rounds decides; 0 and -0 are told apart."""
    logits = np.zeros((4, 70), np.float32)
    logits[1, 1::2], logits[2, 40:] = -0.0, 1.0
    logits[3, [3, 35, 67]] = 2.0  # of one lane of a warp
    picks = runner.run(route(4, 4, 70, 4).but(logits=logits))["picks"]
    assert picks.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [40, 41, 42, 43], [0, 3, 35, 67]]


def test_sizes_without_a_kernel_are_refused() -> None:
    """Fault: an expert begins within a panel, and its rows are another's."""
    regions = {
        "x": scratch("x", 3, 32, dtype=DType.ACT), "picks": scratch("picks", 3, 2, dtype=DType.I32),
        "cursor": scratch("cursor", 16, dtype=DType.I32),
        "groups": scratch("groups", 2, 2, dtype=DType.I32),
        "members": scratch("members", 3, 2, 2, dtype=DType.I32),
    }  # fmt: skip

    def of(experts: int, columns: int) -> None:
        w = Region("w", (2 * experts * columns, 32), DType.BF16, Role.WEIGHT, Layout.MATRIX)
        h = scratch("h", 3, 2, columns, dtype=DType.ACT)
        groups = scratch("groups", experts, 2, dtype=DType.I32)
        bind(EXPERTS_IN, regions | {"w": w, "h": h, "groups": groups}, {})

    of(2, 64)
    with pytest.raises(PlanError, match="experts_in: I is 48, no multiple of 32: pad the weights"):
        of(2, 48)
    with pytest.raises(PlanError, match="experts_in: P is 2, of E 1"):
        of(1, 32)
