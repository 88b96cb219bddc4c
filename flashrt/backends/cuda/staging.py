"""Pinned staging between pageable arrays and the device: a ring up, two buffers down.

IS: why `write` can return before its copy has run: the bytes are in the ring, and a section of it
is reused only after the event behind its last copy. Allocated once, at open.
IS NOT: for transfers between device ranges. Called by: device.
"""

from __future__ import annotations

from collections import deque

from flashrt.backends.cuda.driver_api import Driver
from flashrt.base.errors import BackendError
from flashrt.core.backend import Bytes

_ALIGNMENT = 64


class UploadRing:
    """Host to device through `n_sections` pinned sections of `section_bytes`."""

    def __init__(
        self, driver: Driver, stream: int, section_bytes: int, n_sections: int = 4
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._section_bytes = section_bytes
        self._buffer = driver.host_alloc(section_bytes * n_sections)
        self._events = [driver.event_create() for _ in range(n_sections)]
        self._section = 0
        self._used_bytes = 0  # of the present section

    def upload(self, address: int, data: Bytes) -> None:
        """Queue a copy of the bytes as they are now; in stream order."""
        flat = data.reshape(-1)
        for start in range(0, flat.size, self._section_bytes):
            part = flat[start : start + self._section_bytes]
            offset = self._reserve(part.size)
            self._buffer.array[offset : offset + part.size] = part
            self._driver.copy_to_device(
                address + start, self._buffer.address + offset, part.size, self._stream
            )

    def _reserve(self, nbytes: int) -> int:
        """Offset of free pinned bytes; waits where the device is a whole ring behind."""
        if self._used_bytes + nbytes > self._section_bytes:
            self._driver.event_record(self._events[self._section], self._stream)
            self._section = (self._section + 1) % len(self._events)
            self._driver.event_sync(self._events[self._section])  # at once if never recorded
            self._used_bytes = 0
        offset = self._section * self._section_bytes + self._used_bytes
        self._used_bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset

    def close(self) -> None:
        """Release the pinned memory; the stream must be idle."""
        for event in self._events:
            self._driver.event_destroy(event)
        self._driver.host_free(self._buffer)


class Readback:
    """Device to host through two pinned buffers: one fills while the other is emptied."""

    def __init__(self, driver: Driver, stream: int, buffer_bytes: int) -> None:
        self._driver = driver
        self._stream = stream
        self._buffer_bytes = buffer_bytes
        self._buffers = [driver.host_alloc(buffer_bytes) for _ in range(2)]
        self._events = [driver.event_create() for _ in range(2)]

    def download(self, address: int, out: Bytes) -> None:
        """Fill `out`; returns when it is there, after everything earlier in the stream.

        Raises BackendError for an array that is not contiguous.
        """
        if not out.flags.c_contiguous:
            raise BackendError(f"read: the array of {out.nbytes} bytes is not contiguous")
        flat = out.reshape(-1)
        flying: deque[tuple[int, int]] = deque()  # (buffer, start) of copies under way
        for i, start in enumerate(range(0, flat.size, self._buffer_bytes)):
            if len(flying) == len(self._buffers):
                self._land(flat, *flying.popleft())
            which, nbytes = i % 2, min(self._buffer_bytes, flat.size - start)
            self._driver.copy_to_host(
                self._buffers[which].address, address + start, nbytes, self._stream
            )
            self._driver.event_record(self._events[which], self._stream)
            flying.append((which, start))
        while flying:
            self._land(flat, *flying.popleft())

    def _land(self, flat: Bytes, which: int, start: int) -> None:
        self._driver.event_sync(self._events[which])
        nbytes = min(self._buffer_bytes, flat.size - start)
        flat[start : start + nbytes] = self._buffers[which].array[:nbytes]

    def close(self) -> None:
        """Release the pinned memory."""
        for event in self._events:
            self._driver.event_destroy(event)
        for buffer in self._buffers:
            self._driver.host_free(buffer)
