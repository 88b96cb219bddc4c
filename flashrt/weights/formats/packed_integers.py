"""Integers of 4 or 8 bits, packed in 32-bit words: GPTQ, AWQ, compressed-tensors' pack-quantized.

IS: where each code, scale and zero point of [o, i] lies, with value = (q - zero) scale; the three
orders differ in that alone. IS NOT: other numbers of bits, nor columns in the order of activations
(g_idx is not i // size): both are refused. GPTQ and AWQ store columns, so all of such a matrix is
read with row 0 and kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.core.groups import Groups, Planes
from flashrt.core.region import DType
from flashrt.weights.formats.coded import (
    FETCH_AGAIN,
    FLOATS,
    OTHER_CHECKPOINT,
    CodedMatrix,
    Floats,
    Ints,
    Kept,
    Parts,
    Spread,
    need_shape,
    nibbles,
    planes,
    read_floats,
    refused,
    scales_kind,
    spread_of,
)
from flashrt.weights.formats.quantisation import WHOLE, Scheme
from flashrt.weights.formats.stored import Reader, Tensor, read_array

# pack-quantized  weight_packed [o, i bits/32], weight_scale [o, groups], weight_zero_point packed
#                 along o; the lowest bits of a word are its first value
# GPTQ            qweight [i bits/32, o], scales [groups, o], qzeros [groups, o bits/32], g_idx [i];
#                 version 1 stores zero points less one
# AWQ (gemm)      qweight [i, o/8], scales [groups, o], qzeros [groups, o/8]; the eight columns of a
#                 word lie in the order 0 2 4 6 1 3 5 7
_WORD = ("I32",)
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of a word that each of its eight columns lies in
Words = NDArray[np.generic]  # int32


def pack_quantized(parts: Parts, scheme: Scheme) -> CodedMatrix:
    """compressed-tensors: rows of words."""
    packed = parts.need("weight_packed", _WORD, 2)
    scale = parts.need("weight_scale", tuple(FLOATS))
    extent = parts.need("weight_shape", ("I64", "I32"), 1)
    need_shape(extent, (2,), "the sizes of the matrix")
    bits = _bits(packed, scheme)
    rows, columns = packed.shape[0], packed.shape[1] * 32 // bits
    size, n_groups = columns, 1
    if scheme.size is not None and scheme.size != WHOLE:
        size, n_groups = scheme.size, math.ceil(columns / scheme.size)
    is_single = n_groups == 1 and math.prod(scale.shape) in (1, rows)
    if not is_single:
        need_shape(scale, (rows, n_groups), f"a scale per row and {size} columns")
    zero = parts.tensors.get("weight_zero_point")
    if zero is None and scheme.is_symmetric is not True:
        raise refused(packed, "has no weight_zero_point, though it is not symmetric", FETCH_AGAIN)
    if zero is not None:
        parts.need("weight_zero_point", _WORD, 2)
        wanted = (math.ceil(rows * bits / 32), n_groups)
        need_shape(zero, wanted, f"{rows} x {n_groups} zero points of {bits} bits")
    order = parts.tensors.get("weight_g_idx")
    if order is not None:
        parts.need("weight_g_idx", _WORD, 1)
        need_shape(order, (columns,), "a group per column")
    stored = _Stored(packed, scale, zero, order, extent, scheme, bits, (rows, columns), size)
    return stored.matrix(_RowWords(stored), f"int{bits}, compressed-tensors")


def gptq(parts: Parts, scheme: Scheme) -> CodedMatrix:
    """GPTQ: words of columns; the codes of a column lie one after another."""
    packed = parts.need("qweight", _WORD, 2)
    bits = _bits(packed, scheme)
    rows, columns = packed.shape[1], packed.shape[0] * 32 // bits
    stored = _with_columns(parts, scheme, bits, rows, columns)
    return stored.matrix(_ColumnWords(stored), f"int{bits}, GPTQ")


def awq(parts: Parts, scheme: Scheme) -> CodedMatrix:
    """AWQ as AutoAWQ's gemm stores it: words of eight columns."""
    packed = parts.need("qweight", _WORD, 2)
    stored = _with_columns(parts, scheme, 4, 8 * packed.shape[1], packed.shape[0])
    return stored.matrix(_AwqWords(stored), "int4, AWQ")


