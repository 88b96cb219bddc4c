"""Arrays in pickles: numpy's and torch's, as numpy arrays; and rows of actions as torch's tensors.

IS: what stands for the functions that numpy and torch name in a pickle, with every size checked
against the bytes that are there; the storage format of torch's plain pickles, both ways. IS NOT:
torch, nor numpy's own unpickling. Tensors in a plain pickle hold their storage as `torch.save`
wrote it before it wrote zip files: four small pickles, a count, and the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PayloadError
from flashrt.base.messages import printable, shown
from flashrt.policy_server.pickles import Global, read_pickle

Array = NDArray[Any]
MOST_TENSORS = 256  # of one payload
MOST_SIDES = 8  # dimensions of an array
_STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "ByteStorage": "|u1",
    "CharStorage": "|i1", "ShortStorage": "<i2", "IntStorage": "<i4", "LongStorage": "<i8",
    "BoolStorage": "|b1", "UntypedStorage": "|u1",
}  # fmt: skip
_KINDS = frozenset({
    "b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8",
})  # fmt: skip
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's files
_MOST_STORAGE_OPCODES = 256  # of each pickle in a storage; there are some thirty


class StoredDType:
    """numpy.dtype(code, False, True), whose state says the order of bytes."""

    def __init__(self, code: str) -> None:
        self._code, self._order = code, "|"

    def build(self, state: object) -> None:
        """numpy's (3, order of bytes, then what only other dtypes have)."""
        if not (isinstance(state, tuple) and len(state) == 8 and _is(state[0], 3)):
            raise PayloadError("a dtype with a state that is not known")
        order = state[1]
        is_order = isinstance(order, str) and order in ("<", ">", "|", "=")
        if not is_order or any(part is not None for part in state[2:5]):
            raise PayloadError("a dtype with fields, or an unknown order of bytes")
        self._order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy has it."""
        return np.dtype(self._code).newbyteorder(self._order)  # type: ignore[arg-type]


class StoredArray:
    """An array that numpy makes empty, whose state says everything."""

    def __init__(self) -> None:
        self._array: Array | None = None

    def build(self, state: object) -> None:
        """numpy's (1, shape, dtype, whether columns are first, bytes)."""
        if not (isinstance(state, tuple) and len(state) == 5 and _is(state[0], 1)):
            raise PayloadError("an array with a state that is not known")
        _, shape, dtype, is_fortran, data = state
        self._array = _viewed(data, dtype, shape, "F" if is_fortran is True else "C")

    @property
    def array(self) -> Array:
        """Read-only. Raises PayloadError where no state came."""
        if self._array is None:
            raise PayloadError("an array without its bytes")
        return self._array


class _Storage:
    """Numbers of a tensor's storage."""

    def __init__(self, values: Array) -> None:
        self.values = values


class _OrderedDict:
    """collections.OrderedDict() where hooks of a tensor would be."""


def array_globals() -> Callable[[str, str], Global | None]:
    """What arrays and tensors are made by in one payload."""
    n_tensors = 0

    def load(arguments: tuple[Any, ...]) -> object:
        nonlocal n_tensors
        n_tensors += 1
        if n_tensors > MOST_TENSORS:
            raise PayloadError(f"more than {MOST_TENSORS} tensors")
        return _load_from_bytes(arguments)

    shells = Global("numpy.ndarray")
    known = {
        ("numpy", "dtype"): Global("numpy.dtype", _dtype),
        ("numpy", "ndarray"): shells,
        ("torch._utils", "_rebuild_tensor_v2"): Global("a tensor", _rebuild_tensor),
        ("torch.storage", "_load_from_bytes"): Global("a storage", load),
        ("collections", "OrderedDict"): Global("OrderedDict", _ordered_dict),
    }
    for core in ("numpy._core", "numpy.core"):  # of numpy 2 and 1
        known[f"{core}.multiarray", "_reconstruct"] = Global("an array", _reconstruct(shells))
        known[f"{core}.multiarray", "scalar"] = Global("a number", _scalar)
        known[f"{core}.numeric", "_frombuffer"] = Global("an array", _frombuffer)
    return lambda module, name: known.get((module, name))


