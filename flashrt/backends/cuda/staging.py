"""Pinned staging between pageable arrays and the device: a ring up, two buffers and a ring down.

IS: why `write` can return before its copy has run: the bytes are in the ring, and a section of it
is reused only after the event behind its last copy. Allocated once, at open.
IS NOT: for transfers between device ranges.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

import numpy as np

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

    def upload_rows(self, address: int, pitch: int, rows: Bytes) -> None:
        """Queue copies of the rows [n, width] to every `pitch` bytes: one per section of the ring,
        where rows are shorter than a section.
        """
        n_rows, width = rows.shape
        at_once = self._section_bytes // max(width, 1)
        if at_once < 2 or n_rows < 2:
            for i, row in enumerate(rows):
                self.upload(address + i * pitch, row)
            return
        for first in range(0, n_rows, at_once):
            part = rows[first : first + at_once]
            offset = self._reserve(part.size)
            pinned = self._buffer.array[offset : offset + part.size].reshape(part.shape)
            pinned[:] = part
            self._driver.copy_rows_to_device(
                address + first * pitch, pitch, self._buffer.address + offset, width, len(part),
                self._stream,
            )  # fmt: skip

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


class DownloadRing:
    """Device to host behind the caller's back: a stream and a ring of pinned sections of its own.

    A read takes the bytes as they are at its place in the compute stream. It lands, from the ring
    into pageable memory, when somebody waits for it or the ring has come round. `fence` holds back
    work that would overwrite what is still being read.
    """

    def __init__(
        self, driver: Driver, compute_stream: int, section_bytes: int, n_sections: int = 8
    ) -> None:
        self._driver = driver
        self._compute = compute_stream
        self._section_bytes = section_bytes
        self._buffer = driver.host_alloc(section_bytes * n_sections)
        self._stream = driver.stream_create()
        self._events = [driver.event_create() for _ in range(n_sections)]
        self._begun, self._done = driver.event_create(), driver.event_create()
        self._flying: deque[tuple[int, Bytes]] = deque()  # (piece, where to), oldest first
        self._n_pieces = 0  # so far; a piece's section is its number modulo their count
        self._is_fenced = True

    def begin(self, address: int, nbytes: int) -> Callable[[], Bytes]:
        """Queue a read after the work in the compute stream; what is returned waits for it."""
        out: Bytes = np.empty(nbytes, np.uint8)
        self._driver.event_record(self._begun, self._compute)
        self._driver.stream_wait(self._stream, self._begun)
        for start in range(0, nbytes, self._section_bytes):
            part = out[start : start + self._section_bytes]
            if len(self._flying) == len(self._events):
                self._land()
            section = self._n_pieces % len(self._events)
            pinned = self._buffer.address + section * self._section_bytes
            self._driver.copy_to_host(pinned, address + start, part.size, self._stream)
            self._driver.event_record(self._events[section], self._stream)
            self._flying.append((self._n_pieces, part))
            self._n_pieces += 1
        self._driver.event_record(self._done, self._stream)
        self._is_fenced = False
        last = self._n_pieces - 1

        def arrive() -> Bytes:
            while self._flying and self._flying[0][0] <= last:
                self._land()
            return out

        return arrive

    def fence(self) -> None:
        """Work queued from here on waits, on the device, for reads that have begun."""
        if not self._is_fenced:
            self._driver.stream_wait(self._compute, self._done)
            self._is_fenced = True

    def _land(self) -> None:
        piece, out = self._flying[0]
        section = piece % len(self._events)
        self._driver.event_sync(self._events[section])
        start = section * self._section_bytes
        out[:] = self._buffer.array[start : start + out.size]
        self._flying.popleft()

    def close(self) -> None:
        """Land what is under way, and release everything."""
        while self._flying:
            self._land()
        for event in (*self._events, self._begun, self._done):
            self._driver.event_destroy(event)
        self._driver.stream_destroy(self._stream)
        self._driver.host_free(self._buffer)


class AwaitedWords:
    """Who waits for the word of which slot, an event for each. `read(slot, number)` takes a word
    from where it arrives, once the event has passed.
    """

    def __init__(
        self, driver: Driver, stream: int, n_slots: int, read: Callable[[int, int], int]
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._read = read
        self._events = [driver.event_create() for _ in range(n_slots)]
        self._found: list[tuple[int, list[int]] | None] = [None] * n_slots  # number, where to

    def __len__(self) -> int:
        return len(self._events)

    def expect(self, slot: int, number: int) -> Callable[[], int]:
        """The word that all work queued so far leaves in a slot: what is returned waits for it.
        Nobody may wait for the slot: see land.
        """
        self._driver.event_record(self._events[slot], self._stream)
        found: list[int] = []
        self._found[slot] = number, found

        def arrive() -> int:
            if not found:
                self.land(slot)
            return found[0]

        return arrive

    def land(self, slot: int) -> None:
        """Give the word of a slot to who waits for it, if anybody does."""
        waiting = self._found[slot]
        if waiting is None:
            return
        number, found = waiting
        self._driver.event_sync(self._events[slot])
        found.append(self._read(slot, number))
        self._found[slot] = None

    def close(self) -> None:
        """Land what is under way; a word that does not come is nobody's. Release the events."""
        for slot, event in enumerate(self._events):
            with contextlib.suppress(BackendError):
                self.land(slot)
            self._driver.event_destroy(event)


class WordRing:
    """Words from device to host, each as it is at its place in the compute stream; work queued
    after it may change the word.
    """

    _NBYTES = 64  # of a slot

    def __init__(self, driver: Driver, stream: int, n_slots: int = 8) -> None:
        self._driver = driver
        self._stream = stream
        self._buffer = driver.host_alloc(self._NBYTES * n_slots)
        self._awaited = AwaitedWords(driver, stream, n_slots, self._word)
        self._n_reads = 0

    def begin(self, address: int) -> Callable[[], int]:
        """Queue a read of an int32; what is returned waits for it."""
        slot = self._n_reads % len(self._awaited)
        self._awaited.land(slot)
        at = self._buffer.address + slot * self._NBYTES
        self._driver.copy_to_host(at, address, 4, self._stream)
        arrive = self._awaited.expect(slot, self._n_reads)
        self._n_reads += 1
        return arrive

    def _word(self, slot: int, number: int) -> int:
        del number  # a copy cannot be another's
        start = slot * self._NBYTES
        return int(self._buffer.array[start : start + 4].view(np.int32)[0])

    def close(self) -> None:
        """Land what is under way, and release everything."""
        self._awaited.close()
        self._driver.host_free(self._buffer)
