"""How much work a launch of a kernel is: blocks, turns of its loop, tensor instructions, bytes.

IS: what geometry and constants of a `KernelLaunch` say, and for the kernels whose loops run over
tokens, keys or K what those loops come to. IS NOT: a list of all kernels: one that is not named
here runs once through its code, and moves the bytes of its op once; what the op multiplies, and
what it reads of weight matrices, goes to the tensor cores. So a new kernel has a cost, if a rough
one, without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from flashrt.backends.cuda import layouts
from flashrt.backends.cuda.kernels import ATTENTION_KEYS, K_SLICE, WARP, KernelLaunch
from flashrt.core.op import Launch
from flashrt.core.region import ActDTypes, DType, Layout, Role
from flashrt.ops.experts import EXPERTS_IN
from flashrt.ops.params import CURSOR
from flashrt.ops.work import experts_hit, operand_bytes, work_of

MMA_FLOP: Final = 2 * 16 * 8 * 16  # of mma.m16n8k16
_K_CHUNK: Final = 32
_MERGED_BLOCKS: Final = 32  # of keys, a turn of `attention_merge`


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of an op's operands, each once, by whether a cache may still have them."""

    lasting: int  # weights, state, rows of keys and values: used once per replay
    passing: int  # scratch, what goes between host and replay, the cursor
    by_name: Mapping[str, int]
    widest_passing: int  # bytes of the largest one


def moved_by(launch: Launch, acts: ActDTypes, position: int) -> Moved:
    """Of a launch whose rows are all valid and begin at a position."""
    by_name: dict[str, int] = {}
    lasting = passing = widest = 0
    for param, view, nbytes in operand_bytes(launch, acts, position):
        by_name[param.name] = nbytes
        is_cached = param.name == CURSOR.name  # every launch reads it
        if is_cached or view.region.role in (Role.SCRATCH, Role.IO):
            passing += nbytes
            widest = max(widest, nbytes)
        else:
            lasting += nbytes
    return Moved(lasting, passing, by_name, widest)


@dataclass(frozen=True, slots=True)
class Effort:
    """Of one launch of a kernel. Blocks of the grid beyond `blocks` find nothing to do."""

    blocks: int
    turns: float = 1.0  # of a warp: see `code.Code`
    tensor: float = 0.0  # mma.m16n8k16 of all warps
    loaded: int = 0  # bytes that blocks read and write, each by itself: mostly from the L2 cache
    passes: int = 1  # of the grid over the lasting bytes, one after another
    reread: int = 0  # bytes of the passing operand that rounds of blocks read again and again
    rereads: int = 0  # how often, after the first time
    is_reader: bool | None = None  # of the lasting bytes; None: where it is the op's first kernel


