"""Kernels: how each op expands into CUDA launches: source, kernel, constants and geometry.

IS: the one declarative table between the table of ops and cuda_src; pure functions of dims and
dtypes. IS NOT: code, compiling or launching.

Every kernel of an expansion takes the op's argument block by value. Which variant is chosen (few or
many tokens, tile sizes) may depend on the rows of the tape and on the device: all variants of an op
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from flashrt.base.errors import PlanError
from flashrt.core.groups import Groups, Scales
from flashrt.core.op import Launch
from flashrt.core.region import DType, resolve_dtype

Defines = tuple[tuple[str, str], ...]
Grid = tuple[int, int, int]

WARP: Final = 32
ATTENTION_KEYS: Final = 256  # keys per block of the canonical order
K_SLICE: Final = 256  # k per chain of mma in the canonical order of `linear`
FEW_TOKENS: Final = 32  # up to here a launch of `linear` is bound by its weights
MANY_STAGES: Final = 4  # tiles of 32 k in flight in `linear_many`, at most
MANY_SHARED_BYTES: Final = 99 << 10  # for them: of sm_86, sm_89 and sm_120, the least of all
SAMPLE_CHUNK: Final = 2048  # tokens of a block of `sample_narrow`
SAMPLE_SHARED_FROM: Final = 16384  # from so many tokens on its blocks share the work
SAMPLE_PASSES: Final = 5  # launches of it then: three digits for top_k, two more for top_p
CONV_ROWS: Final = 16  # rows per block of `conv_window`
COPY_THREADS: Final = 256
COPY_ARGS_FORMAT: Final = "@Pi0P"  # copy_batch_args: table, n
DIGEST_ARGS_FORMAT: Final = (
    "@PPi0P"  # digest_terms_args: terms, sums [n][2] (zeroed by the caller), n
)


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One CUDA launch: what to compile (source, defines) and how to start it."""

    source: str  # file name in cuda_src
    kernel: str
    defines: Defines
    grid: Grid
    block: Grid
    shared_bytes: int = 0  # dynamic

    def of_runs(self, n: int) -> KernelLaunch:
        """The launch for `n` runs: run r is the blocks with blockIdx.z = r (OPEN_RUN).

        Raises PlanError where the grid uses its third dimension already.
        """
        if self.grid[2] != 1:
            raise PlanError(f"{self.kernel}: grid {self.grid} leaves no dimension for runs")
        return replace(self, grid=(*self.grid[:2], n))


@dataclass(frozen=True, slots=True)
class Shape:
    """What an expansion may look at: sizes, attributes, dtypes of params, the device's size, and
    the groups of params that are quantised.
    """

    op: str
    dims: Mapping[str, int]
    dtypes: Mapping[str, DType]
    attrs: Mapping[str, int | float]
    act: DType
    n_sms: int
    groups: Mapping[str, Groups] = field(default_factory=dict)

    @property
    def act_parts(self) -> int:
        """bfloat16 parts that an activation goes into the tensor cores as: 1, 2 or 3."""
        return _ACT_PARTS[self.act]


_ACT_PARTS = {DType.BF16: 1, DType.BF16X2: 2, DType.F32: 3}


Expansion = Callable[[Shape], tuple[KernelLaunch, ...]]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _x(threads: int) -> Grid:
    return (threads, 1, 1)


def _defines(**values: int) -> Defines:
    return tuple((name, str(value)) for name, value in values.items())


def _weights(s: Shape, name: str) -> Defines:
    """The format of a weight matrix; none for bfloat16, which sources take for granted."""
    dtype = s.dtypes.get(name, DType.BF16)
    if dtype is DType.BF16:
        return ()
    groups = s.groups.get(name)
    if groups is None:
        return _defines(W_DTYPE=dtype.code, W_GROUP=0, W_OUTER=0, W_SCALES=-1)
    return _defines(
        W_DTYPE=dtype.code, W_GROUP=groups.size, W_OUTER=groups.outer, W_SCALES=groups.scales.code
    )


