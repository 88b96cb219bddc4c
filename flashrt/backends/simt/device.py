"""The simt device: the CUDA backend itself, over the driver double and the SIMT shim.

IS: wiring. Every verb, capture, staging, layout and kernel is that of backends/cuda, run on any
CPU: for people who write kernels without a GPU at hand, and for the tests.
IS NOT: fast; a warp is 32 fibers.
"""

from __future__ import annotations

from pathlib import Path

from flashrt.backends.cuda.device import Capacities, CudaDevice, Precision
from flashrt.backends.simt.build import ShimCompiler
from flashrt.backends.simt.driver import SimtDriver

_CAPACITIES = Capacities(staging_bytes=1 << 20, copies=1024, terms=128, reserve_bytes=0)


class SimtDevice(CudaDevice):
    """`CudaDevice` on host memory.

    `seed` other than 0 runs threads and blocks of each launch in a random order, another one at
    each launch, the same ones for the same seed. `is_watched` builds the race detector into the
    kernels: a race between threads of a block raises BackendError with file and line.
    `is_fused`: see CudaDevice.
    `multiprocessors` steers the choice of kernel variants, as on a GPU of that size.
    """

    def __init__(
        self,
        precision: Precision = "bfloat16",
        *,
        seed: int = 0,
        is_watched: bool = False,
        is_fused: bool = True,
        multiprocessors: int = 16,
        memory_bytes: int = 16 << 30,
        capacities: Capacities = _CAPACITIES,
        cache: Path | None = None,
    ) -> None:
        super().__init__(
            SimtDriver(seed, memory_bytes, multiprocessors),
            ShimCompiler(cache, is_watched=is_watched),
            precision,
            name="simt",
            is_host=True,
            is_fused=is_fused,
            capacities=capacities,
        )
