"""Blocks of ggml: rows of blocks, each of codes with their scales, as GGUF files hold matrices.

IS: each block type that becomes planes without loss, and a StoredMatrix of such blocks. What the
planes dequantise to equals ggml's own result to the bit. IS NOT: GGUF files (gguf.file).

Unpacking works on words of 8 bytes and copies whole runs of codes: numpy's loops over short inner
axes would take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.weights.formats.stored import Bytes, Reader, Rows, Tensor, read_rows

_Words = NDArray[np.uint64]
_Fields = NDArray[np.void]  # blocks, one a record
_Unpacked = tuple[NDArray[np.generic], ...]  # codes, then planes, a row a block

_NIBBLE, _PAIR, _BIT = (np.uint64(int(f"{n:02x}" * 8, 16)) for n in (0x0F, 0x03, 0x01))
_FOUR = np.uint64(4)
# What the 4 bits of the IQ4 types stand for.
_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a block of `elements` codes is laid out, and what it becomes."""

    layout: np.dtype[np.void]
    elements: int
    dtype: DType
    groups: Groups
    unpack: Callable[[_Fields], _Unpacked]

    def planes(self, blocks: Bytes, n_rows: int) -> Planes:
        """Rows from the bytes of their blocks, row by row."""
        codes, *scales = self.unpack(blocks.view(self.layout))
        return Planes(codes.reshape(n_rows, -1), tuple(p.reshape(n_rows, -1) for p in scales))


def _words(field: NDArray[Any]) -> _Words:
    """The bytes of a field, a row a block."""
    return np.ascontiguousarray(field).view(np.uint64).reshape(len(field), -1)


def _side_by_side(parts: Sequence[_Words]) -> Bytes:
    """For each row, the bytes of the first part, then those of the second, ..."""
    n, width = len(parts[0]), parts[0].shape[1] * 8
    run = np.dtype((np.void, width))
    out = np.empty((n, len(parts)), run)
    for i, part in enumerate(parts):
        out[:, i] = part.view(run)[:, 0]
    return out.view(np.uint8)


def _nibbles(words: _Words) -> Bytes:
    """For each row, its low halves of bytes, then its high ones."""
    return _side_by_side([words & _NIBBLE, (words >> _FOUR) & _NIBBLE])


def _pairs(words: _Words) -> Bytes:
    """For each row, its lowest two bits of each byte, then the next two, ..."""
    return _side_by_side([(words >> np.uint64(2 * i)) & _PAIR for i in range(4)])


def _bits(words: _Words) -> Bytes:
    """For each row, its lowest bit of each byte, then the next one, ..."""
    return _side_by_side([(words >> np.uint64(i)) & _BIT for i in range(8)])


def _with_high(codes: Bytes, high: Bytes) -> Bytes:
    """Codes with the bits above their lowest four."""
    flat, above = codes.reshape(-1), high.reshape(-1)
    above <<= 4
    flat |= above
    return flat


def _fifth_bits(qh: NDArray[Any]) -> Bytes:
    return np.unpackbits(np.ascontiguousarray(qh).view(np.uint8), bitorder="little")


def _q4_0(b: _Fields) -> _Unpacked:
    return _nibbles(_words(b["q"])), b["d"].copy()


def _q4_1(b: _Fields) -> _Unpacked:
    return _nibbles(_words(b["q"])), b["d"].copy(), b["m"].copy()


def _q5_0(b: _Fields) -> _Unpacked:
    return _with_high(_nibbles(_words(b["q"])), _fifth_bits(b["h"])), b["d"].copy()


def _q5_1(b: _Fields) -> _Unpacked:
    return (*_q5_0(b), b["m"].copy())


def _q8_0(b: _Fields) -> _Unpacked:
    return b["q"].copy(), b["d"].copy()


def _iq4_nl(b: _Fields) -> _Unpacked:
    return _IQ4_VALUES[_nibbles(_words(b["q"]))], b["d"].copy()