def _embed(s: Shape) -> tuple[KernelLaunch, ...]:
    return (KernelLaunch("embed.cu", "embed", _weights(s, "table"), _x(s.dims["T"]), _x(256)),)


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
    is_few = s.dims["T"] <= FEW_TOKENS
    return (_linear_few(s) if is_few else _linear_many(s),)


def _linear_few(s: Shape) -> KernelLaunch:
    t, n, k = s.dims["T"], s.dims["N"], s.dims["K"]
    tiles = 1 if t <= 8 else 2 if t <= 16 else 4
    slices, row_tiles = _ceil(k, K_SLICE), _ceil(n, 16)
    # 16 warps per multiprocessor keep enough weights in flight: several small blocks if there are
    # row tiles for them, larger ones if not; registers allow 8 warps of 4 tiles, or 2 with scales
    is_wide = tiles == 4 or (tiles == 2 and _is_folded(s, "w"))
    most = min(8 if is_wide else 16, 1 << (slices - 1).bit_length())
    warps = min(4, most)
    while warps < most and warps * row_tiles < 16 * s.n_sms:
        warps *= 2
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(k % 8 == 0), WARPS=warps, TOKEN_TILES=tiles
    )
    grid = (_ceil(n, 16), _ceil(t, 8 * tiles), 1)
    defines += _weights(s, "w")
    return KernelLaunch("linear_few.cu", "linear_few", defines, grid, _x(WARP * warps))


@dataclass(frozen=True, slots=True)
class ManyTile:
    """A block of `linear_many`: warps along rows of W and along tokens, mma tiles per warp."""

    warps_n: int
    warps_t: int
    row_tiles: int
    token_tiles: int
    efficiency: float  # of a multiprocessor full of such blocks, against the largest: an estimate

    @property
    def rows(self) -> int:
        """Rows of W per block."""
        return 16 * self.warps_n * self.row_tiles

    @property
    def tokens(self) -> int:
        """Tokens per block."""
        return 8 * self.warps_t * self.token_tiles

    def cost(self, n: int, t: int, n_sms: int) -> float:
        """Time in arbitrary units: work of the multiprocessor with most blocks."""
        blocks = _ceil(n, self.rows) * _ceil(t, self.tokens)
        return _ceil(blocks, n_sms) * self.rows * self.tokens / self.efficiency


MANY_TILES: Final = (
    ManyTile(2, 4, 4, 4, 1.0),
    ManyTile(2, 2, 4, 4, 0.95),
    ManyTile(2, 2, 2, 4, 0.75),
)
# Where scales are folded in: chains and scales take the registers of a row tile.
FOLDED_TILES: Final = (
    ManyTile(2, 4, 3, 4, 0.95),
    ManyTile(2, 2, 3, 4, 0.9),
    ManyTile(2, 2, 2, 4, 0.75),
)


def _is_folded(s: Shape, name: str) -> bool:
    """Whether scales are applied to sums; those of float8 on 4-bit floats go into the codes."""
    groups = s.groups.get(name)
    is_float8 = groups is not None and groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER)
    return groups is not None and not (is_float8 and s.dtypes[name] is DType.E2M1)