@dataclass(frozen=True, slots=True)
class Task:
    """A kernel launch, the op that it comes from, and the rows that it is for."""

    kernel: KernelLaunch
    launch: Launch
    acts: ActDTypes
    rows: int
    position: int
    moved: Moved
    is_first: bool  # of the op's kernels

    def define(self, name: str) -> int:
        """A constant of the kernel."""
        return int(dict(self.kernel.defines)[name])

    @property
    def warps(self) -> int:
        """Of a block."""
        x, y, z = self.kernel.block
        return -(-x * y * z // WARP)

    @property
    def grid(self) -> int:
        """All blocks."""
        x, y, z = self.kernel.grid
        return x * y * z

    @property
    def key_blocks(self) -> int:
        """Blocks of keys that some row sees."""
        return _ceil(self.position + self.rows, ATTENTION_KEYS)


def effort_of(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    """`at_once`: blocks of a kernel that the device holds at once."""
    known = _KERNELS.get(task.kernel.kernel)
    return _otherwise(task) if known is None else known(task, at_once)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _otherwise(task: Task) -> Effort:
    """See the module. Later kernels of an op find what lasts in registers or caches."""
    moved = task.moved
    if not task.is_first:
        return Effort(task.grid, loaded=moved.passing)
    flop = max(work_of(task.launch, task.acts, task.position).flop, _flop_of_weights(task))
    parts = int(dict(task.kernel.defines).get("ACT_PARTS", 1))
    return Effort(task.grid, tensor=flop * parts / MMA_FLOP, loaded=moved.passing + moved.lasting)


def _flop_of_weights(task: Task) -> float:
    """Of products with all that is read of weight matrices, in columns of 8 tokens."""
    launch, flop = task.launch, 0.0
    for param, view in zip(launch.op.params, launch.operands, strict=True):
        region = view.region
        if region.role is Role.WEIGHT and region.layout is Layout.MATRIX:
            bits = layouts.storage(region, task.acts).nbytes * 8 / region.size
            flop += 2 * 8 * _ceil(task.rows, 8) * task.moved.by_name[param.name] * 8 / bits
    return flop


# -- products with weights ------------------------------------------------------------------------


def _linear(task: Task, tile_rows: int, tile_tokens: int, warps_k: int, held: int) -> Effort:
    """`warps_k`: warps that divide a block's K; `held`: blocks that the device holds at once.

    Blocks beyond tiles of rows and tokens divide K too, in whatever dimension of the grid they are.
    """
    dims, moved = task.launch.dims, task.moved
    row_tiles = _ceil(dims["N"], tile_rows)
    splits = max(1, task.grid // (row_tiles * _ceil(dims["T"], tile_tokens)))
    token_tiles = _ceil(task.rows, tile_tokens)
    blocks = row_tiles * token_tiles * splits
    k = _ceil(dims["K"], _K_CHUNK) * _K_CHUNK
    products = row_tiles * tile_rows * token_tiles * tile_tokens * k * 2
    weights, x = moved.by_name["w"], moved.by_name["x"]
    loaded = weights * token_tiles + x * row_tiles + moved.by_name["y"]
    is_by_tokens = task.kernel.kernel == "linear_many"  # blocks next to each other share rows of W
    rounds = _ceil(blocks, max(held, (token_tiles if is_by_tokens else row_tiles) * splits))
    return Effort(
        blocks,
        turns=_ceil(dims["K"], K_SLICE * splits * warps_k),
        tensor=products * _parts(task) / MMA_FLOP,
        loaded=loaded,
        passes=1 if is_by_tokens else min(rounds, token_tiles),
        reread=x if is_by_tokens else 0,
        rereads=min(rounds, row_tiles) - 1,
    )


def _parts(task: Task) -> int:
    """Tensor instructions of a product: parts of x, by parts of a float32 weight."""
    is_f32 = task.launch.operand("w").region.dtype is DType.F32
    return task.define("ACT_PARTS") * (3 if is_f32 else 1)


def _linear_few(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    tokens = 8 * task.define("TOKEN_TILES")
    return _linear(task, 16, tokens, task.define("WARPS"), at_once(task.kernel))


def _linear_many(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    rows = 16 * task.define("WARPS_N") * task.define("ROW_TILES")
    tokens = 8 * task.define("WARPS_T") * task.define("TOKEN_TILES")
    return _linear(task, rows, tokens, 1, at_once(task.kernel))


# -- experts ---------------------------------------------------------------------------------------


def _experts(task: Task, tile_rows: int, tile_tokens: int, warps_k: int) -> Effort:
    """Picks are assumed to be spread evenly, see `ops.work.experts_hit`: so each expert that is hit
    at all has the same number of rows.
    """
    dims, by_name = task.launch.dims, task.moved.by_name
    is_in = task.launch.op is EXPERTS_IN
    n, k = (2 * dims["I"], dims["H"]) if is_in else (dims["H"], dims["I"])
    hit = experts_hit(task.rows, dims["P"], dims["E"])
    token_tiles = _ceil(round(task.rows * dims["P"] / hit), tile_tokens)
    row_tiles = _ceil(n, tile_rows)
    blocks = round(hit * token_tiles * row_tiles)
    of_block = tile_rows * tile_tokens * _ceil(k, _K_CHUNK) * _K_CHUNK * 2
    picked_x = by_name["x"] * dims["P"] if is_in else by_name["h"]
    written = by_name["h"] if is_in else by_name["products"] // 2
    return Effort(
        blocks,
        turns=_ceil(k, K_SLICE * warps_k),
        tensor=blocks * of_block * _parts(task) / MMA_FLOP,
        loaded=by_name["w"] * token_tiles + picked_x * row_tiles + written,
        is_reader=True,
    )


def _experts_few(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    halves = 2 if task.launch.op is EXPERTS_IN else 1
    return _experts(task, 16 * halves, 8 * task.define("TOKEN_TILES"), task.define("WARPS"))


def _experts_many(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    rows = 16 * task.define("WARPS_N") * task.define("ROW_TILES")
    return _experts(task, rows, 8 * task.define("WARPS_T") * task.define("TOKEN_TILES"), 1)


def _experts_group(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    """Picks are read twice, and written with their tiles."""
    del at_once
    picks = task.rows * task.launch.dims["P"]
    turns = 3 * _ceil(picks, task.kernel.block[0])
    return Effort(1, turns=turns, loaded=4 * 4 * picks, is_reader=False)


def _experts_sum(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    by_name = task.moved.by_name
    loaded = by_name["products"] // 2 + by_name["y"]
    return Effort(task.grid, turns=task.launch.dims["P"], loaded=loaded, is_reader=False)


# -- attention ------------------------------------------------------------------------------------


def _attention_tensor(task: Task, key_blocks: int) -> float:
    """Of q k and of p v, for blocks of keys by all columns of a block."""
    tiles = ATTENTION_KEYS // 16 * _ceil(task.launch.dims["D"], 16) * task.define("COLUMN_TILES")
    return 2.0 * key_blocks * tiles * task.define("ACT_PARTS")


def _key_block_bytes(task: Task) -> int:
    """Keys and values of one block of keys and one head, with their scales."""
    names = ("keys", "values", "key_scales", "value_scales")
    seen = (task.position + task.rows) * task.launch.dims["Nk"]
    return sum(task.moved.by_name[n] for n in names) * ATTENTION_KEYS // seen


def _attention_partial(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    blocks = min(task.kernel.grid[0], task.key_blocks) * task.kernel.grid[1]
    loaded = blocks * _key_block_bytes(task) + task.moved.passing // 2
    return Effort(blocks, tensor=_attention_tensor(task, blocks), loaded=loaded)


def _attention_rows(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    """Each block walks over the keys that its last row sees."""
    del at_once
    dims = task.launch.dims
    block_rows = 8 * task.define("COLUMN_TILES") // task.define("GROUP")
    groups = _ceil(task.rows, block_rows)
    last_rows = (min((i + 1) * block_rows, task.rows) for i in range(groups))
    walked = dims["Nk"] * sum(_ceil(task.position + row, ATTENTION_KEYS) for row in last_rows)
    blocks = groups * dims["Nk"]
    return Effort(
        blocks,
        turns=walked / blocks,
        tensor=_attention_tensor(task, walked),
        loaded=walked * _key_block_bytes(task) + task.moved.passing,
    )


def _attention_merge(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    turns = _ceil(task.key_blocks, _MERGED_BLOCKS)
    return Effort(task.grid, turns=turns, loaded=task.moved.passing // 2)


# -- kernels that run over tokens -----------------------------------------------------------------


def _over_rows(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    """A block takes all rows, or so many of them; its work is on the ordinary pipes."""
    del at_once
    rows = min(task.rows, int(dict(task.kernel.defines).get("ROWS_PER_BLOCK", task.rows)))
    return Effort(task.grid, turns=rows, loaded=task.moved.lasting + task.moved.passing)


def _sample(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    del at_once
    at_a_time = 4 if task.kernel.kernel == "sample_pick" else 1  # tokens of a thread
    turns = _ceil(task.launch.dims["V"], task.grid * task.kernel.block[0] * at_a_time)
    loaded = task.moved.by_name["logits"] + task.moved.by_name["work"] // 2
    return Effort(task.grid, turns=turns, loaded=loaded)


def _idle(task: Task, at_once: Callable[[KernelLaunch], int]) -> Effort:
    """Launched, and greedy sampling leaves it nothing to do."""
    del task, at_once
    return Effort(0)


_KERNELS: Final[Mapping[str, Callable[[Task, Callable[[KernelLaunch], int]], Effort]]] = {
    "linear_few": _linear_few,
    "linear_many": _linear_many,
    "experts_in_few": _experts_few,
    "experts_out_few": _experts_few,
    "experts_out_one": _experts_few,
    "experts_in_many": _experts_many,
    "experts_out_many": _experts_many,
    "experts_in_group": _experts_group,
    "experts_out_group": _experts_group,
    "experts_sum": _experts_sum,
    "attention_partial": _attention_partial,
    "attention_rows": _attention_rows,
    "attention_merge": _attention_merge,
    "delta_rule": _over_rows,
    "delta_verify": _over_rows,
    "conv_window": _over_rows,
    "conv_verify": _over_rows,
    "gated_conv": _over_rows,
    "conv_biased": _over_rows,
    "ssm": _over_rows,
    "sample_scan": _sample,
    "sample_narrow": _idle,
    "sample_pick": _sample,
}
