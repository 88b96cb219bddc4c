"""The machine's own limits, measured when asked, by the threads that run the kernels.

IS: multiply-add peak, read bandwidth, memcpy; what benchmarks put beside each number. IS NOT: a
benchmark of kernels.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_FMA_ROUNDS = 200_000  # rounds of the first trial; later ones last as long as they are asked to
_SHARED_FROM_NBYTES = 1 << 20  # below this, starting a thread costs more than it copies


class CpuLimits:
    """Made by `CpuDevice.limits`; `lib` is its kernel library, with its thread pool running."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib

    def fma_flops(self, seconds: float = 0.05) -> float:
        """Independent float32 multiply-adds on all threads, in FLOP/s (a multiply-add is two)."""
        rounds = _FMA_ROUNDS
        while True:
            started = time.perf_counter()
            flop = float(self._lib.flashrt_fma_peak(rounds))
            elapsed = time.perf_counter() - started
            if elapsed >= seconds:
                return flop / elapsed
            rounds = max(2 * rounds, int(1.2 * rounds * seconds / elapsed))

    def read_seconds(self, address: int, nbytes: int) -> float:
        """Seconds to read a range once, each thread a contiguous share."""
        started = time.perf_counter()
        self._lib.flashrt_read_stream(address, nbytes)
        return time.perf_counter() - started


class MemcpyLimit:
    """libc's memcpy of a given size: by one thread, and shared among all; the faster one counts."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.nbytes = nbytes
        self._source = np.ones(nbytes, np.uint8)
        self._target = np.ones(nbytes, np.uint8)  # ones: first touches are over
        n_shares = threads if nbytes >= _SHARED_FROM_NBYTES else 1
        bounds = [nbytes * i // n_shares for i in range(n_shares + 1)]
        target, source = self._target.ctypes.data, self._source.ctypes.data
        self._shares = [
            (target + start, source + start, stop - start)
            for start, stop in itertools.pairwise(bounds)
        ]
        self._pool = ThreadPoolExecutor(n_shares)

    def seconds(self) -> float:
        """One measurement: the better of the two ways."""
        target, source = self._target.ctypes.data, self._source.ctypes.data
        started = time.perf_counter()
        ctypes.memmove(target, source, self.nbytes)
        alone = time.perf_counter() - started
        if len(self._shares) == 1:
            return alone
        started = time.perf_counter()
        list(self._pool.map(lambda share: ctypes.memmove(*share), self._shares))
        return min(alone, time.perf_counter() - started)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
