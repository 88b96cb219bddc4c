"""Occupancy, and the tiles of `linear` that follow from it: stages, blocks at once, filled devices.

And the columns of `attention`: what is read of the cache.

IS: numbers against those of NVIDIA's tables and against a count of the grid. IS NOT: compiled
kernels: that launch bounds hold, see test_sass.
"""

from __future__ import annotations

import heapq
from pathlib import Path

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import KernelLaunch, ManyTile, Shape, Split
from flashrt.backends.cuda.occupancy import (
    LEAST,
    MULTIPROCESSORS,
    blocks_at_once,
    multiprocessor,
    registers_for,
)
from flashrt.core.region import DType
from tests.unit.test_cuda_compile import ARCHS

# (architecture, threads, registers, shared bytes) -> blocks, worked out by hand
KNOWN = {
    ("sm_80", 128, 208, 64 << 10): 2,  # 164 KB hold two of 65; so do registers
    ("sm_86", 128, 208, 64 << 10): 1,  # 100 KB
    ("sm_86", 128, 208, 48 << 10): 2,  # 2 x 49 KB
    ("sm_90", 128, 208, 64 << 10): 2,  # 228 KB hold three, 8 warps of 6,656 registers
    ("sm_90", 128, 168, 64 << 10): 3,
    ("sm_90", 256, 255, 96 << 10): 1,
    ("sm_120", 1024, 32, 0): 1,  # 48 warps
    ("sm_90", 1024, 32, 0): 2,
    ("sm_86", 32, 16, 0): 16,  # the most blocks
    ("sm_120", 128, 64, 100 << 10): 0,  # a block's own kilobyte is too much
}


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_blocks_at_once(case: tuple[str, int, int, int]) -> None:
    """Red: registers that are not rounded to what a warp is given; no kilobyte per block."""
    arch, threads, registers, shared = case
    assert blocks_at_once(multiprocessor(arch), threads, registers, shared) == KNOWN[case]


def test_launch_bounds_leave_room_for_the_blocks_they_ask_for() -> None:
    """Red: a rounding that lets one register too many through."""
    for threads in (32, 64, 128, 256, 512):
        for blocks in (1, 2, 3, 4, 8):
            registers = registers_for(threads, blocks)
            if threads * blocks <= 1024:
                assert blocks_at_once(multiprocessor("sm_90"), threads, registers, 0) >= blocks
            if registers < 255:
                assert blocks_at_once(multiprocessor("sm_90"), threads, registers + 8, 0) < blocks


def test_every_architecture_is_listed_and_another_gets_the_least() -> None:
    assert {f"sm_{n}" for n in MULTIPROCESSORS} == set(ARCHS)
    assert multiprocessor("sm_999") == LEAST
    assert LEAST.shared_bytes == 100 << 10


# ---- tiles of linear

K = 5120
SIZES = {"sm_90": 132, "sm_120": 170}
BUCKETS = (64, 128, 256, 512, 1024, 2048)


def shape(n: int, t: int, arch: str, act: DType = DType.BF16X2, k: int = K) -> Shape:
    dims = {"T": t, "N": n, "K": k}
    return Shape("linear", dims, {}, {}, act, SIZES.get(arch, 108), sm=multiprocessor(arch))


def launch_of(s: Shape) -> KernelLaunch:
    (launch,) = kernels.EXPANSIONS[s.op](s)
    return launch


def filled(launch: KernelLaunch, n_sms: int) -> float:
    """Share of the multiprocessors' time that is work, until the last block is done: each block
    goes to whichever is free first. Parts of K last as long as they are.
    """
    split = launch.split or Split(1, 1, 0, launch.grid[0] * launch.grid[1], 0)
    share = split.supers * kernels.SUPER_SLICE / K if split.parts > 1 else 1.0
    loads = [share] * split.tiles * (split.parts - 1)
    loads += [1.0 - share * (split.parts - 1)] * split.tiles
    ends = [0.0] * n_sms
    for load in loads:
        heapq.heapreplace(ends, ends[0] + load)
    return sum(loads) / n_sms / max(ends)


def gain(s: Shape) -> float:
    """How much faster than without divisions of K, by the estimate that chooses."""
    tile, parts = kernels.many_choice(s)
    undivided = [kernels.few_cost(s), *(tile.cost(s) for tile in kernels.many_tiles(s))]
    return min(undivided) / min(kernels.few_cost(s), tile.cost(s, parts))


