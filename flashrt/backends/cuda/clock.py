"""Device time by events, with the host kept out of it.

IS: an event before and one after some work, both behind a delay that keeps the device busy until
the host has queued all of it, and that leaves nothing of use in the second-level cache. IS NOT:
host time; see timing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from flashrt.backends.cuda.device import CudaDevice

_DELAY_US = 3000.0  # longer than any of our verbs takes to queue its work
_MAX_FILLS = 64


class DeviceClock:
    """Microseconds between two events on a device's stream."""

    def __init__(self, device: CudaDevice, address: int, nbytes: int) -> None:
        """[address, address + nbytes) is overwritten by delays; larger than the L2 cache."""
        self._device = device
        self._address, self._nbytes = address, nbytes
        self._events = [device.driver.event_create(is_timed=True) for _ in range(2)]
        self._n_fills = 1
        self._fill()
        device.sync()
        fill_us = max(self._between(self._fill), 1.0)
        self._n_fills = min(_MAX_FILLS, max(1, round(_DELAY_US / fill_us)))

    def time_us(self, act: Callable[[], object]) -> float:
        """What `act` queues, once, with cold caches."""
        for _ in range(self._n_fills):
            self._fill()
        return self._between(act)

    def median_us(self, act: Callable[[], object], repeats: int) -> float:
        """Median of repeats of `time_us`."""
        return statistics.median(self.time_us(act) for _ in range(repeats))

    def close(self) -> None:
        """Release the events."""
        for event in self._events:
            self._device.driver.event_destroy(event)

    def _between(self, act: Callable[[], object]) -> float:
        driver, stream = self._device.driver, self._device.stream
        start, end = self._events
        driver.event_record(start, stream)
        act()
        driver.event_record(end, stream)
        driver.event_sync(end)
        return driver.elapsed_us(start, end)

    def _fill(self) -> None:
        self._device.fill(self._address, self._nbytes, 0)
