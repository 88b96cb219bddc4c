"""Operands that families of ops share.

IS: one short constructor per kind of operand, so that a signature reads as its shapes. IS NOT: ops;
each family has a file.
"""

from __future__ import annotations

from enum import IntEnum

from flashrt.core.op import Access, Param
from flashrt.core.region import CODE_DTYPES, DType, Layout
from flashrt.ops.cursor import CURSOR_WORDS, CursorWord, PolicyWord

CACHE_DTYPES = (DType.F32, DType.BF16, DType.I8, DType.E4M3)  # of keys and values
Dim = int | str


def f32(name: str, access: Access, *dims: Dim, strided: bool = False) -> Param:
    """float32."""
    return Param(name, access, dims, is_strided=strided)


def act(name: str, access: Access, *dims: Dim) -> Param:
    """An activation, of the dtype that the backend multiplies in."""
    return Param(name, access, dims, (DType.ACT,))


# Of weight matrices: values, or codes in groups.
WEIGHT_DTYPES = (DType.BF16, DType.F16, DType.F32, *CODE_DTYPES)


def matrix(name: str, *dims: Dim) -> Param:
    """Weights of a language model, as they are stored: see core.groups."""
    return Param(name, "r", dims, WEIGHT_DTYPES, Layout.MATRIX, may_be_grouped=True)


def f32_matrix(name: str, *dims: Dim) -> Param:
    """Weights in float32: a policy's."""
    return Param(name, "r", dims, (DType.F32,), Layout.MATRIX)


def cache_rows(name: str, access: Access, layout: Layout) -> Param:
    """Keys or values of all positions."""
    return Param(name, access, ("Nk", "S", "D"), CACHE_DTYPES, layout)


def cache_scales(name: str, access: Access) -> Param:
    """What codes of keys or values are multiplied by, one per row. Keys that are no codes stand in
    for scales that there are not.
    """
    dims = ("Nk", "S", "C")
    return Param(name, access, dims, (DType.F32, DType.BF16), Layout.ROWS_IN_LANES)


def i32(name: str, access: Access, *dims: Dim, words: type[IntEnum] | None = None) -> Param:
    """int32; `words` names the elements of the last dimension."""
    return Param(name, access, dims, (DType.I32,), words=words)


def cursors(name: str, access: Access, *dims: Dim) -> Param:
    """Cursors of tokens: one, or one per entry of `dims`."""
    return i32(name, access, *dims, CURSOR_WORDS, words=CursorWord)


CURSOR = cursors("cursor", "r")  # of the launch
POLICY_CURSOR = i32("cursor", "rw", CURSOR_WORDS, words=PolicyWord)
