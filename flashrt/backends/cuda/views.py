"""Views of device memory without copies: CUDA array interface, DLPack, and numpy where it can.

IS: a region in its storage order, offered to other libraries (cupy, torch, jax, numba, numpy).
IS NOT: synchronised; call `sync` on the device before reading what it wrote. A view is valid until
its device is closed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import BackendError
from flashrt.core.region import ActDTypes, DType, Layout, Region, resolve_dtype

CPU, CUDA = 1, 2  # DLDeviceType
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4  # DLDataTypeCode
_DLPACK: Final = {
    DType.F32: (_FLOAT, 32), DType.BF16: (_BFLOAT, 16), DType.BF16X2: (_UINT, 32),
    DType.I32: (_INT, 32), DType.U32: (_UINT, 32), DType.U8: (_UINT, 8), DType.F16: (_FLOAT, 16),
    DType.I8: (_INT, 8),
}  # fmt: skip
# numpy has no bfloat16: its bits as uint16; a pair hi + lo as uint32
_NUMPY: Final = {
    DType.F32: "<f4", DType.BF16: "<u2", DType.BF16X2: "<u4", DType.I32: "<i4",
    DType.U32: "<u4", DType.U8: "|u1", DType.F16: "<f2", DType.I8: "|i1",
}  # fmt: skip


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Synchronised(Protocol):
    """What a view needs of its device."""

    def sync(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-ordered array in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: DType
    device: tuple[int, int]  # CPU (simt) or CUDA, and its ordinal
    stream: int
    owner: Synchronised  # kept alive by the view

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; consumers wait for `stream`. Raises AttributeError for host memory."""
        if self.device[0] != CUDA:
            raise AttributeError("memory of the simt device is host memory: use numpy()")
        return {
            "shape": self.shape,
            "typestr": _NUMPY[self.dtype],
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """A capsule, after a synchronisation: whatever `stream` the consumer uses may read."""
        del stream
        self.owner.sync()
        return _capsule(self)

    def numpy(self) -> NDArray[np.generic]:
        """The memory itself as an array; bfloat16 as uint16 bits. Raises BackendError on a GPU."""
        if self.device[0] != CPU:
            raise BackendError("numpy cannot see device memory: use DLPack, or Backend.read")
        self.owner.sync()
        nbytes = int(np.prod(self.shape)) * self.dtype.nbytes
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        return raw.view(_NUMPY[self.dtype]).reshape(self.shape)


def view(
    region: Region, address: int, acts: ActDTypes, device: tuple[int, int], stream: int,
    owner: Synchronised,
) -> DeviceArray:  # fmt: skip
    """The array of a region at an address. Raises BackendError for a layout that is not C order."""
    if region.layout is Layout.MATRIX:
        raise BackendError(
            f"region {region.name!r} is stored as tensor-core operands: read and unpack it instead"
        )
    dtype = resolve_dtype(region.dtype, acts)
    return DeviceArray(address, region.shape, dtype, device, stream, owner)


def _delete(managed: Any) -> None:
    """The consumer is done: give back the reference that keeps struct and view alive."""
    kept = ctypes.cast(managed.contents.context, ctypes.py_object)
    ctypes.pythonapi.Py_DecRef(kept)


def _delete_unused(capsule: Any) -> None:
    """A capsule that nobody consumed (consumers rename it) still holds its reference."""
    if _is_valid(capsule, b"dltensor"):
        pointer = ctypes.cast(_pointer(capsule, b"dltensor"), ctypes.POINTER(_DLManagedTensor))
        _delete(pointer)


_DELETE = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))(_delete)
_DELETE_UNUSED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete_unused)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


def _capsule(array: DeviceArray) -> object:
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    managed = _DLManagedTensor()
    tensor = managed.tensor
    tensor.data, (tensor.device_type, tensor.device_id) = array.address, array.device
    tensor.ndim, tensor.lanes = len(array.shape), 1
    tensor.code, tensor.bits = _DLPACK[array.dtype]
    tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    kept = (managed, shape, array)  # what the capsule's reference keeps alive, until _delete
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    managed.context = id(kept)
    managed.deleter = ctypes.cast(_DELETE, ctypes.c_void_p)
    return _new_capsule(
        ctypes.addressof(managed), b"dltensor", ctypes.cast(_DELETE_UNUSED, ctypes.c_void_p)
    )