def _linear_many(s: Shape) -> KernelLaunch:
    t, n, k = s.dims["T"], s.dims["N"], s.dims["K"]
    tiles = FOLDED_TILES if _is_folded(s, "w") else MANY_TILES
    tile = min(tiles, key=lambda tile: tile.cost(n, t, s.n_sms))
    stage = tile.rows // 16 * _tile_bytes(s, "w") + tile.tokens * 64 * min(s.act_parts, 2)
    stages = min(MANY_STAGES, MANY_SHARED_BYTES // stage)
    defines = _defines(
        ACT_PARTS=s.act_parts, ALIGNED=int(k % 8 == 0), WARPS_N=tile.warps_n, WARPS_T=tile.warps_t,
        ROW_TILES=tile.row_tiles, TOKEN_TILES=tile.token_tiles, STAGES=stages,
    )  # fmt: skip
    grid = (_ceil(n, tile.rows), _ceil(t, tile.tokens), 1)
    block = _x(WARP * tile.warps_n * tile.warps_t)
    defines += _weights(s, "w")
    return KernelLaunch("linear_many.cu", "linear_many", defines, grid, block, stages * stage)


def _tile_bytes(s: Shape, name: str) -> int:
    """Bytes of 16 rows of a weight matrix by 32 k, with the scales that they need."""
    groups = s.groups.get(name)
    planes = groups.planes if groups is not None else ()
    scales = (max(1, 32 // p.size) * p.dtype.itemsize for p in planes if p.size)
    return 64 * s.dtypes.get(name, DType.BF16).bits + 16 * sum(scales)


def _conv_window(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["C"], 128), _ceil(s.dims["T"], CONV_ROWS), 1)
    defines = _defines(TAPS=s.dims["W1"], ROWS_PER_BLOCK=CONV_ROWS)
    return (KernelLaunch("conv.cu", s.op, defines, grid, _x(128)),)


def _delta_gates(s: Shape) -> tuple[KernelLaunch, ...]:
    units = 2 * int(s.attrs["key_heads"]) + _ceil(s.dims["Hv"], WARP)  # one warp each
    defines = _defines(KEY_DIM=int(s.attrs["key_dim"]))
    grid = (_ceil(units, 4), s.dims["T"], 1)
    return (KernelLaunch("delta_gates.cu", "delta_gates", defines, grid, _x(128)),)


def _delta_rule(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(KEY_DIM=s.dims["dk"], VALUE_DIM=s.dims["dv"])
    grid = (_ceil(s.dims["dv"], 16), s.dims["Hv"], 1)
    return (KernelLaunch("delta_rule.cu", s.op, defines, grid, _x(128)),)


def _gated_rmsnorm(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(ACT_PARTS=s.act_parts, VALUE_DIM=s.dims["dv"])
    grid = (_ceil(s.dims["C"] // s.dims["dv"], 4), s.dims["T"], 1)
    return (KernelLaunch("gated_norm.cu", "gated_rmsnorm", defines, grid, _x(128)),)


_CACHE_CODES: Final = {DType.I8: 1, DType.E4M3: 2}  # codes of keys and values: see codes.cuh


def _rope_append(s: Shape) -> tuple[KernelLaunch, ...]:
    defines = _defines(
        HEAD_DIM=s.dims["D"], CACHE_F32=int(s.dtypes["keys"] is DType.F32),
        CACHE_CODES=_CACHE_CODES.get(s.dtypes["keys"], 0),
        GATED=int(s.attrs["gated"]), NORMED=int(s.attrs["normed"]),
    )  # fmt: skip
    grid = (_ceil(s.dims["Nq"] + 2 * s.dims["Nk"], 4), s.dims["T"], 1)
    return (KernelLaunch("rope.cu", "rope_append", defines, grid, _x(128)),)


# Tiles of columns for many rows over caches of codes: with others, some architecture spills a few
# bytes.
_CODE_TILES: Mapping[DType, int] = {DType.I8: 6, DType.E4M3: 8}


def _attention(s: Shape) -> tuple[KernelLaunch, ...]:
    t, d, nq, nk = s.dims["T"], s.dims["D"], s.dims["Nq"], s.dims["Nk"]
    group, is_f32 = nq // nk, s.dtypes["keys"] is DType.F32
    if d % 8 or d > 256 or group > 32:
        raise PlanError(
            f"attention: head size {d} must be a multiple of 8 up to 256, and {group} query heads "
            "per key head at most 32"
        )
    is_few = s.dims["TP"] >= t  # blocks of keys side by side, then a merge
    if is_few:
        # with 4, pairs of parts and codes spill a few bytes; a tile must hold a whole group
        is_narrow = group <= 24 and (s.act_parts == 2 or s.dtypes["keys"] in _CODE_TILES)
        tiles = min(3 if is_narrow else 4, _ceil(t * group, 8))
    else:
        is_small = _ceil(t, 64 // group) * nk < s.n_sms
        tiles = 4 if s.act_parts > 1 or is_f32 or is_small else 8
        if s.dtypes["keys"] in _CODE_TILES and s.act_parts == 1:
            tiles = _CODE_TILES[s.dtypes["keys"]]
    defines = _defines(
        ACT_PARTS=s.act_parts, CACHE_F32=int(is_f32),
        CACHE_CODES=_CACHE_CODES.get(s.dtypes["keys"], 0), HEAD_DIM=d, GROUP=group,
        COLUMN_TILES=tiles, SHIFT=int(s.attrs["shift"]), GATED=int(s.attrs["gated"]),
    )  # fmt: skip
    # per column: q and p; five running values; and of each of 8 warps a maximum and a sum
    column_bytes = 2 * (_ceil(d, 64) * 64 + ATTENTION_KEYS) * s.act_parts + 4 * (5 + 8 * 2)
    shared = 8 * tiles * column_bytes
    n_groups = _ceil(t, 8 * tiles // group)
    if is_few:
        few, grid = "attention_few.cu", (s.dims["B"], nk * n_groups, 1)
        merge = KernelLaunch(few, "attention_merge", defines, (nq, t, 1), _x(_ceil(d, WARP) * WARP))
        return KernelLaunch(few, "attention_partial", defines, grid, _x(256), shared), merge
    many, grid = "attention_many.cu", (n_groups, nk, 1)
    return (KernelLaunch(many, "attention_rows", defines, grid, _x(256), shared),)


def _silu_mul(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["I"], 1024), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", "silu_mul", _act(s), grid, _x(256)),)


def _add_bias(s: Shape) -> tuple[KernelLaunch, ...]:
    grid = (_ceil(s.dims["N"], 256), s.dims["T"], 1)
    return (KernelLaunch("elementwise.cu", "add_bias", _act(s), grid, _x(256)),)


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
}


def expand(
    launch: Launch, act: DType, n_sms: int, expansions: Mapping[str, Expansion] = EXPANSIONS
) -> tuple[KernelLaunch, ...]:
    """The CUDA launches of one tape launch, in order. Raises PlanError for an unknown op."""
    op = launch.op
    if op.name not in expansions:
        raise PlanError(f"op {op.name!r} has no CUDA expansion; known are {sorted(expansions)}")
    dtypes = {
        p.name: resolve_dtype(v.region.dtype, act)
        for p, v in zip(op.params, launch.operands, strict=True)
    }
    attrs = {a.name: v for a, v in zip(op.attrs, launch.attrs, strict=True)}
    own = [dtypes[p.name] for p in op.params if p.dtypes == (DType.ACT,)]  # ACT, or ACT_WIDE
    act = own[0] if own else act
    groups = {
        p.name: v.region.groups
        for p, v in zip(op.params, launch.operands, strict=True)
        if v.region.groups is not None
    }
    return expansions[op.name](Shape(op.name, launch.dims, dtypes, attrs, act, n_sms, groups))


def copy_launch(nbytes: int, n_sms: int) -> KernelLaunch:
    """The batched copy over a table of descriptors; `nbytes` in all; args: COPY_ARGS_FORMAT."""
    blocks = max(1, min(8 * n_sms, _ceil(nbytes, COPY_THREADS * 64)))
    return KernelLaunch("copy.cu", "copy_batch", (), _x(blocks), _x(COPY_THREADS))


def digest_launch(n_terms: int, n_sms: int) -> KernelLaunch:
    """The digest over a table of terms; args: DIGEST_ARGS_FORMAT; sums must be zero before."""
    return KernelLaunch(
        "digest.cu", "digest_terms", (), (max(1, min(2 * n_sms, 256)), n_terms, 1), _x(256)
    )
