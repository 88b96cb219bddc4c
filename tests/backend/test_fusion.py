"""Fused launches: the same bits as the launches that they stand for, and apart where they must be.

IS: short tapes run once as they are (`eager`) and once fused (`capture`), every byte of what is no
scratch compared; what the pass leaves alone. IS NOT: whole models (test_simt_engine,
test_launch_counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.fusion import fuse
from flashrt.backends.cuda.graph import CudaGraph
from flashrt.core.backend import BoundLaunch
from flashrt.core.groups import Scales
from flashrt.core.op import Op, bind
from flashrt.core.region import DType, Layout, Region, Role, View, as_view, resolve_dtype
from flashrt.models.blocks import columns
from flashrt.ops import table as ops
from tests.backend.cases import cursor, randn
from tests.backend.runner import ALIGNMENT, POISON, Runner, bf16_bits, rng_for
from tests.backend.test_formats_simt import Format, Stored, grouped, random_matrix

pytestmark = pytest.mark.only_on("simt", "simt-high", "cuda", "cuda-high")
EPS = 1e-6
BF16 = Format(DType.BF16)


@dataclass
class Board:
    """Regions with values, and launches over them, in order."""

    runner: Runner
    values: dict[Region, Stored] = field(default_factory=dict)
    addresses: dict[Region, int] = field(default_factory=dict)
    launches: list[BoundLaunch] = field(default_factory=list)
    used: int = 0

    def region(
        self, name: str, *shape: int, value: NDArray[Any] | None = None,
        dtype: DType = DType.F32, role: Role = Role.SCRATCH, layout: Layout = Layout.PLAIN,
    ) -> Region:  # fmt: skip
        """Scratch by default; with a value, io that has it before the launches."""
        role = Role.IO if value is not None else role
        region = Region(name, shape, dtype, role, layout)
        if value is not None:
            self.values[region] = value
        return self.place(region)

    def weight(self, name: str, form: Format, n: int, k: int) -> Region:
        """A matrix in a format."""
        region = Region(name, (n, k), form.dtype, Role.WEIGHT, Layout.MATRIX, groups=form.groups)
        self.values[region] = random_matrix(form, n, k, name)
        return self.place(region)

    def place(self, region: Region, at: int | None = None) -> Region:
        """Behind all others, or at an offset."""
        self.addresses[region] = self.used if at is None else at
        nbytes = self.runner.backend.storage(region).nbytes
        if at is None:
            self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return region

    def launch(self, op: Op, /, *, runs: Mapping[str, Any] | None = None, **bindings: Any) -> None:
        """Append a launch."""
        operands = {k: as_view(v) for k, v in bindings.items() if isinstance(v, Region | View)}
        attrs = {k: v for k, v in bindings.items() if not isinstance(v, Region | View)}
        launch = bind(op, operands, attrs)
        addresses = tuple(self._address(v) for v in launch.operands)
        self.launches.append(BoundLaunch(launch, addresses, **(runs or {})))

    def outcome(self, *, is_fused: bool) -> tuple[dict[str, bytes], list[str]]:
        """Bytes of all regions but scratch and weights after two rounds, in which the second finds
        what the first has left, and the kernels that were launched.
        """
        backend, base = self.runner.backend, self.runner.memory.address
        assert isinstance(backend, CudaDevice)
        backend.fill(base, self.used, POISON)
        for region, value in self.values.items():
            raw = np.full(backend.storage(region).nbytes, POISON, np.uint8)
            backend.pack(region, value, raw)
            backend.write(base + self.addresses[region], raw)
        names: list[str] = []
        if is_fused:
            graph = backend.capture(self.launches)
            assert isinstance(graph, CudaGraph)
            names = [node.name for node in graph.nodes]
        for _ in range(2):
            if is_fused:
                backend.replay(graph)
            else:
                backend.eager(self.launches)
        backend.sync()
        found = {}
        for region, at in self.addresses.items():
            if region.role not in (Role.SCRATCH, Role.WEIGHT):
                raw = np.empty(backend.storage(region).nbytes, np.uint8)
                backend.read(base + at, raw)
                found[region.name] = raw.tobytes()
        return found, names

    def check(self, *kernels: str) -> None:
        """Fused launches of these kernels leave what the launches leave one by one."""
        (plain, _), (fused, names) = (self.outcome(is_fused=f) for f in (False, True))
        assert names == list(kernels)
        for name, raw in plain.items():
            assert fused[name] == raw, f"{name} has other bits when fused"

    def kernels(self) -> list[str]:
        """Ops after the pass."""
        return [b.launch.op.name for b in fuse(self.launches, self.runner.backend.acts, 0)]

    def _address(self, view: View) -> int:
        lead = self.runner.backend.storage(view.region).lead_nbytes
        bits = resolve_dtype(view.region.dtype, self.runner.backend.acts).bits
        at = self.addresses[view.region] + view.lead * lead + view.col * bits // 8
        return self.runner.memory.address + at


@pytest.fixture
def board(runner: Runner) -> Board:
    return Board(runner)


def rows_of(board: Board, rows: int) -> Region:
    return board.region("cursor", ops.CURSOR_WORDS, value=cursor(3, rows), dtype=DType.I32)


def values(board: Board, name: str, *shape: int, scale: float = 1) -> Region:
    return board.region(name, *shape, value=randn(rng_for(name, *shape), *shape, scale=scale))


def activation(board: Board, name: str, *shape: int) -> Region:
    """Wide ones, as the input of an MLP."""
    return board.region(name, *shape, dtype=DType.ACT_WIDE)


@dataclass(frozen=True)
class Mlp:
    """Sizes of an MLP: T rows of which `rows` are valid."""

    T: int
    rows: int
    H: int
    I: int  # noqa: E741
    form: Format = BF16
    is_held: bool = True  # whether a block has room for the rows

    def __str__(self) -> str:
        return f"{self.rows} of {self.T}, {self.H} x {self.I}, {self.form}"


MLPS = (
    Mlp(1, 1, 64, 48),  # a slice, one warp
    Mlp(5, 5, 1352, 48),  # six slices, the last one short; a norm of eleven warps
    Mlp(2, 2, 2568, 32),  # two vectors of a norm per thread
    Mlp(7, 5, 264, 80),
    Mlp(12, 11, 256, 48),  # two tiles of tokens
    Mlp(30, 27, 96, 48),  # four
    Mlp(4, 4, 2568, 32, is_held=False),
    Mlp(3, 2, 256, 48, grouped(DType.E2M1, 16, Scales.E4M3_TIMES)),  # scales of rows
    Mlp(1, 1, 512, 48, grouped(DType.U4, 32, Scales.F16_MIN)),
    Mlp(1, 1, 260, 48, is_held=False),  # rows that do not lie on 16 bytes
)


def mlp(board: Board, s: Mlp, *, has_sum: bool) -> None:
    """out = x + r, normed; u = gate and up; r = down: x += r, normed again."""
    n = rows_of(board, s.rows)
    x, w = values(board, "x", s.T, s.H), values(board, "w", s.H)
    h, y = activation(board, "h", s.T, s.H), activation(board, "y", s.T, s.I)
    u, r = board.region("u", s.T, 2 * s.I), board.region("r", s.T, s.H)
    out = board.region("out", s.T, s.H, dtype=DType.ACT_WIDE, role=Role.IO)
    mixed = board.region(
        "mixed", s.T, 32, value=bf16_bits(randn(rng_for("mixed"), s.T, 32))
        if board.runner.backend.acts.narrow is DType.BF16 else randn(rng_for("mixed"), s.T, 32),
        dtype=DType.ACT,
    )  # fmt: skip
    first = board.region("first", s.T, s.H)
    if has_sum:
        o_proj = board.weight("o_proj", BF16, s.H, 32)
        board.launch(ops.LINEAR, x=mixed, w=o_proj, y=first, cursor=n)
        board.launch(ops.ADD_RMSNORM, x=x, r=first, w=w, y=h, cursor=n, eps=EPS)
    else:
        board.launch(ops.RMSNORM, x=x, w=w, y=h, cursor=n, eps=EPS)
    gate_up, down = board.weight("gate_up", s.form, 2 * s.I, s.H), board.weight("d", BF16, s.H, s.I)
    board.launch(ops.LINEAR, x=h, w=gate_up, y=u, cursor=n)
    board.launch(ops.SILU_MUL, u=u, y=y, cursor=n)
    board.launch(ops.LINEAR, x=y, w=down, y=r, cursor=n)
    board.launch(ops.ADD_RMSNORM, x=x, r=r, w=w, y=out, cursor=n, eps=EPS)


@pytest.mark.parametrize("has_sum", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("s", MLPS, ids=str)
def test_an_mlp_has_the_bits_of_its_launches(board: Board, s: Mlp, has_sum: bool) -> None:
    """Red: sums of a norm in another order; a sum that is rounded elsewhere before silu; a residual
    that is added twice; rows beyond the valid ones that are written.
    """
    mlp(board, s, has_sum=has_sum)
    if s.is_held:
        board.check(*["linear_add"] * has_sum, "norm_silu", "linear_few", "add_rmsnorm")
    else:
        first = ["linear_few", "add_rmsnorm"] if has_sum else ["rmsnorm"]
        board.check(*first, "linear_silu", "linear_few", "add_rmsnorm")


NVFP4 = grouped(DType.E2M1, 16, Scales.E4M3_OVER)
Q4_K = grouped(DType.U4, 32, Scales.TWO_LEVEL_MIN, 256)
Q6_K = grouped(DType.U6, 16, Scales.TWO_LEVEL, 256)
F32 = Format(DType.F32)


@dataclass(frozen=True)
class Parts:
    """A matrix stored in parts: their formats, T rows, K; and the launches for it."""

    forms: tuple[Format, ...]
    T: int
    K: int
    kernels: tuple[str, ...]
    dtype: DType = DType.ACT_WIDE

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.forms))}, {self.T} x {self.K}, {self.dtype}"


PARTS = (
    Parts((NVFP4, BF16), 2, 1280, ("norm_linears_2",)),  # five slices: a warp without one
    Parts((BF16, BF16), 1, 512, ("norm_linears_2",), DType.ACT),
    Parts((Q4_K, Q6_K, F32), 3, 520, ("norm_linears_3",)),
    Parts((Q4_K, NVFP4, Q6_K, BF16), 1, 264, ("norm_linears_3", "norm_linear")),
    Parts((Q4_K, BF16), 12, 1536, ("rmsnorm", "linears_2")),  # rows that a block has no room for
    Parts((Q6_K, Q4_K, BF16), 2, 260, ("rmsnorm", "linears_3")),  # nor lie on 16 bytes
)


@pytest.mark.parametrize("s", PARTS, ids=str)
def test_products_of_the_same_rows_have_the_bits_of_their_launches(board: Board, s: Parts) -> None:
    """A weight stored in parts: a launch of all of them, each into its own columns.

    Red: a format of another part; a row tile that is counted from another part's first one.
    """
    x, w, n = values(board, "x", s.T, s.K), values(board, "w", s.K), rows_of(board, s.T)
    h = board.region("h", s.T, s.K, dtype=s.dtype)
    board.launch(ops.RMSNORM, x=x, w=w, y=h, cursor=n, eps=EPS)
    sizes = (40, 56, 8, 33)[: len(s.forms)]
    u = board.region("u", s.T, sum(sizes), role=Role.IO)
    windows = columns(u, *sizes)
    for i, (form, size, window) in enumerate(zip(s.forms, sizes, windows, strict=True)):
        part = board.weight(f"part{i}", form, size, s.K)
        board.launch(ops.LINEAR, x=h, w=part, y=window, cursor=n)
    board.check(*s.kernels)


def test_products_that_are_no_neighbours_stay(board: Board) -> None:
    """Other rows, another cursor; an output that lies where another one does, or where x does."""
    n, x, h = rows_of(board, 1), activation(board, "x", 1, 260), activation(board, "h", 1, 260)
    w = board.weight("w", BF16, 48, 260)
    other = board.region("other", ops.CURSOR_WORDS, value=cursor(3, 0), dtype=DType.I32)
    first, second = board.region("first", 1, 48), board.region("second", 1, 48)
    over_first, over_x = (
        board.place(Region(name, (1, 48), DType.F32, Role.SCRATCH), board.addresses[under])
        for name, under in (("over_first", first), ("over_x", x))
    )
    for rows, word, y, expected in (
        (x, n, second, ["linears_2"]),
        (h, n, second, ["linear", "linear"]),
        (x, other, second, ["linear", "linear"]),
        (x, n, over_first, ["linear", "linear"]),
        (x, n, over_x, ["linear", "linear"]),
    ):
        board.launches = []
        board.launch(ops.LINEAR, x=x, w=w, y=first, cursor=n)
        board.launch(ops.LINEAR, x=rows, w=w, y=y, cursor=word)
        assert board.kernels() == expected, y.name


def test_what_is_read_elsewhere_is_written(board: Board) -> None:
    """Red: a pass that looks at neighbours alone."""
    s = Mlp(1, 1, 64, 48)
    mlp(board, s, has_sum=True)
    by_name = {region.name: region for region in board.addresses}
    n, kept = by_name["cursor"], board.region("kept", 1, 64, role=Role.IO)
    for name, expected in (
        ("first", ["linear", "add_rmsnorm", "linear_silu", "linear", "add_rmsnorm"]),
        ("h", ["linear", "add_rmsnorm", "linear_silu", "linear", "add_rmsnorm"]),
        ("u", ["linear_add", "norm_linear", "silu_mul", "linear", "add_rmsnorm"]),
    ):
        before = list(board.launches)
        read, own = by_name[name], kept
        if name == "h":
            own = board.region("kept.h", 1, 64, dtype=DType.ACT_WIDE, role=Role.IO)
            board.launch(ops.KEEP_ROWS, x=read, y=own, cursor=n)
        else:
            columns = read.view().cols(0, 64)
            board.launch(ops.KEEP_VALUES, x=columns, y=own, cursor=n)
        assert board.kernels()[:-1] == expected, name
        board.launches = before


def test_memory_that_is_given_twice_keeps_launches_apart(board: Board) -> None:
    """The planner may put an output where an input was that is dead by then.

    Red: blocks that write y while others still read h.
    """
    n, h = rows_of(board, 1), activation(board, "h", 1, 512)
    u, y = board.region("u", 1, 96), Region("y", (1, 48), DType.ACT_WIDE, Role.SCRATCH)
    w = board.weight("w", BF16, 96, 512)
    for at, expected in (
        (board.addresses[h] + 256, ["linear", "silu_mul"]),
        (board.used, ["linear_silu"]),
    ):
        board.place(y, at)
        board.launches = []
        board.launch(ops.LINEAR, x=h, w=w, y=u, cursor=n)
        board.launch(ops.SILU_MUL, u=u, y=y, cursor=n)
        assert board.kernels() == expected


@pytest.mark.parametrize("what", ["rows", "columns", "cursor"])
def test_launches_that_do_not_fit_stay(board: Board, what: str) -> None:
    """Too many rows for `linear_few`; tiles that hold rows of both halves; another cursor."""
    T, I = (33 if what == "rows" else 1), (40 if what == "columns" else 48)  # noqa: E741
    n, h = rows_of(board, 1), activation(board, "h", T, 512)
    other = board.region("other", ops.CURSOR_WORDS, value=cursor(3, 0), dtype=DType.I32)
    u, y = board.region("u", T, 2 * I), activation(board, "y", T, I)
    board.launch(ops.LINEAR, x=h, w=board.weight("w", BF16, 2 * I, 512), y=u, cursor=n)
    board.launch(ops.SILU_MUL, u=u, y=y, cursor=other if what == "cursor" else n)
    assert board.kernels() == ["linear", "silu_mul"]


# ---- the delta rule


@dataclass(frozen=True)
class Delta:
    """Sizes of a delta rule: T rows of which `rows` are valid, heads and sizes of keys, values."""

    T: int
    rows: int
    heads: tuple[int, int]
    sizes: tuple[int, int]
    taps: int = 4

    def __str__(self) -> str:
        return f"{self.rows} of {self.T}, {self.heads} x {self.sizes}, {self.taps} taps"


DELTAS = (
    Delta(1, 1, (2, 2), (32, 16)),
    Delta(1, 0, (1, 1), (32, 8)),
    Delta(1, 1, (2, 6), (36, 24)),  # three value heads share a window; keys that fill no step
    Delta(5, 3, (2, 4), (64, 16)),
    Delta(8, 8, (1, 3), (128, 128)),  # more rows than taps
    Delta(2, 2, (2, 2), (16, 8), taps=3),
)


def delta(board: Board, s: Delta) -> dict[str, Region]:
    """The launches around a delta rule, as a model records them."""
    (Hk, Hv), (dk, dv), T = s.heads, s.sizes, s.T
    channels, inner = 2 * Hk * dk + Hv * dv, Hv * dv
    u = randn(rng_for("u", str(s)), T, channels + inner + 2 * Hv)
    u[s.rows :] = np.nan
    found = {
        "u": board.region("u", *u.shape, value=u),
        "qkv": board.region("qkv", T, channels), "o": board.region("o", T, inner),
        "decay": board.region("decay", T, Hv), "beta": board.region("beta", T, Hv),
        "y": board.region("y", T, inner, dtype=DType.ACT_WIDE, role=Role.IO),
        "window": values(board, "window", s.taps - 1, channels), "cursor": rows_of(board, s.rows),
        "w": values(board, "w", s.taps, channels), "norm": values(board, "norm", dv),
        "a_log": values(board, "a_log", Hv), "dt_bias": values(board, "dt_bias", Hv),
    }  # fmt: skip
    state = board.region(
        "state", Hv, dk, dv, value=randn(rng_for("state"), Hv, dk, dv), layout=Layout.COLUMN_BLOCKS
    )
    qkv, z, b, a = columns(found["u"], channels, inner, Hv, Hv)
    n, y, decay, beta = found["cursor"], found["qkv"], found["decay"], found["beta"]
    board.launch(ops.CONV_WINDOW, u=qkv, w=found["w"], window=found["window"], y=y, cursor=n)
    board.launch(
        ops.DELTA_GATES, y=y, a=a, b=b, a_log=found["a_log"], dt_bias=found["dt_bias"],
        decay=decay, beta=beta, key_heads=Hk, key_dim=dk, cursor=n,
    )  # fmt: skip
    rule = {"y": y, "decay": decay, "beta": beta, "state": state, "o": found["o"]}
    board.launch(ops.DELTA_RULE, **rule, key_heads=Hk, cursor=n)
    board.launch(
        ops.GATED_RMSNORM, o=found["o"], z=z, w=found["norm"], y=found["y"], eps=EPS, cursor=n
    )
    return found


@pytest.mark.parametrize("s", DELTAS, ids=str)
def test_a_delta_rule_has_the_bits_of_its_launches(board: Board, s: Delta) -> None:
    """Red: a window that is moved on before another value head has read it; a counter that is left;
    rows beyond the valid ones, which are NaN, that reach the state.
    """
    delta(board, s)
    board.check("delta_few")


def test_delta_rules_that_do_not_fit_stay(board: Board) -> None:
    """Rows beyond shared memory; an o, or a convolution, that is read elsewhere."""
    delta(board, Delta(9, 9, (1, 1), (32, 8)))
    apart = ["conv_window", "delta_gates", "delta_rule", "gated_rmsnorm"]
    assert board.kernels() == apart
    for name in ("o", "qkv"):
        board = Board(board.runner)
        found = delta(board, Delta(1, 1, (1, 1), (32, 8)))
        kept = board.region("kept", *found[name].shape, role=Role.IO)
        board.launch(ops.KEEP_VALUES, x=found[name], y=kept, cursor=found["cursor"])
        assert board.kernels() == [*apart, "keep_values"]
