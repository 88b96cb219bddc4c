"""Occupancy: how many blocks of a kernel a multiprocessor holds at once, by architecture.

IS: the limits that NVIDIA publishes per compute capability, and arithmetic on them. IS NOT: a
measurement, nor what a device reports: no driver is asked, so that the choice of a kernel's
variant is the same with and without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

WARP: Final = 32
REGISTERS: Final = 65_536  # of a multiprocessor, of 4 bytes
MOST_REGISTERS: Final = 255  # of a thread
RESERVED_BYTES: Final = 1024  # of shared memory, per block
_REGISTER_UNIT: Final = 256  # registers are given to warps in such units
_SCHEDULERS: Final = 4  # a warp's registers lie with one of them


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What one multiprocessor has room for."""

    warps: int
    blocks: int
    shared_bytes: int  # of all blocks


_KB: Final = 1 << 10
MULTIPROCESSORS: Final[Mapping[int, Multiprocessor]] = {
    80: Multiprocessor(64, 32, 164 * _KB),
    86: Multiprocessor(48, 16, 100 * _KB),
    87: Multiprocessor(48, 16, 164 * _KB),
    89: Multiprocessor(48, 24, 100 * _KB),
    90: Multiprocessor(64, 32, 228 * _KB),
    100: Multiprocessor(64, 32, 228 * _KB),
    103: Multiprocessor(64, 32, 228 * _KB),
    110: Multiprocessor(48, 24, 228 * _KB),
    120: Multiprocessor(48, 24, 100 * _KB),
    121: Multiprocessor(48, 24, 100 * _KB),
}
# What every architecture has room for.
LEAST: Final = Multiprocessor(
    min(m.warps for m in MULTIPROCESSORS.values()),
    min(m.blocks for m in MULTIPROCESSORS.values()),
    min(m.shared_bytes for m in MULTIPROCESSORS.values()),
)


def multiprocessor(arch: str) -> Multiprocessor:
    """Of "sm_90"; of an architecture that is not listed, what all of them have room for."""
    digits = arch.removeprefix("sm_")
    return MULTIPROCESSORS.get(int(digits) if digits.isdigit() else 0, LEAST)


def blocks_at_once(sm: Multiprocessor, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once; 0 where not even one fits.

    `registers` of a thread; `shared_bytes` of a block, static and dynamic.
    """
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS // _SCHEDULERS // of_warp * _SCHEDULERS if of_warp else sm.warps
    by_shared = sm.shared_bytes // (shared_bytes + RESERVED_BYTES)
    return min(sm.blocks, min(sm.warps, by_registers) // warps, by_shared)


def registers_for(threads: int, blocks: int) -> int:
    """Registers that a thread may take so that `blocks` blocks fit: what launch bounds ask for."""
    of_warp = REGISTERS // _SCHEDULERS // -(-(blocks * -(-threads // WARP)) // _SCHEDULERS)
    return min(MOST_REGISTERS, of_warp // _REGISTER_UNIT * _REGISTER_UNIT // WARP)
