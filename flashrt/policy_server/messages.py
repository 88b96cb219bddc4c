"""The messages of LeRobot's transport, as protocol buffers put them into bytes.

IS: the fields that four calls have: a state and bytes of a piece, bytes of instructions and of
answers. IS NOT: a library for protocol buffers, or generated code: a field is a tag, and a varint
or a length with bytes. Fields that are not known are skipped, as the format wants it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from flashrt.base.errors import PayloadError

EMPTY = b""
_STATE, _PIECE_DATA, _DATA = 1, 2, 1  # numbers of fields
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # kinds of fields


class Transfer(enum.IntEnum):
    """Where in its payload a piece is; a payload of one piece is an END."""

    BEGIN = 1
    MIDDLE = 2
    END = 3


def data_of(message: bytes) -> bytes:
    """Of a message of bytes alone: policy instructions. Raises PayloadError."""
    return _bytes(_fields(message), _DATA)


def answer_of(data: bytes) -> bytes:
    """A message of bytes alone: actions. None are an empty message."""
    return bytes([_DATA << 3 | _LENGTH]) + _written(len(data)) + data if data else EMPTY


def joined(pieces: Iterable[bytes], most_nbytes: int) -> bytes:
    """The payload of a stream of pieces. Raises PayloadError for one that does not end, or is more
    than `most_nbytes` long.
    """
    found = bytearray()
    for piece in pieces:
        fields = _fields(piece)
        state, data = fields.get(_STATE, 0), _bytes(fields, _PIECE_DATA)
        if state not in set(Transfer):
            raise PayloadError(f"a piece of an observation with transfer state {state!r}")
        if state == Transfer.BEGIN:
            found.clear()
        if len(found) + len(data) > most_nbytes:
            raise PayloadError(
                f"an observation of more than {most_nbytes:,} bytes; send smaller images"
            )
        found += data
        if state == Transfer.END:
            return bytes(found)
    raise PayloadError(f"an observation that breaks off after {len(found):,} bytes")


def _bytes(fields: Mapping[int, int | bytes], number: int) -> bytes:
    value = fields.get(number, b"")
    if not isinstance(value, bytes):
        raise PayloadError(f"field {number} of a message is a number, expected bytes")
    return value


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The last value of each field. Raises PayloadError."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            found[number], at = _varint(message, at)
            continue
        if kind == _LENGTH:
            size, at = _varint(message, at)
        elif kind in (_FOUR, _EIGHT):
            size = 4 if kind == _FOUR else 8
        else:
            raise PayloadError(f"a message with a field of kind {kind}")
        if size > len(message) - at:
            raise PayloadError("a message that breaks off within a field")
        found[number] = message[at : at + size]
        at += size
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise PayloadError("a message with a number that does not end")


def _written(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
