"""A GGUF file: its metadata, and where each tensor lies.

IS: versions 2 and 3, little endian, one file or all parts of a split one; every count and offset
is checked against the file. IS NOT: what tensors mean (names), what metadata say of a model
(config), nor blocks (formats.blocks). Nothing is mapped, and a hostile header costs bounded memory.

    "GGUF" | u32 version | u64 tensors, u64 keys | key, u32 type, value | ...
    name, u32 n, u64 sizes [n] (innermost first), u32 type, u64 offset | ...
    padding | data: offsets count from here, and are multiples of `general.alignment`
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.files import opened, read_exactly
from flashrt.base.messages import listed, printable, shown
from flashrt.weights.formats.stored import Tensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
_MOST_HEADER_NBYTES = 100_000_000  # a vocabulary of 256k tokens and its merges take 15 MB
_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 17
_MOST_ELEMENTS = 1 << 22  # of all arrays together
_MOST_NESTED = 4  # arrays of arrays
_MOST_AXES = 4
_MOST_PARTS = 1000
_READ_NBYTES = 1 << 20
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_CUT = "it ends inside its header"
_SIZE = struct.Struct("<Q")  # of a text, before it
_NEVER = 0xFF  # no byte of UTF-8

# Tensor types by their number: name, elements of a block, bytes of a block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Numbers by the type of a value.
_NUMBERS: Mapping[int, np.dtype[np.generic]] = {
    number: np.dtype(code)
    for number, code in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file, or a split one put together. Tensors by the names that the file has; shapes are as
    numpy's, outermost first.
    """

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, Tensor]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is to be opened as GGUF, by its name alone."""
    return Path(path).suffix == SUFFIX


def read_metadata(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """Keys and values: numbers, texts, or lists of them. Of a split file, those of its first part.

    Bytes of a text that are no UTF-8 come as lone surrogates. Raises CheckpointError.
    """
    return _read(_parts(Path(path).expanduser())[0]).metadata


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Metadata and tensors; of all parts, given one of a split file. Raises CheckpointError."""
    parts = [_read(part) for part in _parts(Path(path).expanduser())]
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        count, number = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
        # Splitting tools write 0 where a file is whole.
        if (count or 1) != len(parts) or number != i:
            raise CheckpointError(
                f"{part.path}: is part {shown(number)} (from 0) of {shown(count)}, but "
                f"its name says {i} of {len(parts)}; give it the name that it was made with"
            )
        if twice := sorted(part.tensors.keys() & tensors.keys()):
            raise CheckpointError(
                f"{part.path}: {listed(twice)} was already in {tensors[twice[0]].path.name}; fetch "
                "all parts again"
            )
        tensors |= part.tensors
    promised = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and promised != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: promises {shown(promised)} tensors, but its parts hold "
            f"{len(tensors):,}; fetch all parts again"
        )
    return GgufFile(parts[0].path, parts[0].metadata, tensors)