def cell(s: Shape) -> str:
    """Of the table in docs/cuda.md: busy share, into how many parts K goes, gain."""
    launch = launch_of(s)
    share = f"{filled(launch, s.n_sms):.2f}"
    if launch.split is None:
        return f"{share}, few"
    parts = launch.split.parts
    return f"{share}, {parts} parts, {gain(s):.2f} x" if parts > 1 else f"{share}, 1 part"


def test_buckets_fill_the_device() -> None:
    """Red: a cost that counts no idle multiprocessors, no small tiles for small launches, or no
    divisions of K; a table of the docs that is not what the code chooses.
    """
    places = [(n, arch) for arch in SIZES for n in (1024, 5120)]
    rows = [(t, [cell(shape(n, t, arch)) for n, arch in places]) for t in BUCKETS]
    head = ["rows", *(f"N = {n} on {SIZES[arch]}" for n, arch in places)]
    lines = [f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
    lines += [f"| {' | '.join([str(t), *cells])} |" for t, cells in rows]
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    assert "\n".join(lines) in text, "\n".join(lines)


@pytest.mark.parametrize("arch", SIZES)
def test_large_buckets_are_full(arch: str) -> None:
    """Red: a division that leaves more of the device idle than it fills, or is chosen at a loss."""
    for n in (1024, 5120):
        for t in BUCKETS:
            s = shape(n, t, arch)
            assert gain(s) >= 1
            if t >= 512:
                assert filled(launch_of(s), s.n_sms) >= 0.9


def test_the_most_loaded_multiprocessor() -> None:
    """By hand: red where short parts of K count as whole ones, or are put where there is no gap."""
    assert kernels.most_loaded(4, 5, 1, 1.0) == (2, 2.0)
    assert kernels.most_loaded(4, 2, 3, 0.4) == (2, pytest.approx(0.6))  # 4 long, then 2 short
    assert kernels.most_loaded(4, 3, 3, 0.4) == (2, pytest.approx(0.8))  # 6 long, short in gaps
    assert kernels.most_loaded(4, 4, 2, 0.5) == (2, 1.0)


def test_divisions_are_of_whole_super_slices_and_fit_the_workspace() -> None:
    """Red: parts without work, and planes beyond the workspace."""
    tile = kernels.many_tiles(shape(5120, 64, "sm_90"))[-1]
    for k, wanted in ((2048, [1]), (5120, [1, 2, 3]), (6144, [1, 2, 3]), (17408, [1, 2, 3, 5, 9])):
        s = shape(1024, 64, "sm_90", k=k)
        assert tile.parts(s) == wanted
        for parts in wanted:
            split = tile.split(s, parts)
            n_supers = -(-k // kernels.SUPER_SLICE)
            assert (parts - 1) * split.supers < n_supers <= parts * split.supers
            assert split.planes in (0, 1 + (parts - 1) * split.supers)
    assert tile.parts(shape(17408, 2048, "sm_90")) == [1]  # 140 MB a plane


def test_stages_make_room_for_a_second_block() -> None:
    """Red: four stages everywhere: 65 KB leave room for one block of 4 warps in 100 KB."""
    tile = ManyTile(2, 2, 4, 4, 2, 0.95)
    found = {}
    for arch in ARCHS:
        s = shape(17408, 512, arch)
        assert tile in kernels.many_tiles(s)
        found[arch] = (tile.stages(s), tile.at_once(s))
    small = {"sm_86", "sm_89", "sm_120", "sm_121"}
    assert found == {arch: ((3, 2) if arch in small else (4, 2)) for arch in ARCHS}
    one_part = shape(17408, 512, "sm_86", DType.BF16)
    assert (tile.stages(one_part), tile.at_once(one_part)) == (4, 2)  # 48 KB as they are


def test_shared_memory_stays_within_every_architecture() -> None:
    for arch in ARCHS:
        for act in (DType.BF16, DType.BF16X2, DType.F32):
            s = shape(4096, 512, arch, act)
            for tile in kernels.many_tiles(s):
                launch = kernels.linear_many(s, tile)
                assert tile.at_once(s) > 0
                assert launch.shared_bytes + 1024 <= 100 << 10


def test_blocks_of_the_same_rows_of_w_are_next_to_each_other() -> None:
    """Red when a launch of many tokens reads a matrix once per block of them."""
    launch = launch_of(shape(34816, 2048, "sm_120"))
    defines = {name: int(value) for name, value in launch.defines if value.isdigit()}
    assert launch.kernel == "linear_many"
    assert launch.grid[0] * 8 * defines["WARPS_T"] * defines["TOKEN_TILES"] == 2048


# ---- columns of attention

BF16, PAIRS = DType.BF16, DType.BF16X2


def attention(
    rows: int, arch: str, act: DType = BF16, cache: DType = BF16, d: int = 256, group: int = 6
) -> Shape:
    """That of 27B, if nothing else is asked for."""
    dims = {"T": rows, "TP": 1, "D": d, "Nq": 4 * group, "Nk": 4, "S": 16384, "B": 64}
    dtypes = {"keys": cache, "values": cache}
    attrs = {"shift": 0, "gated": 1}
    n_sms = SIZES.get(arch, 108)
    return Shape("attention", dims, dtypes, attrs, act, n_sms, sm=multiprocessor(arch))


def cache_bytes(launch: KernelLaunch, s: Shape, positions: int) -> int:
    """Bytes of keys and values that a layer's launches read for a prompt of so many positions: a
    block reads those that its last row sees, once.
    """
    rows = 8 * int(dict(launch.defines)["COLUMN_TILES"]) // (s.dims["Nq"] // s.dims["Nk"])
    seen = 0
    for position in range(0, positions, s.dims["T"]):
        for first in range(0, s.dims["T"], rows):
            seen += position + min(first + rows, s.dims["T"])
    return seen * s.dims["Nk"] * 2 * s.dims["D"] * 2


# Rows of a replay -> columns of a block; reads of keys and values per head and replay; GB that a
# layer reads for prompts of 2,048 and of 16,384. Before there was a choice beyond 64 columns: 52
# reads of 256 rows (1.75 and 111.7 GB) and of 512 (0.88 and 55.9 GB), 205 of 2,048.
READS = {
    "sm_90": {
        256: (48, 32, 1.08, 68.75),
        512: (96, 32, 0.54, 34.39),
        2048: (96, 128, 0.54, 34.39),
    },
    "sm_120": {
        256: (48, 32, 1.08, 68.75),
        512: (48, 64, 1.08, 68.75),
        2048: (64, 205, 0.86, 55.07),
    },
}


@pytest.mark.parametrize("arch", READS)
def test_keys_and_values_are_read_as_seldom_as_the_device_allows(arch: str) -> None:
    """Red: 64 columns at most, as many as registers hold without a pipeline; the most columns where
    they leave multiprocessors idle (256 rows; 512 on 170 of them).
    """
    found = {}
    for rows in READS[arch]:
        s = attention(rows, arch)
        launch = launch_of(s)
        columns = 8 * int(dict(launch.defines)["COLUMN_TILES"])
        gb = [round(cache_bytes(launch, s, n) / 1e9, 2) for n in (2048, 16384)]
        found[rows] = (columns, launch.grid[0], *gb)
    assert found == READS[arch]


# Widths by what takes registers or shared memory: (activations, cache, head size) -> columns.
WIDEST = {
    (BF16, BF16, 256): {"sm_80": 96, "sm_90": 96, "sm_120": 64},
    (PAIRS, BF16, 256): {"sm_80": 64, "sm_90": 64, "sm_120": 32},
    (BF16, DType.E4M3, 256): {"sm_80": 96, "sm_90": 96, "sm_120": 64},
    (BF16, DType.F32, 256): {"sm_80": 80, "sm_90": 96, "sm_120": 64},
    (BF16, BF16, 128): {"sm_80": 96, "sm_90": 96, "sm_120": 64},
    (BF16, BF16, 64): {"sm_80": 128, "sm_90": 128, "sm_120": 64},
}


def test_columns_of_attention_fit_in_every_architecture() -> None:
    """Red: a width that leaves no room for the chunks by cp.async; one that only some have."""
    found = {
        (act, cache, d): {
            arch: 8 * kernels.attention_widths(attention(512, arch, act, cache, d))[0]
            for arch in ("sm_80", "sm_90", "sm_120")
        }
        for act, cache, d in WIDEST
    }
    assert found == WIDEST
    for arch in ARCHS:
        for act, cache in ((BF16, BF16), (PAIRS, DType.F32), (PAIRS, DType.I8)):
            for group in (1, 6, 24, 32):
                s = attention(512, arch, act, cache, group=group)
                widths = kernels.attention_widths(s)
                assert widths and all(8 * tiles >= group for tiles in widths), (arch, act, cache)