def as_array(value: object) -> Array | None:
    """The array that a value of a payload is, if it is one: a tensor's too."""
    if isinstance(value, StoredArray):
        return value.array
    return value if isinstance(value, np.ndarray) else None


def _is(value: object, plain: str | int) -> bool:
    """Whether it is that: an array would compare each of its numbers."""
    return type(value) is type(plain) and value == plain


# -- numpy's functions -----------------------------------------------------------------------------


def _dtype(arguments: tuple[Any, ...]) -> StoredDType:
    code = arguments[0] if arguments else None
    is_usual = len(arguments) == 3 and arguments[1] is False and arguments[2] is True
    if not is_usual or not isinstance(code, str) or code not in _KINDS:
        raise PayloadError(f"numpy.dtype{shown(arguments)}: known are {', '.join(sorted(_KINDS))}")
    return StoredDType(code)


def _reconstruct(shells: Global) -> Callable[[tuple[Any, ...]], StoredArray]:
    def call(arguments: tuple[Any, ...]) -> StoredArray:
        if len(arguments) != 3 or arguments[0] is not shells:
            raise PayloadError("an array of another class than numpy.ndarray")
        return StoredArray()

    return call


def _scalar(arguments: tuple[Any, ...]) -> bool | int | float:
    if len(arguments) != 2:
        raise PayloadError("a number of numpy that is not whole")
    value = _viewed(arguments[1], arguments[0], (), "C").item()
    assert isinstance(value, bool | int | float)
    return value


def _frombuffer(arguments: tuple[Any, ...]) -> Array:
    if len(arguments) != 4 or not (_is(arguments[3], "C") or _is(arguments[3], "F")):
        raise PayloadError("an array from a buffer that is not whole")
    data, dtype, shape, order = arguments
    return _viewed(data, dtype, shape, order)


def _viewed(data: object, dtype: object, shape: object, order: Any) -> Array:
    if not isinstance(data, memoryview) or not isinstance(dtype, StoredDType):
        raise PayloadError(f"an array of {type(dtype).__name__} in {type(data).__name__}")
    kind = dtype.dtype
    size = _size(shape)
    if size * kind.itemsize != len(data):
        raise PayloadError(f"an array {shown(shape)} of {kind} in {len(data):,} bytes")
    return np.frombuffer(data, kind).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]


def _size(shape: object) -> int:
    """Numbers of an array. Raises PayloadError for what is no shape."""
    if isinstance(shape, tuple) and len(shape) <= MOST_SIDES:
        sides = [n for n in shape if type(n) is int and 0 <= n < 1 << 40]
        if len(sides) == len(shape):
            return math.prod(sides)
    raise PayloadError(f"an array whose shape is {shown(shape)}")


# -- torch's ---------------------------------------------------------------------------------------


def _ordered_dict(arguments: tuple[Any, ...]) -> _OrderedDict:
    if arguments:
        raise PayloadError("an OrderedDict that is not empty")
    return _OrderedDict()


