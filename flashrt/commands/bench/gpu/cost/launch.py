"""The time of one kernel launch: the longest of what it needs, after what it costs to begin.

IS: a roofline with more than two roofs, and the assumptions that nobody publishes, by name. IS NOT:
a simulator: needs overlap perfectly, and the multiprocessor with most blocks decides.

    time = launch + max(memory, cache, tensor, issue, latency), each as in `Limit`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from flashrt.backends.cuda.fused_ops import HOLD_SEND
from flashrt.backends.cuda.kernels import HALF_BUSY, KernelLaunch
from flashrt.backends.cuda.occupancy import blocks_at_once, multiprocessor
from flashrt.commands.bench.gpu.cost.code import Code
from flashrt.commands.bench.gpu.cost.devices import Gpu
from flashrt.commands.bench.gpu.cost.effort import MMA_FLOP, Task, effort_of

# Assumptions, for no GPU has measured them with these kernels yet.
GAP_US: Final = 1.3  # from a kernel's last store to its successor's first instruction, in a graph
EARLY_GAP_US: Final = 0.8  # with programmatic dependent launch
L2_TRIPS: Final = 2  # that follow each other before a kernel computes: cursor, operands
L2_TRIP_CYCLES: Final = 280
DRAM_TRIP_US: Final = 0.5
# A store into host memory, which the end of its replay waits for. Counted of every device, also of
# those that share the host's memory.
BUS_TRIP_US: Final = 0.8
CYCLES_PER_SLOT: Final = 3.0  # of a warp without others: what it waits for its own results
CYCLES_PER_TENSOR_SLOT: Final = 1 / HALF_BUSY  # in a loop with independent tensor instructions
EMPTY_BLOCK_CYCLES: Final = 500  # of a block that reads the cursor and returns
SM_BYTES_PER_CYCLE: Final = 64  # between a multiprocessor and the L2 cache
ASSUMED_REGISTERS: Final = 128  # of a thread, where the code is not known
SCHEDULERS: Final = 4  # of a multiprocessor


class Limit(StrEnum):
    """What a launch takes its time for."""

    LAUNCH = "launch"  # the gap in the graph, the way to cursor and operands, and to DRAM
    MEMORY = "memory"  # bytes from and to DRAM, over its bandwidth
    # bytes that blocks load, each by itself, over the bandwidth of the L2 cache, or of the
    # multiprocessors that there are blocks for
    CACHE = "cache"
    TENSOR = "tensor"  # mma of the multiprocessor with most blocks, at the rate mma.sync reaches
    ISSUE = "issue"  # all instructions of its warps, one per scheduler and cycle
    # one warp from its first instruction to its last, by blocks that come one after another
    LATENCY = "latency"


@dataclass(frozen=True, slots=True)
class LaunchCost:
    """Microseconds of one launch of a kernel, by limit; without code, issue and latency are 0."""

    launch: float
    memory: float
    cache: float
    tensor: float
    issue: float
    latency: float
    dram_bytes: int

    @property
    def busy(self) -> float:
        """The longest need."""
        return max(self.memory, self.cache, self.tensor, self.issue, self.latency)

    @property
    def us(self) -> float:
        """From the end of the launch before it to its own end."""
        return self.launch + self.busy

    @property
    def need(self) -> Limit:
        """What `busy` is busy with; a launch without work is none but a launch."""
        if not self.busy:
            return Limit.LAUNCH
        needs = (Limit.MEMORY, Limit.CACHE, Limit.TENSOR, Limit.ISSUE, Limit.LATENCY)
        return max(needs, key=lambda limit: float(getattr(self, limit)))


def cost_of(task: Task, gpu: Gpu, code: Code | None, is_resident: bool) -> LaunchCost:
    """`is_resident`: all that the graph moves fits into the L2 cache, and stays from replay to
    replay. Scratch stays in the cache anyway, unless an operand is larger than it.
    """
    kernel, moved = task.kernel, task.moved
    held = gpu.multiprocessors * _at_once(kernel, gpu, code)
    effort = effort_of(task, lambda _: held)
    per_sm = -(-effort.blocks // gpu.multiprocessors)
    of_block = effort.tensor / max(1, effort.blocks)

    dram = 0
    if (task.is_first if effort.is_reader is None else effort.is_reader) and not is_resident:
        again = effort.passes if moved.lasting > gpu.l2_bytes else 1
        dram += moved.lasting * again
    if moved.widest_passing > gpu.l2_bytes:
        dram += moved.passing
    if effort.reread > gpu.l2_bytes:
        dram += effort.reread * effort.rereads
    near = min(effort.blocks, gpu.multiprocessors) * SM_BYTES_PER_CYCLE * gpu.clock_hz
    cache = effort.loaded / min(gpu.l2_bytes_per_s, max(near, 1.0)) if effort.blocks else 0.0
    tensor = per_sm * of_block * MMA_FLOP / (gpu.tensor_flops * gpu.mma_reach)
    issue = latency = 0.0
    if code is not None and effort.blocks:
        ordinary, inner = code.ordinary(effort.turns), code.innermost(of_block / task.warps)
        issue = per_sm * task.warps * (ordinary + inner) / SCHEDULERS / gpu.clock_hz
        empty = max(0, task.grid - effort.blocks) * EMPTY_BLOCK_CYCLES / held
        rounds = -(-effort.blocks // held)
        alone = ordinary * CYCLES_PER_SLOT + inner * CYCLES_PER_TENSOR_SLOT
        latency = (rounds * alone + empty) / gpu.clock_hz
    return LaunchCost(
        launch=_launch_us(gpu, reads_dram=dram > 0) + _sending_us(task),
        memory=1e6 * dram / (gpu.memory_bytes_per_s * gpu.dram_reach),
        cache=1e6 * cache,
        tensor=1e6 * tensor * gpu.multiprocessors,
        issue=1e6 * issue,
        latency=1e6 * latency,
        dram_bytes=dram,
    )


def side_by_side(parts: Sequence[LaunchCost]) -> LaunchCost:
    """One launch whose blocks do the work of all these: needs add up, but for what a single warp
    takes.
    """
    return LaunchCost(
        launch=max(part.launch for part in parts),
        memory=sum(part.memory for part in parts),
        cache=sum(part.cache for part in parts),
        tensor=sum(part.tensor for part in parts),
        issue=sum(part.issue for part in parts),
        latency=max(part.latency for part in parts),
        dram_bytes=sum(part.dram_bytes for part in parts),
    )


def _launch_us(gpu: Gpu, *, reads_dram: bool) -> float:
    gap = EARLY_GAP_US if gpu.has_early_launch else GAP_US
    trips = 1e6 * L2_TRIPS * L2_TRIP_CYCLES / gpu.clock_hz
    return gap + trips + (DRAM_TRIP_US if reads_dram else 0.0)


def _sending_us(task: Task) -> float:
    return BUS_TRIP_US if task.launch.op is HOLD_SEND else 0.0


def _at_once(kernel: KernelLaunch, gpu: Gpu, code: Code | None) -> int:
    """Blocks of a multiprocessor; one at least, for the launch is possible."""
    threads = kernel.block[0] * kernel.block[1] * kernel.block[2]
    registers = ASSUMED_REGISTERS if code is None else code.registers
    shared = kernel.shared_bytes + (0 if code is None else code.shared_bytes)
    return max(1, blocks_at_once(multiprocessor(gpu.arch), threads, registers, shared))
