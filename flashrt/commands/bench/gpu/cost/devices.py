"""GPUs by what NVIDIA publishes of them, and how much of that our kernels are assumed to reach.

IS: records that the model of cost divides by. IS NOT: measured; where a GPU was, `limits` of its
report says what it can do (docs/measured).

Published: multiprocessors, boost clock, dense bfloat16 throughput with float32 sums, memory, second
level cache. Sources: "NVIDIA RTX Blackwell GPU Architecture" (RTX 5090), "NVIDIA Ada GPU
Architecture" (RTX 4090), "NVIDIA H100 Tensor Core GPU Architecture" and the H200 data sheet, the
data sheets of Jetson Thor, Jetson AGX Orin and DGX Spark. Where a sheet has no dense bfloat16
figure, it is derived, and the record says how.

Assumed, for nobody publishes them: the fields `l2_bytes_per_s`, `mma_reach` and `dram_reach`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flashrt.base.errors import BackendError

_TERA, _GB, _MB = 1e12, 10**9, 1 << 20
_CARD_REACH, _EDGE_REACH = 0.92, 0.85  # of memory bandwidth, by a kernel that only reads


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Rates per second, dense; memory bandwidth counts bytes either way."""

    title: str  # as its driver names it, in part
    arch: str
    multiprocessors: int
    clock_hz: float  # boost
    tensor_flops: float  # bfloat16 products, float32 sums
    memory_bytes_per_s: float
    memory_bytes: int
    l2_bytes: int
    l2_bytes_per_s: float  # assumed
    mma_reach: float  # share of tensor_flops that a loop of mma.sync reaches: assumed
    dram_reach: float = _CARD_REACH  # assumed

    @property
    def has_early_launch(self) -> bool:
        """Programmatic dependent launch: a kernel is set up while its predecessor still runs."""
        return int(self.arch.removeprefix("sm_")) >= 90


GPUS: Final[Mapping[str, Gpu]] = {
    # GeForce tensor cores take bfloat16 with float32 sums at half the rate of float16 sums. All
    # they have is mma.sync, and hand-written loops of it come near the published rate.
    "rtx-5090": Gpu(
        "RTX 5090", "sm_120", 170, 2.407e9, 209.5 * _TERA, 1792 * _GB, 32 * _GB, 96 * _MB,
        7 * _TERA, 0.9,
    ),
    "rtx-4090": Gpu(
        "RTX 4090", "sm_89", 128, 2.52e9, 165.2 * _TERA, 1008 * _GB, 24 * _GB, 72 * _MB,
        5 * _TERA, 0.9,
    ),
    # The clock is the one at which 132 multiprocessors make the published 989.4 TFLOP/s. Only wgmma
    # makes them: mma.sync was measured at 62 % of it ("Dissecting the NVIDIA Hopper Architecture
    # through Microbenchmarking and Multiple Level Analysis", arXiv 2501.12084).
    "h200": Gpu(
        "H200", "sm_90", 132, 1.83e9, 989.4 * _TERA, 4800 * _GB, 141 * _GB, 50 * _MB,
        5.5 * _TERA, 0.62,
    ),
    # Published are 2,070 TFLOP/s of sparse FP4: an eighth of it is dense bfloat16. Only tcgen05
    # makes them; that mma.sync runs at the rate of an A100's multiprocessor, a quarter, is a guess.
    "thor": Gpu(
        "Thor", "sm_110", 20, 1.575e9, 258.8 * _TERA, 273 * _GB, 128 * _GB, 32 * _MB,
        1 * _TERA, 0.25, _EDGE_REACH,
    ),
    # Published are 170 sparse int8 TOP/s of its GPU: a quarter of it is dense bfloat16.
    "orin": Gpu(
        "Orin", "sm_87", 16, 1.3e9, 42.5 * _TERA, 204.8 * _GB, 64 * _GB, 4 * _MB,
        0.6 * _TERA, 0.9, _EDGE_REACH,
    ),
    # Published is 1 PFLOP/s of sparse FP4; by the ratio of the GeForce cards of its architecture
    # (RTX 5090: 3,352 to 209.5) a sixteenth of it is dense bfloat16 with float32 sums.
    "spark": Gpu(
        "GB10", "sm_121", 48, 2.52e9, 62.5 * _TERA, 273 * _GB, 128 * _GB, 24 * _MB,
        2.2 * _TERA, 0.9, _EDGE_REACH,
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """A GPU by its name here. Raises BackendError that names the known ones."""
    if name not in GPUS:
        raise BackendError(f"GPU {name!r} has no published figures here; known: {', '.join(GPUS)}")
    return GPUS[name]