def _rebuild_tensor(arguments: tuple[Any, ...]) -> Array:
    """Of (storage, offset, shape, strides, whether it has gradients, hooks)."""
    if not (len(arguments) in (6, 7) and isinstance(arguments[0], _Storage)):
        raise PayloadError("a tensor without its storage")
    values, offset, shape, strides = arguments[0].values, *arguments[1:4]
    size = _size(shape)
    _size(strides)
    if len(strides) != len(shape) or type(offset) is not int or offset < 0:
        raise PayloadError(f"a tensor {shown(shape)} with strides {shown(strides)}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and last >= len(values):
        raise PayloadError(f"a tensor that ends at {last:,} of {len(values):,} numbers")
    if size > len(values):  # some number would be seen twice: small bytes, a large array
        raise PayloadError(f"a tensor of {size:,} numbers in {len(values):,}")
    steps = tuple(stride * values.itemsize for stride in strides)
    whole = values[offset:] if size else values[:0]
    return np.lib.stride_tricks.as_strided(whole, shape, steps, writeable=False)


def _load_from_bytes(arguments: tuple[Any, ...]) -> _Storage:
    if len(arguments) != 1 or not isinstance(arguments[0], memoryview):
        raise PayloadError("a storage that is not bytes")
    data = arguments[0]
    if bytes(data[:2]) == b"PK":
        raise PayloadError("a storage in a zip file; tensors of plain pickles are not")
    at, found = 0, []
    for _ in range(3):
        value, at = _part(data, at)
        found.append(value)
    if found[:2] != [_MAGIC, _PROTOCOL]:
        raise PayloadError("a storage that is not torch's")
    if not isinstance(found[2], dict) or found[2].get("little_endian") is not True:
        raise PayloadError("a storage whose bytes are in another order")
    kept: list[tuple[str, str, int]] = []

    def stored(about: object) -> object:
        """What is known of the storage: its class, its key, its count."""
        if not (isinstance(about, tuple) and len(about) == 6 and _is(about[0], "storage")):
            raise PayloadError("a storage that is not known")
        _, kind, key, _, count, view = about
        is_known = isinstance(kind, Global) and isinstance(key, str) and type(count) is int
        if not is_known or view is not None or count < 0:
            raise PayloadError("a storage that is not known")
        kept.append((kind.name, key, count))
        return kept[-1]

    about, at = _part(data, at, stored)
    keys, at = _part(data, at)
    if len(kept) != 1 or about is not kept[0] or keys != [kept[0][1]]:
        raise PayloadError("a storage in several pieces")
    name, _, count = kept[0]
    dtype = np.dtype(_STORAGES[name])
    rest = data[at:]
    if len(rest) != 8 + count * dtype.itemsize or int.from_bytes(rest[:8], "little") != count:
        raise PayloadError(f"a {name} of {count:,} numbers in {len(rest):,} bytes")
    return _Storage(np.frombuffer(rest[8:], dtype))


def _part(
    data: memoryview, at: int, stored: Callable[[object], object] | None = None
) -> tuple[object, int]:
    """One of a storage's pickles."""
    try:
        return read_pickle(
            data, _storage_global, start=at, stored=stored, most_opcodes=_MOST_STORAGE_OPCODES
        )
    except PayloadError as error:
        raise PayloadError(f"in a storage: {error}") from error


def _storage_global(module: str, name: str) -> Global | None:
    is_known = module in ("torch", "torch.storage") and name in _STORAGES
    return Global(printable(name)) if is_known else None


def storage_bytes(values: NDArray[np.float32]) -> bytes:
    """float32 numbers as torch reads a storage in a plain pickle."""
    key = b"X\x01\x00\x00\x000"  # the text "0"
    count = b"J" + struct.pack("<i", values.size)
    return b"".join((
        b"\x80\x02\x8a\x0a", _MAGIC.to_bytes(10, "little"), b".",
        b"\x80\x02M", _PROTOCOL.to_bytes(2, "little"), b".",
        b"\x80\x02}(", _word("protocol_version"), b"M", _PROTOCOL.to_bytes(2, "little"),
        _word("little_endian"), b"\x88", _word("type_sizes"), b"}(",
        _word("short"), b"K\x02", _word("int"), b"K\x04", _word("long"), b"K\x04uu.",
        b"\x80\x02(", _word("storage"), b"ctorch\nFloatStorage\n", key, _word("cpu"), count,
        b"NtQ.",
        b"\x80\x02]", key, b"a.",
        struct.pack("<q", values.size), values.astype("<f4").tobytes(),
    ))  # fmt: skip


def _word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()
