"""Runs one launch on a backend: numpy arrays in, numpy arrays out, poison everywhere else.

IS: regions, addresses and packing for a single launch, the way the arena does it for a whole tape.
IS NOT: a judge: comparing is up to the tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.core.backend import Backend, BoundLaunch
from flashrt.core.op import Launch, Param, bind
from flashrt.core.region import DType, Layout, Region, Role, View, resolve_dtype
from flashrt.ops.table import OPS

ARENA_BYTES = 48 << 20
ALIGNMENT = 256
POISON = 0xFF  # NaN in every float format
Array = NDArray[Any]
_OPS = {op.name: op for op in OPS}
_NUMPY = {
    DType.F32: np.float32, DType.I32: np.int32, DType.U32: np.uint32,
    DType.I8: np.int8, DType.E4M3: np.uint8,
    DType.BF16X2: np.float32,  # the backend splits what it is given, and adds up what it gives
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: arrays by param name, attributes, dtypes where the op leaves a choice.

    An operand that the op only writes is given as its shape; it starts as poison. `margin` columns
    of poison surround the operands that may be windows of a wider region.
    """

    op: str
    operands: Mapping[str, Array | tuple[int, ...]]
    attrs: Mapping[str, int | float] = field(default_factory=dict)
    dtypes: Mapping[str, DType] = field(default_factory=dict)
    margin: tuple[int, int] = (0, 0)
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.op

    def but(self, **operands: Array | tuple[int, ...]) -> Case:
        """The same case with other operands."""
        return replace(self, operands={**self.operands, **operands})


def rng_for(*words: object) -> np.random.Generator:
    """A generator seeded by words, the same in every process."""
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def bf16_bits(x: Array) -> NDArray[np.uint16]:
    """float32 -> bfloat16 bits, to nearest even."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(bits: Array) -> NDArray[np.float32]:
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


class Runner:
    """A backend with one small arena, reused by every launch."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        backend.build(OPS)
        self.memory = backend.allocate("arena", ARENA_BYTES)

    def run(
        self, case: Case, *, is_captured: bool = False, poison: int = POISON
    ) -> dict[str, Array]:
        """All operands after the launch, as logical arrays; bfloat16 widened to float32.

        `poison` is the byte that lies wherever the case writes nothing.
        """
        views, attrs = self._views(case), dict(case.attrs)
        launch = bind(_OPS[case.op], views, attrs)
        offsets, used = self._offsets(views)
        self.backend.fill(self.memory.address, used, poison)
        for name, array in case.operands.items():
            if isinstance(array, np.ndarray):
                self._write(views[name], offsets[name], array, case.margin)
        bound = BoundLaunch(launch, self._addresses(launch, offsets))
        if is_captured:
            self.backend.replay(self.backend.capture([bound]))
        else:
            self.backend.eager([bound])
        self.backend.sync()
        return {name: self._read(view, offsets[name]) for name, view in views.items()}

    def stored(self, case: Case) -> dict[str, Array]:
        """The arrays of a case as the backend holds them: rounded where it stores less."""
        views = self._views(case)
        return {
            name: self._rounded(views[name].region, array)
            for name, array in case.operands.items()
            if isinstance(array, np.ndarray)
        }

    def dtype(self, case: Case, name: str) -> DType:
        """How the backend stores an operand of a case."""
        return self._dtype(self._views(case)[name].region)

    def poison(self, case: Case) -> dict[str, Array]:
        """What `run` returns for operands that nothing has written: all bits set."""
        return {name: self._seen(v, self._all_ones(v)) for name, v in self._views(case).items()}

    def _views(self, case: Case) -> dict[str, View]:
        return {p.name: self._view(p, case) for p in _OPS[case.op].params}

    def _view(self, param: Param, case: Case) -> View:
        array = case.operands[param.name]
        shape = array.shape if isinstance(array, np.ndarray) else array
        dtype = case.dtypes.get(param.name, param.dtypes[0])
        role = (
            Role.ROWS if param.layout in (Layout.ROWS_IN_LANES, Layout.COLS_IN_LANES) else Role.IO
        )
        if not param.is_strided:
            return Region(param.name, shape, dtype, role, param.layout).view()
        left, right = case.margin
        wide = Region(
            param.name, (*shape[:-1], left + shape[-1] + right), dtype, role, param.layout
        )
        return wide.view().cols(left, left + shape[-1])

    def _offsets(self, views: Mapping[str, View]) -> tuple[dict[str, int], int]:
        offsets, at = {}, 0
        for name, view in views.items():
            offsets[name] = at
            at += -(-self.backend.storage(view.region).nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        if at > self.memory.nbytes:
            raise MemoryError(f"the case needs {at} bytes of {self.memory.nbytes}")
        return offsets, at

    def _addresses(self, launch: Launch, offsets: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(
            self.memory.address + offsets[p.name] + v.col * self._dtype(v.region).bits // 8
            for p, v in zip(launch.op.params, launch.operands, strict=True)
        )

    def _dtype(self, region: Region) -> DType:
        return resolve_dtype(region.dtype, self.backend.acts)

    def _write(self, view: View, offset: int, array: Array, margin: tuple[int, int]) -> None:
        region = view.region
        whole = array
        if array.shape != region.shape:  # a window of a wider region: NaN beside it
            whole = np.full(region.shape, np.nan, np.float32)
            whole[..., view.col : view.col + view.shape[-1]] = array
        raw = np.full(self.backend.storage(region).nbytes, POISON, np.uint8)
        self.backend.pack(region, self._encode(region, whole), raw)
        self.backend.write(self.memory.address + offset, raw)

    def _read(self, view: View, offset: int) -> Array:
        raw = np.empty(self.backend.storage(view.region).nbytes, np.uint8)
        self.backend.read(self.memory.address + offset, raw)
        return self._seen(view, raw)

    def _seen(self, view: View, raw: NDArray[np.uint8]) -> Array:
        """What a view shows of a region's bytes."""
        array = self._decode(view.region, raw)
        return (
            array if array.shape == view.shape else array[..., view.col : view.col + view.shape[-1]]
        )

    def _all_ones(self, view: View) -> NDArray[np.uint8]:
        return np.full(self.backend.storage(view.region).nbytes, POISON, np.uint8)

    def _rounded(self, region: Region, array: Array) -> Array:
        """An array of any shape, through the dtype of a region and back."""
        flat = Region(region.name, array.shape, region.dtype, Role.IO)
        raw = np.empty(self.backend.storage(flat).nbytes, np.uint8)
        self.backend.pack(flat, self._encode(flat, array), raw)
        return self._decode(flat, raw)

    def _encode(self, region: Region, array: Array) -> Array:
        dtype = self._dtype(region)
        if dtype is DType.BF16:
            return bf16_bits(array)
        return np.ascontiguousarray(array, _NUMPY[dtype])

    def _decode(self, region: Region, raw: NDArray[np.uint8]) -> Array:
        array = self.backend.unpack(region, raw)
        return from_bf16(array) if self._dtype(region) is DType.BF16 else array
