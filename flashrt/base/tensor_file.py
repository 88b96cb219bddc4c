"""The container of safetensors: a JSON header, then the bytes of tensors.

IS: the header read and checked against the size of its file, and a file written in that layout. IS
NOT: what tensors mean, or their checksums. It exists because the safetensors library maps files (a
bad sector, or a file cut meanwhile, kills the process), and renames a file of its own into place.

    u64 length of the header | header | tensors, one after another without gap
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.files import read_exactly
from flashrt.base.messages import listed, shown

METADATA = "__metadata__"
MOST_HEADER_NBYTES = 100_000_000  # as the safetensors library has it
_MOST_SIZES = 32  # of a shape
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_CODES = {"uint8": "U8", "float32": "F32", "int64": "I64"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Bytes [offset, offset + nbytes) of the file; `dtype` is safetensors' code, e.g. BF16."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorTable:
    """A header; its tensors tile the rest of the file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_table(handle: int, nbytes: int, most_header_nbytes: int) -> TensorTable:
    """The header of an open file of `nbytes`; one that is too long is not read. Raises OSError, or
    ValueError that says what is wrong.
    """
    if nbytes < 8:
        raise ValueError(f"{nbytes} bytes are no header")
    length = int.from_bytes(read_exactly(handle, 8).tobytes(), "little")
    if not 2 <= length <= min(nbytes - 8, most_header_nbytes):
        raise ValueError(f"a header of {length:,} bytes in a file of {nbytes:,}")
    header = parse_json(read_exactly(handle, length, 8).tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"its {METADATA} is no object of texts")
    first = 8 + length
    tensors = {name: _tensor(name, entry, first) for name, entry in header.items()}
    spans = sorted((t.offset, t.offset + t.nbytes) for t in tensors.values())
    ends = [first, *(stop for _, stop in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != nbytes:
        raise ValueError("its tensors do not tile the file")
    return TensorTable(metadata, tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """A file of tensors, uint8, float32 or int64, in place of what `path` has. Raises OSError."""
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in tensors}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so all are aligned
    header: dict[str, Any] = {METADATA: dict(metadata)}
    at = 0
    for name in order:
        a = arrays[name]
        offsets = [at, at + a.nbytes]
        header[name] = {"dtype": _CODES[a.dtype.name], "shape": a.shape, "data_offsets": offsets}
        at += a.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(arrays[name].reshape(-1).view(np.uint8).data)


def parse_json(data: bytes | str) -> object:
    """A JSON value. Raises ValueError; also for a key that occurs twice, and for deep nesting."""
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("objects or lists are nested too deeply") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{listed([n for n in made if counts[n] > 1])} occurs twice")
    return made


def _tensor(name: str, entry: Any, first: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} has no dtype, shape and data_offsets, or more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {shown(name)} is of dtype {shown(dtype)}, which is unknown")
    is_listed = isinstance(shape, list) and isinstance(offsets, list)
    if not is_listed or len(shape) > _MOST_SIZES or len(offsets) != 2:
        raise ValueError(f"tensor {shown(name)} has no list of sizes, or of two offsets")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets)):
        raise ValueError(f"tensor {shown(name)} has sizes or offsets that are not counts")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"tensor {shown(name)} of {shown(shape)} has {stop - start:,} bytes")
    return StoredTensor(dtype, tuple(shape), first + start, stop - start)