def _parts(path: Path) -> list[Path]:
    """All parts of the file that a path is one of."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count <= _MOST_PARTS:
        raise CheckpointError(
            f"{printable(str(path))}: no part of a split file has this number; give its first part"
        )
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{SUFFIX}") for i in range(1, count + 1)]
    if lost := [part.name for part in parts if not part.exists()]:
        raise CheckpointError(
            f"{printable(str(path))}: one of {count} parts; {listed(lost)} missing beside it: "
            "fetch all of them into one folder"
        )
    return parts


def _read(path: Path) -> GgufFile:
    try:
        with opened(path) as (handle, nbytes):
            return _parsed(path, _Bytes(handle, nbytes))
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(path))}: cannot be read: {error.strerror}; fetch it again, or give "
            "another path"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({error}); fetch it again") from error


class _Bytes:
    """The header of an open file, read as far as it was asked for. Raises ValueError at its end."""

    def __init__(self, handle: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.at = 0
        self.elements_left = _MOST_ELEMENTS
        self._handle = handle
        self._data = bytearray()

    def take(self, count: int) -> bytearray:
        """The next bytes."""
        stop = self.at + count
        if stop > len(self._data):
            self._read_up_to(stop)
        part = self._data[self.at : stop]
        self.at = stop
        return part

    def u32(self) -> int:
        """The next number of 4 bytes."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """The next number of 8 bytes."""
        return int.from_bytes(self.take(8), "little")

    def text(self) -> str:
        """A text of values; bytes that are no UTF-8 become lone surrogates."""
        return self.take(self.u64()).decode("utf-8", "surrogateescape")

    def texts(self, count: int) -> list[str]:
        """As many texts, each as `text` reads it: a vocabulary has some 100,000."""
        size_at = _SIZE.unpack_from
        first, at = self.at, self.at
        starts: list[int] = []
        while len(starts) < count:
            if at + _SIZE.size > len(self._data):
                self._read_up_to(at + _SIZE.size)
            data, last = self._data, len(self._data) - _SIZE.size
            for _ in range(count - len(starts)):
                if at > last:
                    break
                starts.append(at)
                at += size_at(data, at)[0] + _SIZE.size
        if not count:
            return []
        if at > len(self._data):
            self._read_up_to(at)
        self.at = at
        return _cut(self._data[first:at], np.array(starts) - first)

    def name(self) -> str:
        """A key, or the name of a tensor."""
        return self.take(self.u64()).decode()

    def _read_up_to(self, stop: int) -> None:
        if stop > self.nbytes:
            raise ValueError(_CUT)
        if stop > _MOST_HEADER_NBYTES:
            raise ValueError(f"a header of more than {_MOST_HEADER_NBYTES:,} bytes")
        have = len(self._data)
        want = min(max(stop, have + _READ_NBYTES), self.nbytes)
        self._data += read_exactly(self._handle, want - have, have).data


def _cut(data: bytearray, starts: NDArray[np.int64]) -> list[str]:
    """Texts that lie one after another, each behind its size of 8 bytes, which begins at `starts`.

    All are decoded at once, with a byte that is never part of UTF-8 between them.
    """
    flat = np.frombuffer(data, np.uint8)
    is_kept = np.ones(len(flat), bool)
    for i in range(_SIZE.size):
        is_kept[starts + i] = False
    if (flat[is_kept] == _NEVER).any():  # it is in a text: these are decoded one by one
        stops = [*starts[1:].tolist(), len(data)]
        return [
            data[start + _SIZE.size : stop].decode("utf-8", "surrogateescape")
            for start, stop in zip(starts.tolist(), stops, strict=True)
        ]
    is_kept[starts] = True
    flat[starts] = _NEVER
    whole = flat[is_kept].tobytes().decode("utf-8", "surrogateescape")
    return whole.split(chr(0xDC00 + _NEVER))[1:]


def _parsed(path: Path, header: _Bytes) -> GgufFile:
    _check_version(path, header)
    n_tensors, n_keys = header.u64(), header.u64()
    if n_keys > _MOST_KEYS or n_tensors > _MOST_TENSORS:
        raise ValueError(f"it claims {n_keys:,} keys and {n_tensors:,} tensors")
    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        key = header.name()
        if key in metadata:
            raise ValueError(f"key {shown(key)} occurs twice")
        metadata[key] = _value(header, key, header.u32(), 0)
    tensors: dict[str, Tensor] = {}
    for _ in range(n_tensors):
        tensor = _tensor(path, header)
        if tensor.stored_name in tensors:
            raise ValueError(f"tensor {shown(tensor.stored_name)} occurs twice")
        tensors[tensor.stored_name] = tensor
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, expected a power of two")
    first = -(-header.at // alignment) * alignment
    placed = {name: _placed(t, first, alignment, header.nbytes) for name, t in tensors.items()}
    _check_overlaps(placed)
    return GgufFile(path, metadata, placed)


def _check_version(path: Path, header: _Bytes) -> None:
    if header.nbytes < 4 or header.take(4) != MAGIC:
        raise CheckpointError(
            f"{path}: does not begin as a GGUF file does; fetch it again, or give another path"
        )
    version = header.u32()
    if version in VERSIONS:
        return
    swapped = struct.unpack(">I", struct.pack("<I", version))[0]
    if swapped in (1, *VERSIONS):
        what = "is big endian, for other processors; take a little endian file"
    elif version < min(VERSIONS):
        what = f"is GGUF version {version}, which has not been written since 2023; convert it again"
    else:
        what = f"is GGUF version {version}; flashrt reads versions {listed(VERSIONS)}"
    raise CheckpointError(f"{path}: {what}")


def _value(header: _Bytes, key: str, kind: int, depth: int) -> object:
    if kind == _STRING:
        return header.text()
    if kind == _ARRAY:
        return _array(header, key, depth)
    dtype = _NUMBERS.get(kind)
    if dtype is None:
        raise ValueError(f"key {shown(key)} is of type {kind}, which is unknown")
    return _numbers(header, key, dtype, 1)[0]


def _array(header: _Bytes, key: str, depth: int) -> list[object]:
    kind, count = header.u32(), header.u64()
    if depth == _MOST_NESTED:
        raise ValueError(f"key {shown(key)} has arrays nested too deeply")
    if count > header.elements_left:
        raise ValueError(f"key {shown(key)} is an array of {count:,} elements")
    header.elements_left -= count
    if dtype := _NUMBERS.get(kind):
        return _numbers(header, key, dtype, count)
    if kind == _STRING:
        return list[object](header.texts(count))
    if kind == _ARRAY:
        return [_array(header, key, depth + 1) for _ in range(count)]
    raise ValueError(f"key {shown(key)} is an array of type {kind}, which is unknown")


def _numbers(header: _Bytes, key: str, dtype: np.dtype[np.generic], count: int) -> list[object]:
    raw = header.take(count * dtype.itemsize)
    if dtype.kind == "b" and max(raw, default=0) > 1:
        raise ValueError(f"key {shown(key)} has a boolean that is neither true nor false")
    values: list[object] = np.frombuffer(raw, dtype).tolist()
    return values


def _tensor(path: Path, header: _Bytes) -> Tensor:
    """A tensor with its offset as the file has it."""
    name = header.name()
    n_axes = header.u32()
    if not 1 <= n_axes <= _MOST_AXES:
        raise ValueError(f"tensor {shown(name)} has {n_axes:,} axes")
    shape = tuple(header.u64() for _ in range(n_axes))[::-1]
    number, offset = header.u32(), header.u64()
    if number not in TYPES:
        raise ValueError(f"tensor {shown(name)} is of type {number}, which is unknown")
    kind, elements, nbytes = TYPES[number]
    if min(shape) < 1 or shape[-1] % elements:
        raise ValueError(
            f"tensor {shown(name)} is {shown(list(shape))}, which blocks of {elements} {kind} "
            "cannot fill"
        )
    return Tensor(name, kind, shape, path, offset, math.prod(shape) // elements * nbytes)


def _placed(tensor: Tensor, first: int, alignment: int, file_nbytes: int) -> Tensor:
    """The tensor with its offset in the file."""
    name, offset = tensor.stored_name, first + tensor.offset
    if tensor.offset % alignment:
        raise ValueError(f"tensor {shown(name)} lies off the alignment of {alignment}")
    if offset + tensor.nbytes > file_nbytes:
        raise ValueError(
            f"tensor {shown(name)} would end at byte {offset + tensor.nbytes:,} of {file_nbytes:,}"
        )
    return Tensor(name, tensor.dtype, tensor.shape, tensor.path, offset, tensor.nbytes)


def _check_overlaps(tensors: Mapping[str, Tensor]) -> None:
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise ValueError(
                f"tensors {shown(before.stored_name)} and {shown(after.stored_name)} overlap"
            )