def _bits(packed: Tensor, scheme: Scheme) -> int:
    if scheme.bits not in (4, 8) or scheme.is_float:
        words = f"{shown_bits(scheme)} in the configuration, and is packed as integers"
        raise refused(packed, f"has {words}; 4 or 8 bits are read", OTHER_CHECKPOINT)
    return scheme.bits


def shown_bits(scheme: Scheme) -> str:
    """The number of bits and the kind of codes that a configuration names."""
    kind = "float" if scheme.is_float else "integer"
    return f"{kind}s of {scheme.bits or 'unknown'} bits"


def _with_columns(parts: Parts, scheme: Scheme, bits: int, rows: int, columns: int) -> _Stored:
    """What GPTQ and AWQ have beside `qweight`."""
    scale = parts.need("scales", tuple(FLOATS), 2)
    size = columns if scheme.size in (None, WHOLE) else scheme.size or columns
    n_groups = math.ceil(columns / size)
    need_shape(scale, (n_groups, rows), f"a scale per {size} of {columns} inputs, {rows} outputs")
    zero = parts.tensors.get("qzeros")
    if zero is None and scheme.is_symmetric is False:
        raise refused(parts.tensors["qweight"], "has no qzeros beside it", FETCH_AGAIN)
    if zero is not None:
        parts.need("qzeros", _WORD, 2)
        need_shape(zero, (n_groups, math.ceil(rows * bits / 32)), "a zero point per scale")
    order = parts.tensors.get("g_idx")
    if order is not None:
        parts.need("g_idx", _WORD, 1)
        need_shape(order, (columns,), "a group per input")
    packed = parts.tensors["qweight"]
    return _Stored(packed, scale, zero, order, None, scheme, bits, (rows, columns), size)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors of a matrix [o, i] and what is common to the three orders."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None  # the group of each column
    extent: Tensor | None  # the sizes, stated once more
    scheme: Scheme
    bits: int
    shape: tuple[int, int]
    size: int

    @property
    def has_min(self) -> bool:
        """Whether zero points differ, so that kernels must be given them."""
        return self.zero is not None and self.scheme.is_symmetric is not True

    @property
    def spread(self) -> Spread:
        """Groups here for groups there."""
        return spread_of(self.scale, self.size, self.shape[1])

    @property
    def n_groups(self) -> int:
        """Groups in a row, as stored."""
        return math.ceil(self.shape[1] / self.size)

    @property
    def groups(self) -> Groups:
        """As kernels know them."""
        return Groups(self.spread.size, scales_kind(self.scale, has_min=self.has_min))

    def matrix(self, rows: _RowWords | _ColumnWords | _AwqWords, what: str) -> CodedMatrix:
        """The StoredMatrix that reads by `rows`."""
        optional = (self.zero, self.order, self.extent)
        size = "row" if self.size >= self.shape[1] else f"{self.size} columns"
        zeros = ", with zero points" if self.has_min else ""
        return CodedMatrix(
            self.shape,
            DType.U4 if self.bits == 4 else DType.I8,
            self.groups,
            (self.packed, self.scale, *(t for t in optional if t is not None)),
            f"{what}, a scale per {size}{zeros}",
            rows.__call__,
        )

    def planes(self, codes: NDArray[np.uint8], scales: Floats, zeros: Ints | None) -> Planes:
        """Planes of unsigned codes and zero points; int8 codes are less 128, as are their zeros."""
        if self.bits == 8:
            codes_here: NDArray[np.generic] = (codes ^ 0x80).view(np.int8)
            zeros = None if zeros is None else zeros - 128
        else:
            codes_here = codes
        return planes(codes_here, scales, zeros, self.groups, self.spread, self.scale)

    def zeros(self, stored: NDArray[np.uint8]) -> Ints | None:
        """Zero points as numbers, or None where all are half the range and said to be."""
        assert self.zero is not None
        most = (1 << self.bits) - 1
        offset = self.scheme.zero_offset
        if not self.has_min:
            if (stored != (most + 1) // 2 - offset).any():
                what = "is not half the range throughout, though weights are symmetric"
                raise refused(self.zero, what, OTHER_CHECKPOINT)
            return None
        if offset and (stored == most).any():
            # version 1: libraries differ on whether that is zero, or the whole range
            raise refused(
                self.zero, f"holds {most}, which libraries read in two ways", OTHER_CHECKPOINT
            )
        return stored.astype(np.int64) + offset

    def check(self, reader: Reader) -> None:
        """Refuses columns out of order, and sizes that are stated otherwise."""
        if self.order is not None:
            order = read_array(reader, self.order, 0, self.order.shape, np.int32)
            is_unset = bool((order == -1).all())
            if not is_unset and (order != np.arange(self.shape[1]) // self.size).any():
                raise refused(
                    self.order,
                    "has columns in the order of activations (desc_act, actorder), which is not "
                    "read",
                    OTHER_CHECKPOINT,
                )
        if self.extent is not None:
            dtype = np.int64 if self.extent.dtype == "I64" else np.int32
            extent = tuple(int(n) for n in read_array(reader, self.extent, 0, (2,), dtype))
            if extent != self.shape:
                what = f"says {list(extent)}, and the packed words hold {list(self.shape)}"
                raise refused(self.extent, what, FETCH_AGAIN)


def _values(words: Words, bits: int) -> NDArray[np.uint8]:
    """Codes along the last axis, the lowest bits of a word first."""
    words = np.ascontiguousarray(words)
    return nibbles(words) if bits == 4 else words.view(np.uint8)


class _RowWords:
    """Rows as compressed-tensors packs them."""

    def __init__(self, stored: _Stored) -> None:
        self.stored = stored
        self.kept = Kept(stored.shape[0], self._zeros)

    def __call__(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        s = self.stored
        scale, zeros = self.kept.at(first_row, n_rows, reader)
        width = s.packed.shape[1]
        words = read_array(reader, s.packed, 4 * first_row * width, (n_rows, width), np.int32)
        part = slice(first_row, first_row + n_rows)
        here = None if zeros is None else zeros[part]
        return s.planes(_values(words, s.bits), scale[part], here)

    def _zeros(self, reader: Reader) -> tuple[Floats, Ints | None]:
        s = self.stored
        s.check(reader)
        rows, n_groups = s.shape[0], s.n_groups
        scale = read_floats(reader, s.scale).reshape(-1, n_groups)
        scale = np.broadcast_to(scale, (rows, n_groups))
        if s.zero is None:
            return scale, None
        words = read_array(reader, s.zero, 0, s.zero.shape, np.int32)
        return scale, s.zeros(np.ascontiguousarray(_values(words.T, s.bits)[:, :rows].T))


class _ColumnWords:
    """GPTQ: a word holds codes of one row, and the next word belongs to the next row."""

    def __init__(self, stored: _Stored) -> None:
        self.stored = stored
        self.kept = Kept(stored.shape[0], self._load)

    def __call__(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        s = self.stored
        words, scale, zeros = self.kept.at(first_row, n_rows, reader)
        part = slice(first_row, first_row + n_rows)
        here = None if zeros is None else zeros[part]
        return s.planes(self.codes(words, first_row, n_rows), scale[part], here)

    def codes(self, words: Words, first_row: int, n_rows: int) -> NDArray[np.uint8]:
        """Codes of rows."""
        return _values(words[:, first_row : first_row + n_rows].T, self.stored.bits)

    def zero_points(self, words: Words) -> NDArray[np.uint8]:
        """Zero points [groups, o]."""
        return _values(words, self.stored.bits)[:, : self.stored.shape[0]]

    def _load(self, reader: Reader) -> tuple[Words, Floats, Ints | None]:
        s = self.stored
        s.check(reader)
        words = read_array(reader, s.packed, 0, s.packed.shape, np.int32)
        scale = np.ascontiguousarray(read_floats(reader, s.scale).T)
        if s.zero is None:
            return words, scale, None
        zeros = self.zero_points(read_array(reader, s.zero, 0, s.zero.shape, np.int32))
        return words, scale, s.zeros(np.ascontiguousarray(zeros.T))


class _AwqWords(_ColumnWords):
    """AWQ: a word holds codes of eight rows, for one input."""

    def codes(self, words: Words, first_row: int, n_rows: int) -> NDArray[np.uint8]:
        """Codes of rows."""
        first, last = first_row // 8, math.ceil((first_row + n_rows) / 8)
        values = self.zero_points(words[:, first:last])
        cut = values[:, first_row - 8 * first :][:, :n_rows]
        return np.ascontiguousarray(cut.T)

    def zero_points(self, words: Words) -> NDArray[np.uint8]:
        """Values of words in the order of their rows."""
        values = nibbles(np.ascontiguousarray(words))
        return values.reshape(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(len(words), -1)