def _iq4_xs(b: _Fields) -> _Unpacked:
    low, high = b["l"], b["h"]
    i = np.empty((len(b), 8), np.uint8)
    i[:, ::2], i[:, 1::2] = low & 15, low >> 4
    i |= ((high[:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8) << 4
    codes = _IQ4_VALUES[_nibbles(_words(b["q"]).reshape(-1, 2))]
    return codes, b["d"].copy(), (i - np.uint8(32)).view(np.int8)


def _q2_k(b: _Fields) -> _Unpacked:
    codes = _pairs(_words(b["q"]).reshape(-1, 4))
    return codes, b["d"].copy(), b["e"].copy(), b["s"] & 15, b["s"] >> 4


def _q3_k(b: _Fields) -> _Unpacked:
    # q is 2 bits, less 4 where a bit of h is clear; as a code with zero 8.
    codes = _pairs(_words(b["q"]).reshape(-1, 4)).reshape(-1)
    above = _bits(_words(b["h"])).reshape(-1)
    above += 1
    above <<= 2
    codes += above
    low, high = b["s"][:, :8], b["s"][:, 8:]
    i = np.empty((len(b), 16), np.uint8)
    i[:, :8], i[:, 8:] = low & 15, low >> 4
    for k in range(4):
        i[:, 4 * k : 4 * k + 4] |= ((high >> (2 * k)) & 3) << 4
    return codes, b["d"].copy(), (i - np.uint8(32)).view(np.int8)


def _six_bit_scales(s: Bytes) -> tuple[Bytes, Bytes]:
    """8 scales and 8 minima of 6 bits each, from 12 bytes."""
    first, second, both = s[:, :4], s[:, 4:8], s[:, 8:]
    i, j = np.empty((2, len(s), 8), np.uint8)
    i[:, :4], j[:, :4] = first & 63, second & 63
    i[:, 4:] = (both & 15) | ((first >> 6) << 4)
    j[:, 4:] = (both >> 4) | ((second >> 6) << 4)
    return i, j


def _q4_k(b: _Fields) -> _Unpacked:
    codes = _nibbles(_words(b["q"]).reshape(-1, 4))
    return codes, b["d"].copy(), b["e"].copy(), *_six_bit_scales(b["s"])


def _q5_k(b: _Fields) -> _Unpacked:
    codes, *planes = _q4_k(b)
    return _with_high(codes.view(np.uint8), _bits(_words(b["h"]))), *planes


def _q6_k(b: _Fields) -> _Unpacked:
    codes = _nibbles(_words(b["q"]).reshape(-1, 8))
    high = _pairs(_words(b["h"]).reshape(-1, 4))
    return _with_high(codes, high), b["d"].copy(), b["s"].copy()


def _type(
    elements: int,
    dtype: DType,
    groups: Groups,
    unpack: Callable[[_Fields], _Unpacked],
    **fields: str,
) -> BlockType:
    return BlockType(np.dtype(list(fields.items())), elements, dtype, groups, unpack)


_ONE, _ONE_MIN = Groups(32, Scales.F16), Groups(32, Scales.F16_MIN)
_TWO, _TWO_MIN = Scales.TWO_LEVEL, Scales.TWO_LEVEL_MIN
# Fields in the order of the block: d and e are scales of the block, m its minimum, s and l scales
# of its groups, q the low bits of codes, h the bits above.
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": _type(32, DType.U4, _ONE, _q4_0, d="<f2", q="16u1"),
    "Q4_1": _type(32, DType.U4, _ONE_MIN, _q4_1, d="<f2", m="<f2", q="16u1"),
    "Q5_0": _type(32, DType.U5, _ONE, _q5_0, d="<f2", h="4u1", q="16u1"),
    "Q5_1": _type(32, DType.U5, _ONE_MIN, _q5_1, d="<f2", m="<f2", h="4u1", q="16u1"),
    "Q8_0": _type(32, DType.I8, _ONE, _q8_0, d="<f2", q="32i1"),
    "Q2_K": _type(
        256, DType.U4, Groups(16, _TWO_MIN, 256), _q2_k, s="16u1", q="64u1", d="<f2", e="<f2"
    ),
    "Q3_K": _type(
        256, DType.U4, Groups(16, _TWO, 256), _q3_k, h="32u1", q="64u1", s="12u1", d="<f2"
    ),
    "Q4_K": _type(
        256, DType.U4, Groups(32, _TWO_MIN, 256), _q4_k, d="<f2", e="<f2", s="12u1", q="128u1"
    ),
    "Q5_K": _type(
        256, DType.U5, Groups(32, _TWO_MIN, 256), _q5_k,
        d="<f2", e="<f2", s="12u1", h="32u1", q="128u1",
    ),
    "Q6_K": _type(
        256, DType.U6, Groups(16, _TWO, 256), _q6_k, q="128u1", h="64u1", s="16i1", d="<f2"
    ),
    "IQ4_NL": _type(32, DType.I8, _ONE, _iq4_nl, d="<f2", q="16u1"),
    "IQ4_XS": _type(
        256, DType.I8, Groups(32, _TWO, 256), _iq4_xs, d="<f2", h="<u2", l="4u1", q="128u1"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A RowMatrix of blocks; its columns fill whole blocks."""

    tensor: Tensor

    @property
    def type(self) -> BlockType:
        """Of its blocks."""
        return BLOCK_TYPES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def dtype(self) -> DType:
        """Of the codes."""
        return self.type.dtype

    @property
    def groups(self) -> Groups:
        """How they become values."""
        return self.type.groups

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.tensor,)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.tensor.nbytes

    @property
    def description(self) -> str:
        """The block type."""
        return f"GGUF {self.tensor.dtype}"

    @property
    def row_nbytes(self) -> int:
        """Of the blocks of a row."""
        return self.shape[1] // self.type.elements * self.type.layout.itemsize

    def decoded(self, raw: Bytes, n_rows: int) -> Planes:
        """Planes of rows from the bytes of their blocks."""
        return self.type.planes(raw, n_rows)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows as planes."""
        return read_rows(self, first_row, n_rows, reader)
