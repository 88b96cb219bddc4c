"""Occupancy, and the tiles of `linear` that follow from it: stages, blocks at once, filled devices.

IS: numbers against those of NVIDIA's tables and against a count of the grid. IS NOT: compiled
kernels: that launch bounds hold, see test_sass.
"""

from __future__ import annotations

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import KernelLaunch, ManyTile, Shape
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

SIZES = {"sm_90": 132, "sm_120": 170}
BUCKETS = (64, 128, 256, 512, 1024, 2048)


def shape(n: int, t: int, arch: str, act: DType = DType.BF16X2) -> Shape:
    dims = {"T": t, "N": n, "K": 5120}
    return Shape("linear", dims, {}, {}, act, SIZES.get(arch, 108), sm=multiprocessor(arch))


def launch_of(s: Shape) -> KernelLaunch:
    (launch,) = kernels.EXPANSIONS["linear"](s)
    return launch


def filled(launch: KernelLaunch, n_sms: int) -> float:
    """Share of multiprocessors that work, until the one with most blocks has done them."""
    blocks = launch.grid[0] * launch.grid[1]
    return blocks / (-(-blocks // n_sms) * n_sms)


# Of the launch chosen, by (architecture, N): rows of the bucket -> share of the device. 160 blocks
# on 132 multiprocessors are 0.61: K would have to be divided among blocks, which the order of the
# sums forbids.
FILLED = {
    ("sm_90", 1024): {64: 0.97, 128: 0.97, 256: 0.97, 512: 0.97, 1024: 0.97, 2048: 0.97},
    ("sm_90", 5120): {64: 0.61, 128: 0.82, 256: 0.82, 512: 0.97, 1024: 0.97, 2048: 0.97},
    ("sm_120", 1024): {64: 0.75, 128: 0.75, 256: 0.75, 512: 0.75, 1024: 0.75, 2048: 0.75},
    ("sm_120", 5120): {64: 0.94, 128: 0.94, 256: 0.94, 512: 0.94, 1024: 0.94, 2048: 0.94},
}


@pytest.mark.parametrize(("arch", "n"), FILLED)
def test_buckets_fill_the_device(arch: str, n: int) -> None:
    """Red: a cost that counts no idle multiprocessors, or no small tiles for small launches: with
    tiles of 64 rows alone, 64 tokens of N = 1024 keep 16 of 132 busy.
    """
    shares = {t: round(filled(launch_of(shape(n, t, arch)), SIZES[arch]), 2) for t in BUCKETS}
    assert shares == FILLED[arch, n]


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
