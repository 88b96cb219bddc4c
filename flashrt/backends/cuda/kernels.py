"""Kernels: how each op expands into CUDA launches: source, kernel, constants and geometry.

IS: the one declarative table between the table of ops and cuda_src; pure functions of dims and
dtypes. IS NOT: code, compiling or launching.

Every kernel of an expansion takes the op's argument block by value. Which variant is chosen (few or
many tokens, tile sizes) may depend on the rows of the tape and on the device: all variants of an op
give the same bits.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from flashrt.backends.cuda.driver_api import DEFAULT_SHARED_BYTES
from flashrt.backends.cuda.occupancy import (
    LEAST,
    MOST_REGISTERS,
    Multiprocessor,
    blocks_at_once,
    multiprocessor,
    registers_for,
)
from flashrt.base.errors import PlanError
from flashrt.core.groups import Groups, Scales
from flashrt.core.op import Launch
from flashrt.core.region import ActDTypes, DType, resolve_dtype

Defines = tuple[tuple[str, str], ...]
Grid = tuple[int, int, int]

WARP: Final = 32
ATTENTION_KEYS: Final = 256  # keys per block of the canonical order
ATTENTION_WAVES: Final = 4  # blocks of `attention_partial` per multiprocessor: two at a time, twice
K_SLICE: Final = 256  # k per chain of mma in the canonical order of `linear`
SUPER_SLICE: Final = 8 * K_SLICE  # k whose slices are added up before they meet others
FEW_TOKENS: Final = 32  # up to here a launch of `linear` is bound by its weights
BUSY_FEW_WARPS: Final = 16  # of a multiprocessor in `linear_few`: enough weights in flight
MANY_STAGES: Final = (4, 3)  # tiles of 32 k in flight in `linear_many`
BUSY_WARPS: Final = 8  # of a multiprocessor: with half of them, nobody covers the waits of a warp
HALF_BUSY: Final = 0.7  # its rate then, an estimate
MANY_SHARED_BYTES: Final = 99 << 10  # for them: of sm_86, sm_89 and sm_120, the least of all
# What blocks that share K leave for each other: counters of tiles, then planes of sums.
WORKSPACE_BYTES: Final = 32 << 20
WORKSPACE_TILES: Final = 4096
SPLIT_ARGS_FORMAT: Final = "@PP4i"  # split_args of linear_many.cu
FOLD_K: Final = 256  # a plane costs a tile as much as so many k, an estimate
SAMPLE_CHUNK: Final = 2048  # tokens of a block of `sample_narrow`
SAMPLE_SHARED_FROM: Final = 16384  # from so many tokens on its blocks share the work
SAMPLE_PASSES: Final = 5  # launches of it then: three digits for top_k, two more for top_p
CONV_ROWS: Final = 16  # rows per block of `conv_window` and `gated_conv`
ATTEND_COLUMNS: Final = 5  # of a lane in `attend`: what shared memory holds of keys and values
DELTA_FEW_ROWS: Final = 8  # of a run in `delta_few`
COPY_THREADS: Final = 256
COPY_ARGS_FORMAT: Final = "@Pi0P"  # copy_batch_args: table, n
DIGEST_ARGS_FORMAT: Final = (
    "@PPi0P"  # digest_terms_args: terms, sums [n][2] (zeroed by the caller), n
)


@dataclass(frozen=True, slots=True)
class Split:
    """How the blocks of `linear_many` share K, at whole super-slices.

    The canonical order adds super-slices up one after the other, so those of the first part go
    together, and each of the others needs a plane of its own.
    """

    parts: int  # blocks of a tile
    supers: int  # super-slices of a part; the last one may have less
    row_blocks: int  # blocks along rows of W
    tiles: int  # of all runs
    plane_bytes: int  # of a super-slice of all tiles

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace that it takes."""
        return 4 * WORKSPACE_TILES + self.planes * self.plane_bytes if self.parts > 1 else 0

    @property
    def planes(self) -> int:
        """Most planes of such a split."""
        return 1 + (self.parts - 1) * self.supers if self.parts > 1 else 0

    @property
    def fits(self) -> bool:
        """Whether the workspace holds it."""
        return self.parts == 1 or (self.nbytes <= WORKSPACE_BYTES and self.tiles <= WORKSPACE_TILES)

    def pack(self, workspace: int) -> bytes:
        """What follows the op's arguments; `workspace` is an address, and not read of one part."""
        return struct.pack(
            SPLIT_ARGS_FORMAT, workspace + 4 * WORKSPACE_TILES, workspace, self.parts,
            self.supers, self.row_blocks, self.tiles,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One CUDA launch: what to compile (source, defines) and how to start it."""

    source: str  # file name in cuda_src
    kernel: str
    defines: Defines
    grid: Grid
    block: Grid
    shared_bytes: int = 0  # dynamic
    split: Split | None = None  # arguments of `linear_many` beside those of the op

    def of_runs(self, n: int) -> KernelLaunch:
        """The launch for `n` runs: run r is the blocks with blockIdx.z = r (OPEN_RUN).

        Raises PlanError where the grid uses its third dimension already.
        """
        if self.grid[2] != 1:
            raise PlanError(f"{self.kernel}: grid {self.grid} leaves no dimension for runs")
        split = self.split and replace(
            self.split, tiles=n * self.split.tiles, plane_bytes=n * self.split.plane_bytes
        )
        return replace(self, grid=(*self.grid[:2], n), split=split)


@dataclass(frozen=True, slots=True)
class Shape:
    """What an expansion may look at: sizes, attributes, dtypes of params, the device's size, the
    groups of params that are quantised, and what a multiprocessor has room for.
    """

    op: str
    dims: Mapping[str, int]
    dtypes: Mapping[str, DType]
    attrs: Mapping[str, int | float]
    act: DType
    n_sms: int
    groups: Mapping[str, Groups] = field(default_factory=dict)
    sm: Multiprocessor = LEAST

    @property
    def act_parts(self) -> int:
        """bfloat16 parts that an activation goes into the tensor cores as: 1, 2 or 3."""
        return ACT_PARTS[self.act]


ACT_PARTS: Final = {DType.BF16: 1, DType.BF16X2: 2, DType.F32: 3}
_ACT_BYTES = {1: 2, 2: 4, 3: 4}  # by parts


Expansion = Callable[[Shape], tuple[KernelLaunch, ...]]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _x(threads: int) -> Grid:
    return (threads, 1, 1)


def _defines(**values: int) -> Defines:
    return tuple((name, str(value)) for name, value in values.items())


def _weights(s: Shape, name: str) -> Defines:
    """The format of a weight matrix; none for bfloat16, which sources take for granted."""
    is_plain = s.dtypes.get(name, DType.BF16) is DType.BF16
    return () if is_plain else _format(s, name, "W")


def _format(s: Shape, name: str, prefix: str) -> Defines:
    """The format of any weight matrix."""
    dtype, groups = s.dtypes.get(name, DType.BF16), s.groups.get(name)
    size, outer, scales = (
        (0, 0, -1) if groups is None else (groups.size, groups.outer, groups.scales.code)
    )
    values = {"DTYPE": dtype.code, "GROUP": size, "OUTER": outer, "SCALES": scales}
    return tuple((f"{prefix}_{what}", str(value)) for what, value in values.items())


def _embed(s: Shape) -> tuple[KernelLaunch, ...]:
    return (KernelLaunch("embed.cu", s.op, _weights(s, "table"), _x(s.dims["T"]), _x(256)),)


def row_geometry(cols: int) -> tuple[int, int, int]:
    """(vector width, vectors per thread, threads) of a block that holds a row; fixed by `cols`."""
    width = 4 if cols % 4 == 0 else 1
    vectors = cols // width
    per_thread = _ceil(vectors, 512)
    return width, per_thread, _ceil(_ceil(vectors, per_thread), WARP) * WARP


def _norm(s: Shape) -> tuple[KernelLaunch, ...]:
    width, vectors, threads = row_geometry(s.dims["H"])
    defines = _defines(ACT_PARTS=s.act_parts, WIDTH=width, VECTORS=vectors, THREADS=threads)
    return (KernelLaunch("norm.cu", s.op, defines, _x(s.dims["T"]), _x(threads)),)


def _draft_input(s: Shape) -> tuple[KernelLaunch, ...]:
    table = _weights(s, "table")
    return tuple(replace(k, grid=(s.dims["T"], 2, 1), defines=k.defines + table) for k in _norm(s))


def _linear(s: Shape) -> tuple[KernelLaunch, ...]:
    if s.dims["T"] <= FEW_TOKENS:
        return (_linear_few(s),)
    tile, parts = many_choice(s)
    # a few more tokens on a narrow matrix: `linear_few` alone divides K among warps
    is_few = few_cost(s) < tile.cost(s, parts)
    return (_linear_few(s) if is_few else linear_many(s, tile, parts),)


def _few_tiles(t: int) -> int:
    """Token tiles of a warp of `linear_few`."""
    return 1 if t <= 8 else 2 if t <= 16 else 4


def _most_few_warps(s: Shape) -> int:
    """Warps of a block of `linear_few` that registers leave room for: 8 of 4 tiles, or 2 with
    scales.
    """
    tiles = _few_tiles(s.dims["T"])
    is_folded = any(_is_folded(s, name) for name in s.groups)
    return 8 if tiles == 4 or (tiles == 2 and is_folded) else 16


def _few(
    s: Shape, kernel: str, *rows: int, halves: int = 1, is_normed: bool = False, blocks: int = 1,
    most_warps: int = 0,
) -> KernelLaunch:  # fmt: skip
    """A kernel of linear_few.cuh with outputs for so many rows of W, or of each matrix: a block
    takes 16 of one, or the 16 of each half. `blocks`: of a row tile; `most_warps`: of a block, else
    `_most_few_warps`.
    """
    t, k = s.dims["T"], s.dims["K"]
    tiles = _few_tiles(t)
    slices, row_tiles = _ceil(k, K_SLICE), sum(_ceil(n, 16) for n in rows)
    dynamic = t * k * _ACT_BYTES[s.act_parts] if is_normed else 0
    # 16 warps per multiprocessor keep enough weights in flight: several small blocks if there are
    # row tiles for them, larger ones if not, or if rows take too much shared memory of each
    most_warps = most_warps or _most_few_warps(s)
    most = min(most_warps // halves, 1 << (slices - 1).bit_length())
    warps = min(4, most)

    def is_small() -> bool:
        block = warps * halves
        if block * row_tiles * blocks < BUSY_FEW_WARPS * s.n_sms:
            return True
        registers = registers_for(WARP * block, most_warps // block)
        shared = dynamic + _few_static_bytes(block, tiles)
        at_once = blocks_at_once(s.sm, WARP * block, registers, shared)
        return is_normed and at_once * block < most_warps

    while warps < most and is_small():
        warps *= 2
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(k % 8 == 0), WHOLE=int(k % K_SLICE == 0), WARPS=warps,
        TOKEN_TILES=tiles,
    )  # fmt: skip
    if is_normed:
        _, vectors, threads = row_geometry(k)
        defines += _defines(NORM_VECTORS=vectors, NORM_THREADS=threads)
    grid = (row_tiles, _ceil(t, 8 * tiles), 1)
    if len(rows) > 1:
        defines += tuple(d for i in range(len(rows)) for d in _format(s, f"w{i}", f"W{i}"))
    else:
        defines += _weights(s, "w")
    return KernelLaunch(f"{kernel}.cu", kernel, defines, grid, _x(WARP * warps * halves), dynamic)


def part_of(launch: KernelLaunch, i: int, rows: int) -> KernelLaunch:
    """What the blocks of part `i`, of so many rows of W, execute in a launch of several matrices:
    `linear_few` or `norm_linear` in blocks of the same size.
    """
    kernel = "norm_linear" if launch.kernel.startswith("norm_") else "linear_few"
    own, defines = f"W{i}_", []
    for name, value in launch.defines:
        if name.startswith(own):
            defines.append((f"W_{name.removeprefix(own)}", value))
        elif not re.match(r"W\d", name):
            defines.append((name, value))
    if ("W_DTYPE", str(DType.BF16.code)) in defines:
        defines = [(name, value) for name, value in defines if not name.startswith("W_")]
    grid = (_ceil(rows, 16), *launch.grid[1:])
    return replace(launch, source=f"{kernel}.cu", kernel=kernel, defines=tuple(defines), grid=grid)


def _few_static_bytes(warps: int, tiles: int) -> int:
    """Shared memory of a block of linear_few.cuh, less the rows that it norms."""
    return 2 * warps * tiles * WARP * 16


def holds_normed_rows(s: Shape) -> bool:
    """Whether a block of `norm_linear`, or of one with several matrices, has room for all rows of
    x.
    """
    t, k = s.dims["T"], s.dims["K"]
    if t > FEW_TOKENS or k % 8:
        return False
    static = _few_static_bytes(_most_few_warps(s), _few_tiles(t))
    return t * k * _ACT_BYTES[s.act_parts] + static <= DEFAULT_SHARED_BYTES


def _linear_few(s: Shape) -> KernelLaunch:
    return _few(s, "linear_few", s.dims["N"])


def _linear_silu(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(s, "linear_silu", s.dims["I"], halves=2),)


def _linear_add(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(s, "linear_add", s.dims["N"]),)


def _norm_linear(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(_with_parts_of_x(s), "norm_linear", s.dims["N"], is_normed=True),)


def _with_parts_of_x(s: Shape) -> Shape:
    """Of a launch that norms x itself: the activations are what it makes, not an operand."""
    (act,) = (dtype for dtype, n in ACT_PARTS.items() if n == s.attrs["parts"])
    return replace(s, act=act)


def _matrix_rows(s: Shape) -> list[int]:
    """Of the matrices of a launch of several, whose number is the last word of the op."""
    return [s.dims[f"N{i}"] for i in range(int(s.op.rsplit("_", 1)[1]))]


def _linears(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(s, s.op, *_matrix_rows(s)),)


def _norm_linears(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(_with_parts_of_x(s), s.op, *_matrix_rows(s), is_normed=True),)


def _norm_silu(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_few(s, "norm_silu", s.dims["I"], halves=2, is_normed=True),)


def few_cost(s: Shape) -> float:
    """Time of `linear_few`, in the units of `ManyTile.cost`: its rate is that of its busy warps."""
    launch = _linear_few(s)
    blocks, warps = launch.grid[0] * launch.grid[1], launch.block[0] // WARP
    most = _ceil(blocks, s.n_sms)  # on a multiprocessor
    busy = min(warps, _ceil(s.dims["K"], K_SLICE)) * min(most, max(1, BUSY_WARPS // warps))
    work = 16 * 8 * _few_tiles(s.dims["T"])
    return most * work / (FEW_EFFICIENCY * min(1.0, busy / BUSY_WARPS))


@dataclass(frozen=True, slots=True)
class ManyTile:
    """A block of `linear_many`: warps along rows of W and along tokens, mma tiles per warp."""

    warps_n: int
    warps_t: int
    row_tiles: int
    token_tiles: int
    blocks: int  # of a multiprocessor, that registers leave room for: launch bounds
    efficiency: float  # of a multiprocessor full of such blocks, against the largest: an estimate

    @property
    def rows(self) -> int:
        """Rows of W per block."""
        return 16 * self.warps_n * self.row_tiles

    @property
    def tokens(self) -> int:
        """Tokens per block."""
        return 8 * self.warps_t * self.token_tiles

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.warps_n * self.warps_t

    def grid(self, s: Shape) -> Grid:
        """Blocks along tokens, next to each other: they read the same rows of W, which then come
        from memory once. And along rows of W.
        """
        return (_ceil(s.dims["T"], self.tokens), _ceil(s.dims["N"], self.rows), 1)

    def stage_bytes(self, s: Shape) -> int:
        """Shared memory of a chunk: weights with their scales, and x."""
        return self.rows // 16 * _tile_bytes(s, "w") + self.tokens * 64 * min(s.act_parts, 2)

    def stages(self, s: Shape) -> int:
        """Chunks in flight: one less than most where that lets another block in that is needed."""
        fitting = [n for n in MANY_STAGES if n * self.stage_bytes(s) <= MANY_SHARED_BYTES]
        return max(fitting, key=lambda n: (self._rate(self._at_once(s, n)), n))

    def at_once(self, s: Shape) -> int:
        """Blocks that a multiprocessor holds at once."""
        return self._at_once(s, self.stages(s))

    def _at_once(self, s: Shape, stages: int) -> int:
        threads = WARP * self.warps
        registers = registers_for(threads, self.blocks)
        return blocks_at_once(s.sm, threads, registers, stages * self.stage_bytes(s))

    def _rate(self, blocks: int) -> float:
        """Work per time of a multiprocessor that holds so many blocks."""
        return self.efficiency * (1.0 if blocks * self.warps >= BUSY_WARPS else HALF_BUSY)

    def split(self, s: Shape, parts: int) -> Split:
        """K divided among at most so many parts of equally many super-slices."""
        grid, n_supers = self.grid(s), _ceil(s.dims["K"], SUPER_SLICE)
        supers, tiles = _ceil(n_supers, parts), grid[0] * grid[1]
        return Split(
            _ceil(n_supers, supers), supers, grid[1], tiles, 4 * tiles * self.rows * self.tokens
        )

    def parts(self, s: Shape) -> list[int]:
        """In how many parts K can be divided."""
        several = range(1, _ceil(s.dims["K"], SUPER_SLICE) + 1)
        return [n for n in several if (split := self.split(s, n)).parts == n and split.fits]

    def cost(self, s: Shape, parts: int = 1) -> float:
        """Time in arbitrary units: work of the multiprocessor with most to do, by what it holds at
        once; and where K is divided, the planes of sums.
        """
        split, at_once, k = self.split(s, parts), self.at_once(s), s.dims["K"]
        share = min(1.0, split.supers * SUPER_SLICE / k)  # of K, in a part; the last has the rest
        blocks, load = most_loaded(s.n_sms, split.tiles, parts, share)
        rounds, rest = divmod(blocks, at_once)
        work = self.rows * self.tokens
        time = rounds * at_once / self._rate(at_once) + rest / self._rate(rest)
        folds = split.planes * FOLD_K / k * _ceil(split.tiles, s.n_sms)
        return work * (time * load / blocks + folds)


def most_loaded(n_sms: int, tiles: int, parts: int, share: float) -> tuple[int, float]:
    """(blocks, load) of the multiprocessor with most to do. A block of each part but the last is a
    load of `share`, of the last what is left of 1. Whole parts go first, the others fill gaps.
    """
    rest = 1.0 - (parts - 1) * share
    if parts == 1 or rest >= share:
        blocks = _ceil(tiles * parts, n_sms)
        return blocks, blocks * share
    rounds, over = divmod(tiles * (parts - 1), n_sms)
    in_gaps = (n_sms - over) * int(share / rest) if over else 0
    more = _ceil(max(0, tiles - in_gaps), n_sms)
    blocks = rounds + (over > 0)
    return blocks + more, blocks * share + more * rest


FEW_EFFICIENCY: Final = 0.3  # of `linear_few` with 4 tiles: it loads x for each 16 rows of W
_SMALL_TILES: Final = (ManyTile(2, 2, 1, 4, 4, 0.55), ManyTile(2, 2, 1, 2, 4, 0.35))
MANY_TILES: Final = (
    ManyTile(2, 4, 4, 4, 1, 1.0),
    ManyTile(2, 2, 4, 4, 2, 0.95),
    ManyTile(2, 2, 3, 4, 2, 0.9),
    ManyTile(2, 2, 2, 4, 3, 0.75),
    *_SMALL_TILES,
)
# Where chains with their scales, or weights in three parts, take the registers of a row tile.
NARROW_TILES: Final = (
    ManyTile(2, 4, 3, 4, 1, 0.95),
    ManyTile(2, 2, 3, 4, 2, 0.9),
    ManyTile(2, 2, 2, 4, 2, 0.75),
    *_SMALL_TILES,
)


def _is_folded(s: Shape, name: str) -> bool:
    """Whether scales are applied to sums; those of float8 on 4-bit floats go into the codes."""
    groups = s.groups.get(name)
    is_float8 = groups is not None and groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER)
    return groups is not None and not (is_float8 and s.dtypes[name] is DType.E2M1)


def many_tiles(s: Shape) -> tuple[ManyTile, ...]:
    """The tiles of `linear_many` for a format of weights."""
    is_narrow = _is_folded(s, "w") or s.dtypes.get("w") is DType.F32
    return NARROW_TILES if is_narrow else MANY_TILES


def many_choice(s: Shape) -> tuple[ManyTile, int]:
    """The tile, and the number of parts of K, that take the least time by the estimate."""
    sizes = s.dims["T"], s.dims["N"], s.dims["K"]
    return _many_choice(sizes, s.dtypes.get("w"), s.groups.get("w"), s.act, s.n_sms, s.sm)


@functools.cache  # a model has few matrices of different sizes, and many launches
def _many_choice(
    sizes: tuple[int, int, int],
    dtype: DType | None,
    groups: Groups | None,
    act: DType,
    n_sms: int,
    sm: Multiprocessor,
) -> tuple[ManyTile, int]:
    s = Shape(
        "linear", dict(zip("TNK", sizes, strict=True)), {} if dtype is None else {"w": dtype}, {},
        act, n_sms, {} if groups is None else {"w": groups}, sm,
    )  # fmt: skip
    choices = [(tile, parts) for tile in many_tiles(s) for parts in tile.parts(s)]
    return min(choices, key=lambda choice: choice[0].cost(s, choice[1]))


def linear_many(s: Shape, tile: ManyTile, parts: int = 1) -> KernelLaunch:
    """`linear_many` with a tile and K in so many parts; all give the same bits."""
    split, grid = tile.split(s, parts), tile.grid(s)
    stages = tile.stages(s)
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(s.dims["K"] % 8 == 0), WARPS_N=tile.warps_n,
        WARPS_T=tile.warps_t, ROW_TILES=tile.row_tiles, TOKEN_TILES=tile.token_tiles,
        STAGES=stages, BLOCKS=tile.blocks,
    )  # fmt: skip
    shared_bytes = stages * tile.stage_bytes(s)
    return KernelLaunch(
        "linear_many.cu", "linear_many", defines + _weights(s, "w"),
        (grid[0], grid[1] * split.parts, 1), _x(WARP * tile.warps), shared_bytes, split,
    )  # fmt: skip


def _tile_bytes(s: Shape, name: str) -> int:
    """Bytes of 16 rows of a weight matrix by 32 k, with the scales that they need."""
    groups = s.groups.get(name)
    planes = groups.planes if groups is not None else ()
    scales = (max(1, 32 // p.size) * p.dtype.itemsize for p in planes if p.size)
    return 64 * s.dtypes.get(name, DType.BF16).bits + 16 * sum(scales)


MOST_EXPERTS: Final = 1024  # of `route`: a bit of a lane for each of its 32
MOST_PICKS: Final = WARP  # of a row


def _route(s: Shape) -> tuple[KernelLaunch, ...]:
    experts, picks = s.dims["E"], s.dims["P"]
    if experts > MOST_EXPERTS or picks > MOST_PICKS:
        raise PlanError(
            f"route: {picks} of {experts} experts; there are kernels for up to {MOST_PICKS} of "
            f"{MOST_EXPERTS}"
        )
    defines = _defines(
        VALUES=_ceil(experts, WARP), SCORING=int(s.attrs["scoring"]),
        BIASED=int(s.attrs["biased"]), NORMED=int(s.attrs["normed"]),
    )  # fmt: skip
    return (KernelLaunch("route.cu", "route", defines, _x(_ceil(s.dims["T"], 4)), _x(4 * WARP)),)


def _experts_in(s: Shape) -> tuple[KernelLaunch, ...]:
    if s.dims["T"] <= FEW_TOKENS:
        return (_experts_few(s, "experts_in_few", s.dims["H"], s.dims["I"], halves=2),)
    return experts_many(s, expert_tile(s))


def _experts_out(s: Shape) -> tuple[KernelLaunch, ...]:
    if s.dims["T"] == 1 and s.dims["P"] <= _most_expert_warps(s):
        return (_experts_out_one(s),)
    grid = (_ceil(s.dims["H"], 256), s.dims["T"], 1)
    total = KernelLaunch("experts.cu", "experts_sum", _defines(GATED=0), grid, _x(256))
    if s.dims["T"] <= FEW_TOKENS:
        return (_experts_few(s, "experts_out_few", s.dims["I"], s.dims["H"]), total)
    return (*experts_many(s, expert_tile(s)), total)


def _experts_out_one(s: Shape) -> KernelLaunch:
    """All picks of the one row in a block, so that it adds them up."""
    picks, k = s.dims["P"], s.dims["I"]
    warps = 1
    while 2 * warps * picks <= _most_expert_warps(s) and warps < _ceil(k, K_SLICE):
        warps *= 2
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(k % 8 == 0), WHOLE=int(k % K_SLICE == 0), WARPS=warps,
        TOKEN_TILES=1, PICKS=picks,
    )  # fmt: skip
    grid = _x(_ceil(s.dims["H"], 16))
    return KernelLaunch(
        "experts_out_one.cu", "experts_out_one", defines + _weights(s, "w"), grid,
        _x(WARP * warps * picks),
    )  # fmt: skip


def _most_expert_warps(s: Shape) -> int:
    """Of a block of experts_few.cuh, whose IS_TIGHT formats take the registers of half of them."""
    return 8 if s.dtypes.get("w") in (DType.U5, DType.U6, DType.E2M1) else 16


def _experts_few(s: Shape, kernel: str, k: int, n: int, *, halves: int = 1) -> KernelLaunch:
    """A kernel of experts_few.cuh with outputs for `n` rows of an expert: a block per pick, which
    has room for twice the rows that an expert can expect.
    """
    picks = s.dims["T"] * s.dims["P"]
    rows = min(s.dims["T"], _ceil(2 * picks, s.dims["E"]))
    shape = replace(s, dims={"T": rows, "K": k})
    most_warps = min(_most_expert_warps(s), _most_few_warps(shape))
    launch = _few(shape, kernel, n, halves=halves, blocks=picks, most_warps=most_warps)
    return replace(launch, grid=(launch.grid[0], picks, 1))


# Of `experts_in_many` and `experts_out_many`, by tokens. Super-slices are added up in registers, so
# tiles of a warp are small.
EXPERT_TILES: Final = (
    ManyTile(4, 1, 2, 2, 3, 0.4),
    ManyTile(4, 1, 2, 4, 2, 0.6),
    ManyTile(2, 2, 2, 4, 2, 0.75),
)
EXPERT_GROUPS_THREADS: Final = MOST_EXPERTS
MOST_EXPERT_TILES: Final = 1 << 16  # of one expert: see experts_group.cu


def expert_tile(s: Shape) -> ManyTile:
    """The tile that holds the rows which an expert can expect, and some more; or the largest."""
    expected = s.dims["T"] * s.dims["P"] / s.dims["E"]
    return next((t for t in EXPERT_TILES if t.tokens >= 1.25 * expected), EXPERT_TILES[-1])


def experts_many(s: Shape, tile: ManyTile) -> tuple[KernelLaunch, ...]:
    """`experts_in` or the products of `experts_out`, picks grouped by expert; all tiles give the
    same bits.
    """
    is_in = s.op == "experts_in"
    k, n = (s.dims["H"], 2 * s.dims["I"]) if is_in else (s.dims["I"], s.dims["H"])
    picks = s.dims["T"] * s.dims["P"]
    most = picks // tile.tokens + min(picks, s.dims["E"])  # tiles, of which some are not whole
    shape = _defines(BLOCK_TOKENS=tile.tokens, MOST_TILES=MOST_EXPERT_TILES)
    group = KernelLaunch(
        "experts_group.cu", f"{s.op}_group", shape + _defines(THREADS=EXPERT_GROUPS_THREADS),
        _x(1), _x(EXPERT_GROUPS_THREADS),
    )  # fmt: skip
    stages = tile.stages(s)
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(k % 8 == 0), WARPS_N=tile.warps_n, WARPS_T=tile.warps_t,
        ROW_TILES=tile.row_tiles, TOKEN_TILES=tile.token_tiles, STAGES=stages, BLOCKS=tile.blocks,
        IS_LONG=int(k > SUPER_SLICE), MOST_TILES=MOST_EXPERT_TILES,
    )  # fmt: skip
    many = KernelLaunch(
        f"{s.op}_many.cu", f"{s.op}_many", defines + _weights(s, "w"),
        (min(picks, most), _ceil(n, tile.rows), 1), _x(WARP * tile.warps),
        stages * tile.stage_bytes(s),
    )  # fmt: skip
    return group, many


def _add_gated(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["H"], 256), s.dims["T"], 1)
    defines = _defines(GATED=int(s.attrs["gated"]))
    return (KernelLaunch("experts.cu", "add_gated", defines, grid, _x(256)),)


def _conv_window(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["C"], 128), _ceil(s.dims["T"], CONV_ROWS), 1)
    defines = _defines(TAPS=s.dims["W1"], ROWS_PER_BLOCK=CONV_ROWS)
    return (KernelLaunch("conv.cu", s.op, defines, grid, _x(128)),)


def _gated_conv(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["C"], 128), _ceil(s.dims["T"], CONV_ROWS), 1)
    defines = _defines(
        ACT_PARTS=s.act_parts, TAPS=s.dims["W1"], ROWS_PER_BLOCK=CONV_ROWS,
        BIASED=int(s.attrs["biased"]),
    )  # fmt: skip
    return (KernelLaunch("gated_conv.cu", "gated_conv", defines, grid, _x(128)),)


def _delta_gates(s: Shape) -> tuple[KernelLaunch, ...]:
    units = 2 * int(s.attrs["key_heads"]) + _ceil(s.dims["Hv"], WARP)  # one warp each
    defines = _defines(KEY_DIM=int(s.attrs["key_dim"]))
    grid = (_ceil(units, 4), s.dims["T"], 1)
    return (KernelLaunch("delta_gates.cu", "delta_gates", defines, grid, _x(128)),)


def _delta_rule(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(KEY_DIM=s.dims["dk"], VALUE_DIM=s.dims["dv"])
    grid = (_ceil(s.dims["dv"], 16), s.dims["Hv"], 1)
    return (KernelLaunch("delta_rule.cu", s.op, defines, grid, _x(128)),)


def _delta_few(s: Shape) -> tuple[KernelLaunch, ...]:
    dk, dv = s.dims["dk"], s.dims["dv"]
    defines = _defines(ACT_PARTS=s.act_parts, KEY_DIM=dk, VALUE_DIM=dv, TAPS=s.dims["W1"])
    return (KernelLaunch("delta_few.cu", "delta_few", defines, _x(s.dims["Hv"]), _x(4 * dv)),)


def fits_delta_few(rows: int, key_dim: int, value_dim: int) -> bool:
    """Whether `delta_few` has room: for rows in shared memory, for columns in registers."""
    sizes = key_dim <= 128 and value_dim <= 128 and not (key_dim % 4 or value_dim % 8)
    return rows <= DELTA_FEW_ROWS and sizes


def _gated_rmsnorm(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(ACT_PARTS=s.act_parts, VALUE_DIM=s.dims["dv"])
    grid = (_ceil(s.dims["C"] // s.dims["dv"], 4), s.dims["T"], 1)
    return (KernelLaunch("gated_norm.cu", "gated_rmsnorm", defines, grid, _x(128)),)


def _ssm(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(STATE_DIM=s.dims["dk"], HEAD_DIM=s.dims["dv"])
    grid = (_ceil(s.dims["dv"], 16), s.dims["Hv"], 1)
    return (KernelLaunch("ssm.cu", "ssm", defines, grid, _x(128)),)


def _silu_rmsnorm(s: Shape) -> tuple[KernelLaunch, ...]:
    columns, groups = s.dims["C"], int(s.attrs["groups"])
    per_thread = _ceil(columns // groups, 512)
    threads = _ceil(_ceil(columns // groups, per_thread), WARP) * WARP
    defines = _defines(ACT_PARTS=s.act_parts, VALUES=per_thread, THREADS=threads)
    grid = (groups, s.dims["T"], 1)
    return (KernelLaunch("silu_norm.cu", "silu_rmsnorm", defines, grid, _x(threads)),)


_CACHE_CODES: Final = {DType.I8: 1, DType.E4M3: 2}  # codes of keys and values: see codes.cuh


def _rope_append(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(
        HEAD_DIM=s.dims["D"], CACHE_F32=int(s.dtypes["keys"] is DType.F32),
        CACHE_CODES=_CACHE_CODES.get(s.dtypes["keys"], 0),
        GATED=int(s.attrs["gated"]), NORMED=int(s.attrs["normed"]),
    )  # fmt: skip
    grid = (_ceil(s.dims["Nq"] + 2 * s.dims["Nk"], 4), s.dims["T"], 1)
    return (KernelLaunch("rope.cu", s.op, defines, grid, _x(128)),)


def _cached_rows(s: Shape) -> tuple[KernelLaunch, ...]:
    heads = s.dims["N" if s.op == "rope_rows" else "Nk"]
    defines = _defines(CACHE_F32=int(s.dtypes.get("keys") is not DType.BF16))
    grid = (heads, s.dims["T"], 1)
    return (KernelLaunch("cached_rows.cu", s.op, defines, grid, _x(64)),)


WARPS_OF_ATTENTION: Final = 8
COLUMN_TILES: Final = (16, 12, 10, 8, 6, 4)  # of 8 columns, of a block of `attention_rows`
# Of a thread: tiles of the scores and of the outputs that are in registers, 8 for each; further
# outputs are parked in shared memory. The fewest that it has room for: with more, ptxas spills on
# some architecture; the most only without keys and values to convert.
HELD_TILES: Final = (16, 20, 22)
LEAST_KEPT: Final = 4  # tiles of outputs
# Time of a block of keys beside that for its columns (copies, operands of keys and values,
# barriers), in tiles of columns: an estimate.
ATTENTION_FIXED: Final = 4


def _attention(s: Shape) -> tuple[KernelLaunch, ...]:
    t, d, nq, nk = s.dims["T"], s.dims["D"], s.dims["Nq"], s.dims["Nk"]
    group = nq // nk
    if d % 8 or d > 256 or group > 32:
        raise PlanError(
            f"attention: head size {d} must be a multiple of 8 up to 256, and {group} query heads "
            "per key head at most 32"
        )
    if s.dims["TP"] < t:
        widths = attention_widths(s)
        if not widths:
            raise PlanError(
                f"attention: no block of heads of {d}, over keys in {s.dtypes['keys']} and in "
                f"{s.act_parts} parts, fits this device; take precision='bfloat16'"
            )
        return (attention_many(s, min(widths, key=lambda n: _columns_cost(s, n))),)
    # blocks of keys side by side, then a merge
    # with 4, pairs of parts and codes spill a few bytes; a tile must hold a whole group
    is_narrow = group <= 24 and (s.act_parts == 2 or s.dtypes["keys"] in _CACHE_CODES)
    tiles = min(3 if is_narrow else 4, _ceil(t * group, 8))
    defines, source = _attention_defines(s, tiles), "attention_few.cu"
    groups = nk * _ceil(t, 8 * tiles // group)
    # not as many as max_positions has: those beyond the position cost time each, and do nothing
    grid = (min(s.dims["B"], max(1, ATTENTION_WAVES * s.n_sms // groups)), groups, 1)
    shared = 8 * tiles * _column_bytes(s)
    merge = KernelLaunch(source, "attention_merge", defines, (nq, t, 1), _x(_ceil(d, WARP) * WARP))
    return KernelLaunch(source, "attention_partial", defines, grid, _x(256), shared), merge


def _attention_defines(s: Shape, tiles: int) -> Defines:
    return _defines(
        ACT_PARTS=s.act_parts, CACHE_F32=int(s.dtypes["keys"] is DType.F32),
        CACHE_CODES=_CACHE_CODES.get(s.dtypes["keys"], 0), HEAD_DIM=s.dims["D"],
        GROUP=s.dims["Nq"] // s.dims["Nk"], COLUMN_TILES=tiles, SHIFT=int(s.attrs["shift"]),
        GATED=int(s.attrs["gated"]),
        **({"SEES": int(s.attrs["seen"])} if s.attrs.get("seen") else {}),
    )  # fmt: skip


def _column_bytes(s: Shape) -> int:
    """Shared memory of a column of attention: q and p, four running values, one of each warp."""
    parts = _ceil(s.dims["D"], 64) * 64 + ATTENTION_KEYS
    return 2 * parts * s.act_parts + 4 * (4 + WARPS_OF_ATTENTION)


def _sharers(s: Shape) -> int:
    """Warps of `attention_rows` that divide the columns of 32 dims of the values."""
    dim_groups = _ceil(s.dims["D"], WARP)
    return 1 if dim_groups > 4 else 2 if dim_groups > 2 else 4


def _kept_tiles(s: Shape, tiles: int) -> int:
    """Tiles of a warp whose running outputs are in registers."""
    held = HELD_TILES if s.dtypes["keys"] is DType.BF16 else HELD_TILES[:-1]
    kept = [min(tiles // _sharers(s), max(LEAST_KEPT, n - tiles)) for n in held]
    return next((n for n in kept if _fits(s, _attention_bytes(s, tiles, n))), kept[-1])


def _attention_bytes(s: Shape, tiles: int, kept: int) -> int:
    """Shared memory of a block: its columns; of each thread two chunks by cp.async, and 32 bytes
    of outputs for each tile that is parked.
    """
    chunk = 32 if s.dtypes["keys"] in _CACHE_CODES else 64
    of_thread = 2 * chunk + 32 * (tiles // _sharers(s) - kept)
    return 8 * tiles * _column_bytes(s) + WARP * WARPS_OF_ATTENTION * of_thread


def _fits(s: Shape, shared_bytes: int) -> bool:
    """Whether a multiprocessor holds a block of `attention_rows`."""
    return blocks_at_once(s.sm, WARP * WARPS_OF_ATTENTION, MOST_REGISTERS, shared_bytes) > 0


def attention_widths(s: Shape) -> tuple[int, ...]:
    """Tiles of 8 columns that a block of `attention_rows` may have: what registers and the
    architecture's shared memory leave room for, and all warps have work for. Widest first.
    """
    sharers, group = _sharers(s), s.dims["Nq"] // s.dims["Nk"]
    # beyond, the registers of scores, of outputs, or of a second part are too many
    most = 8 if s.act_parts > 1 else 12 if sharers <= 2 or s.dtypes["keys"] is DType.F32 else 16
    return tuple(
        tiles
        for tiles in COLUMN_TILES
        if tiles % (2 * sharers) == 0
        and tiles <= most
        and 8 * tiles >= group
        and _fits(s, _attention_bytes(s, tiles, _kept_tiles(s, tiles)))
    )


def _columns_cost(s: Shape, tiles: int) -> int:
    """Time in arbitrary units: blocks of the multiprocessor that has most."""
    grid = attention_many(s, tiles).grid
    return _ceil(grid[0] * grid[1], s.n_sms) * (tiles + ATTENTION_FIXED)


def attention_many(s: Shape, tiles: int) -> KernelLaunch:
    """`attention_rows` with blocks of so many tiles of columns; all give the same bits.

    A block reads the keys and values that it sees once, so a head reads them grid[0] times.
    """
    rows = 8 * tiles // (s.dims["Nq"] // s.dims["Nk"])
    grid = (_ceil(s.dims["T"], rows), s.dims["Nk"], 1)
    kept = _kept_tiles(s, tiles)
    return KernelLaunch(
        "attention_many.cu", "attention_rows",
        _attention_defines(s, tiles) + _defines(KEPT_TILES=kept), grid,
        _x(WARP * WARPS_OF_ATTENTION), _attention_bytes(s, tiles, kept),
    )  # fmt: skip


def _silu_mul(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["I"], 1024), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", "silu_mul", _act(s), grid, _x(256)),)


def _relu_squared(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["I"], 1024), s.dims["T"], 1)
    return (KernelLaunch("relu_squared.cu", "relu_squared", _act(s), grid, _x(256)),)


def _add_bias(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["N"], 256), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", "add_bias", _act(s), grid, _x(256)),)


def _scale_rows(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["N"], 256), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", "scale_rows", _act(s), grid, _x(256)),)


def _last_row(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = _x(_ceil(s.dims["H"], 256))
    return (KernelLaunch("elementwise.cu", "last_row", _act(s), grid, _x(256)),)


def _last_values(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = _x(_ceil(s.dims["C"], 256))
    return (KernelLaunch("elementwise.cu", "last_values", _act(s), grid, _x(256)),)


def _keep(s: Shape) -> tuple[KernelLaunch, ...]:
    columns = s.dims["H" if s.op == "keep_rows" else "C"]
    grid = (_ceil(columns, 256), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", s.op, _act(s), grid, _x(256)),)


def _one_warp(s: Shape) -> tuple[KernelLaunch, ...]:
    return (KernelLaunch("elementwise.cu", s.op, _act(s), _x(1), _x(WARP)),)


def _act(s: Shape) -> Defines:
    return _defines(ACT_PARTS=s.act_parts)


def _sample(s: Shape) -> tuple[KernelLaunch, ...]:
    if s.dims["V"] < 8:
        raise PlanError(f"sample: needs at least 8 logits, got {s.dims['V']}")
    v, defines = s.dims["V"], _defines(CHUNK=SAMPLE_CHUNK, SHARED_FROM=SAMPLE_SHARED_FROM)
    n_blocks = min(_ceil(v, 1024), 64)
    blocks, counters_bytes = _x(n_blocks), 4 * _ceil(v, n_blocks)
    is_shared = v >= SAMPLE_SHARED_FROM
    narrow = _x(_ceil(v, SAMPLE_CHUNK) if is_shared else 1)
    return (
        KernelLaunch("sample.cu", "sample_scan", defines, blocks, _x(256), counters_bytes),
        *[KernelLaunch("sample.cu", "sample_narrow", defines, narrow, _x(512))]
        * (SAMPLE_PASSES if is_shared else 1),
        KernelLaunch("sample.cu", "sample_pick", defines, blocks, _x(256)),
    )


def _bookkeeping(s: Shape) -> tuple[KernelLaunch, ...]:
    return (KernelLaunch("draft.cu", s.op, (), _x(1), _x(WARP)),)


def _dense(s: Shape) -> tuple[KernelLaunch, ...]:
    k = s.dims["K"]
    width = 4 if k % 4 == 0 else 1
    defines = _defines(WIDTH=width, AHEAD=min(8, _ceil(k, WARP * width)))
    grid = (_ceil(s.dims["N"], 4), s.dims.get("T", 1), 1)
    return (KernelLaunch("dense.cu", s.op, defines, grid, _x(4 * WARP)),)


def _policy(s: Shape) -> tuple[KernelLaunch, ...]:
    blocks = _ceil(s.dims["M"], 128) if s.op == "gru_cell" else 1
    return (KernelLaunch("policy.cu", s.op, (), _x(blocks), _x(128)),)


def _conv2d(s: Shape) -> tuple[KernelLaunch, ...]:
    """Tiles of 64 where they keep all multiprocessors busy, else of 32: the bits are the same."""
    pixels, n = s.dims["B"] * s.dims["Y"] * s.dims["X"], s.dims["N"]
    tile = 64 if _ceil(pixels, 64) * _ceil(n, 64) >= s.n_sms else 32
    is_whole = s.attrs["taps_y"] == s.attrs["taps_x"] == s.attrs["stride"] == 1
    is_pointwise = is_whole and s.attrs["padding"] == 0
    defines = _defines(TILE=tile, POINTWISE=int(is_pointwise))
    grid = (_ceil(pixels, tile), _ceil(n, tile), 1)
    return (KernelLaunch("conv2d.cu", s.op, defines, grid, _x(256)),)


def _max_pool(s: Shape) -> tuple[KernelLaunch, ...]:
    size = math.prod(s.dims[d] for d in ("B", "Y", "X", "C"))
    return (KernelLaunch("vision.cu", s.op, (), _x(_ceil(size, 256)), _x(256)),)


def _each_element(s: Shape) -> tuple[KernelLaunch, ...]:
    blocks = _ceil(s.dims["T"] * s.dims["C"], 256)
    return (KernelLaunch("vision.cu", s.op, (), _x(blocks), _x(256)),)


def _layer_norm(s: Shape) -> tuple[KernelLaunch, ...]:
    c = s.dims["C"]
    each = _ceil(c, 512)
    threads = _ceil(_ceil(c, each), WARP) * WARP
    defines = _act(s) + _defines(EACH=each, THREADS=threads)
    return (KernelLaunch("layer_norm.cu", s.op, defines, _x(s.dims["T"]), _x(threads)),)


def _attend(s: Shape) -> tuple[KernelLaunch, ...]:
    heads = int(s.attrs["heads"])
    columns = _ceil(s.dims["C"] // heads, WARP)
    if columns > ATTEND_COLUMNS:
        most = ATTEND_COLUMNS * WARP
        raise PlanError(f"attend: heads of {s.dims['C'] // heads} columns, at most {most}")
    grid = (_ceil(s.dims["T"], 8), heads, 1)
    defines = _act(s) + _defines(COLUMNS=columns)
    return (KernelLaunch("attend.cu", s.op, defines, grid, _x(8 * WARP)),)


def _of_patches(s: Shape) -> tuple[KernelLaunch, ...]:
    columns = s.dims["I"] if s.op in ("gelu", "geglu") else s.dims["C"]
    if s.op == "turn_patches":
        columns //= 2
    grid = (_ceil(columns, 256), s.dims["T"], 1)
    return (KernelLaunch("tower.cu", s.op, _act(s), grid, _x(256)),)


EXPANSIONS: Final[Mapping[str, Expansion]] = {
    "embed": _embed,
    "rmsnorm": _norm,
    "add_rmsnorm": _norm,
    "linear": _linear,
    "conv_window": _conv_window,
    "delta_gates": _delta_gates,
    "delta_rule": _delta_rule,
    "gated_rmsnorm": _gated_rmsnorm,
    "rope_append": _rope_append,
    "attention": _attention,
    "silu_mul": _silu_mul,
    "add_bias": _add_bias,
    "last_row": _last_row,
    "last_values": _last_values,
    "keep_rows": _keep,
    "keep_values": _keep,
    "last_cursor": _one_warp,
    "advance": _one_warp,
    "hold": _one_warp,
    "sample": _sample,
    "conv_verify": _conv_window,
    "delta_verify": _delta_rule,
    "draft_input": _draft_input,
    "draft_begin": _bookkeeping,
    "draft_note": _bookkeeping,
    "verify_cursors": _bookkeeping,
    "accept": _bookkeeping,
    "take_token": _bookkeeping,
    "dense": _dense,
    "dense_add": _dense,
    "flow_step": _dense,
    "observe": _policy,
    "gru_cell": _policy,
    "flow_begin": _policy,
    "flow_end": _policy,
    "take_action": _policy,
    "conv_biased": _conv_window,
    "ssm": _ssm,
    "silu_rmsnorm": _silu_rmsnorm,
    "scale_rows": _scale_rows,
    "relu_squared": _relu_squared,
    "delta_few": _delta_few,
    "linear_silu": _linear_silu,
    "linear_add": _linear_add,
    "norm_linear": _norm_linear,
    "norm_silu": _norm_silu,
    "linears_2": _linears,
    "linears_3": _linears,
    "norm_linears_2": _norm_linears,
    "norm_linears_3": _norm_linears,
    "hold_send": _one_warp,
    "gated_conv": _gated_conv,
    "see": _policy,
    "chunk_begin": _policy,
    "chunk_end": _policy,
    "ensemble": _policy,
    "conv2d": _conv2d,
    "conv2d_add": _conv2d,
    "max_pool": _max_pool,
    "layer_norm": _layer_norm,
    "add_rows": _each_element,
    "normalize": _each_element,
    "attend": _attend,
    "activations": _of_patches,
    "mix_rows": _of_patches,
    "add_layer_norm": _layer_norm,
    "gelu": _of_patches,
    "turn_patches": _of_patches,
    "attend_patches": _attend,
    "place_rows": _one_warp,
    "embed_seen": _embed,
    "draft_input_seen": _draft_input,
    "rope_placed": _rope_append,
    "route": _route,
    "experts_in": _experts_in,
    "experts_out": _experts_out,
    "add_gated": _add_gated,
    "rope_rows": _cached_rows,
    "append_rows": _cached_rows,
    "flow_noise": _policy,
    "guide": _policy,
    "euler": _policy,
    "image_patches": _of_patches,
    "all_rows": _one_warp,
    "geglu": _of_patches,
    "adaptive_rmsnorm": _norm,
}


def expand(
    launch: Launch,
    acts: ActDTypes,
    n_sms: int,
    arch: str,
    expansions: Mapping[str, Expansion] = EXPANSIONS,
) -> tuple[KernelLaunch, ...]:
    """The CUDA launches of one tape launch on `n_sms` multiprocessors of an `arch` ("sm_90"), in
    order. Raises PlanError for an unknown op.
    """
    op = launch.op
    if op.name not in expansions:
        raise PlanError(f"op {op.name!r} has no CUDA expansion; known are {sorted(expansions)}")
    dtypes = {
        p.name: resolve_dtype(v.region.dtype, acts)
        for p, v in zip(op.params, launch.operands, strict=True)
    }
    attrs = {a.name: v for a, v in zip(op.attrs, launch.attrs, strict=True)}
    own = [dtypes[p.name] for p in op.params if p.dtypes == (DType.ACT,)]  # ACT, or ACT_WIDE
    act = own[0] if own else acts.narrow
    groups = {
        p.name: v.region.groups
        for p, v in zip(op.params, launch.operands, strict=True)
        if v.region.groups is not None
    }
    sm = multiprocessor(arch)
    return expansions[op.name](Shape(op.name, launch.dims, dtypes, attrs, act, n_sms, groups, sm))


def copy_launch(nbytes: int, n_sms: int) -> KernelLaunch:
    """The batched copy over a table of descriptors; `nbytes` in all; args: COPY_ARGS_FORMAT."""
    blocks = max(1, min(8 * n_sms, _ceil(nbytes, COPY_THREADS * 64)))
    return KernelLaunch("copy.cu", "copy_batch", (), _x(blocks), _x(COPY_THREADS))


def digest_launch(n_terms: int, n_sms: int) -> KernelLaunch:
    """The digest over a table of terms; args: DIGEST_ARGS_FORMAT; sums must be zero before."""
    return KernelLaunch(
        "digest.cu", "digest_terms", (), (max(1, min(2 * n_sms, 256)), n_terms, 1), _x(256)
    )
