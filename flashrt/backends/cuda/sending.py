"""Words that a replay sends to the host by itself: a store into mapped memory instead of a copy.

IS: the ring that op `hold_send` stores into, and which of its slots has the word of which replay.
IS NOT: what is sent (fusion), or a copy of any other word (staging.WordRing).

A graph's arguments are constants, so slots are numbered on the device, by a counter there, and here
as well. Each slot has its number beside the word: a host that looks too early, or into a slot that
was not written, raises instead of taking another word.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from flashrt.backends.cuda.driver_api import Driver
from flashrt.backends.cuda.fused_ops import HOLD_SEND, WORD_RING
from flashrt.backends.cuda.fusion import SendTo
from flashrt.backends.cuda.staging import AwaitedWords
from flashrt.base.errors import BackendError
from flashrt.core.backend import BoundLaunch
from flashrt.core.runs import STRIDE_UNIT, RunsWord, RunWord

_N_SLOTS, _SLOT_WORDS = WORD_RING.shape
_RING_BYTES: Final = 4 * WORD_RING.size
_NUMBERS: Final = 1 << 32  # then they begin again: the counter is a word
_CURSOR: Final = [p.name for p in HOLD_SEND.params].index("cursor")
_FIRST_LANE = struct.Struct("@i"), 4 * (RunsWord.FIRST + RunWord.LANE)


@dataclass(frozen=True, slots=True)
class SentWord:
    """Which word a graph sends."""

    address: int  # of lane 0
    lane_bytes: int  # from lane to lane; 0: it is of no lane

    def of(self, table: bytes | None) -> int | None:
        """Its address in a replay; None where the lane is not known."""
        if not self.lane_bytes:
            return self.address
        if table is None:
            return None
        words, at = _FIRST_LANE
        return self.address + self.lane_bytes * int(words.unpack_from(table, at)[0])


def sent_by(launches: Sequence[BoundLaunch]) -> SentWord | None:
    """The word that a graph of these launches sends, if it sends one."""
    if not launches or launches[-1].launch.op is not HOLD_SEND:
        return None
    last = launches[-1]
    lanes = last.strides[_CURSOR].lane if last.strides else 0
    address = last.addresses[_CURSOR] + 4 * int(last.launch.attr("word"))
    return SentWord(address, lanes * STRIDE_UNIT)


class WordSlots:
    """The ring of a device, and who waits for which slot."""

    def __init__(self, driver: Driver, stream: int, sent_at: int) -> None:
        """`sent_at`: the counter on the device, region SENT, which is 0."""
        self._driver = driver
        self._stream = stream
        self._sent_at = sent_at
        self._buffer = driver.host_alloc(_RING_BYTES + 4, is_mapped=True)  # and for the counter
        self._slots = self._buffer.array[:_RING_BYTES].view(np.uint32).reshape(WORD_RING.shape)
        self._counter = self._buffer.array[_RING_BYTES:].view(np.uint32)
        self._awaited = AwaitedWords(driver, stream, _N_SLOTS, self._word)
        self._n_sent = 0
        self._is_counted = True  # False: a replay began of which it is not known whether it runs
        self._address: int | None = None  # of a word that is still as it was sent last

    @property
    def send_to(self) -> SendTo:
        """Where kernels send to."""
        return SendTo(self._buffer.device_address, self._sent_at)

    def replay(self, launch: Callable[[], None], address: int | None) -> None:
        """Launch a graph that sends the word at an address."""
        self._address = None
        if not self._is_counted:
            self._count_again()
        self._awaited.land(self._n_sent % _N_SLOTS)  # whose word is about to be another
        self._is_counted = False  # an exception may strike at any line: Ctrl-C
        launch()
        self._n_sent = (self._n_sent + 1) % _NUMBERS
        self._is_counted = True
        self._address = address

    def forget(self) -> None:
        """What follows in the stream may change the word that was sent last."""
        self._address = None

    def begin(self, address: int) -> Callable[[], int] | None:
        """The word at an address, if it is what was sent last: what is returned waits for it."""
        if address != self._address:
            return None
        number = (self._n_sent - 1) % _NUMBERS
        slot = number % _N_SLOTS
        self._awaited.land(slot)  # asked for twice: it is there for both
        return self._awaited.expect(slot, number)

    def _word(self, slot: int, number: int) -> int:
        word, of = self._slots[slot, :2].tolist()
        if of != number:
            raise BackendError(
                f"the device sent word {of} where word {number} was expected: a fault of flashrt, "
                "or of the device; load another engine"
            )
        return int(word - _NUMBERS if word >> 31 else word)

    def _count_again(self) -> None:
        """What the device has counted, after all that it was given."""
        for slot in range(_N_SLOTS):
            self._awaited.land(slot)
        at = self._buffer.address + _RING_BYTES
        self._driver.copy_to_host(at, self._sent_at, 4, self._stream)
        self._driver.stream_sync(self._stream)
        self._n_sent = int(self._counter[0])
        self._is_counted = True

    def close(self) -> None:
        """Release everything; the stream must be idle."""
        self._awaited.close()
        self._driver.host_free(self._buffer)
