"""A capsule as bytes in memory, for another process: whole, or what it adds to an ancestor.

IS: packing a capsule, and making one of a parcel in another engine, with every check before it
joins. IS NOT: a file (file), a repository (the store), or how a parcel travels. It exists because
an object store maps arrays of one process into another: a parcel that arrives so is not copied.

A parcel is addressed by the digest of its state. Its rows are images of segments (image), oldest
first, beginning at the base's position. A capsule that is unpacked is on the host tier; its bytes
are the parcel's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Extent, HostBytes
from flashrt.capsule.file import Admission, CapsuleHeader, admit_image
from flashrt.capsule.image import fixed_image, rows_image
from flashrt.capsule.lineage import Segment, chain_of, segment_layout
from flashrt.capsule.table import CapsuleTable
from flashrt.core.backend import Bytes


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows [start, stop) and their tokens; `sum` is the xxh3-128 of both, rows first."""

    start: int
    stop: int
    tokens: NDArray[np.int32]  # [stop - start]
    rows: Bytes  # uint8 [nbytes of the segment]
    sum: str


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A capsule's bytes, those that its base does not have."""

    fingerprint: str
    digest: str  # of the whole state: the parcel's address
    position: int
    base: str | None  # digest of the ancestor that has the rows below the first part
    parts: tuple[Part, ...]  # oldest first
    fixed: Bytes  # the fixed band, uint8
    fixed_sum: str  # xxh3-128

    @property
    def nbytes(self) -> int:
        """Bytes of rows, tokens and fixed band."""
        rows = sum(part.rows.nbytes + part.tokens.nbytes for part in self.parts)
        return int(rows + self.fixed.nbytes)


def pack(capsule: Capsule, base: Capsule | None = None) -> Parcel:
    """A capsule as a parcel; with `base`, without the rows that it shares with that ancestor. A
    base that it does not descend from is not used.

    Raises CapsuleError for a dropped capsule, or bytes that cannot be read.
    """
    return capsule.owner.change(lambda: _pack(capsule, base))


def unpack(parcel: Parcel, table: CapsuleTable, base: Capsule | None, admit: Admission) -> Capsule:
    """The capsule of a parcel, in another engine's table, on the host tier; `base`: the capsule of
    `parcel.base` there; `admit` may refuse the state that was read.

    Raises CapsuleError for a parcel that is foreign, damaged or too long, or without its base;
    nothing is changed then.
    """
    return table.change(lambda: _unpack(parcel, table, base, admit))


def _pack(capsule: Capsule, base: Capsule | None) -> Parcel:
    table = capsule.owner
    table.check(capsule)
    chain = list(chain_of(capsule.segment))
    if base is not None and base.segment is not None and base.segment in chain:
        table.check(base)
        chain = chain[: chain.index(base.segment)]
    else:
        base = None
    parts = []
    for segment in reversed(chain):
        rows = np.ascontiguousarray(rows_image(table.arena, segment))
        tokens = np.ascontiguousarray(segment.tokens, np.int32)
        parts.append(Part(segment.start, segment.stop, tokens, rows, _sum(rows, tokens)))
    fixed = np.ascontiguousarray(fixed_image(table.arena, capsule.fixed))
    return Parcel(
        fingerprint=table.fingerprint,
        digest=capsule.digest,
        position=capsule.position,
        base=None if base is None else base.digest,
        parts=tuple(parts),
        fixed=fixed,
        fixed_sum=_sum(fixed),
    )


def _unpack(parcel: Parcel, table: CapsuleTable, base: Capsule | None, admit: Admission) -> Capsule:
    where = f"capsule {parcel.digest}"
    if parcel.fingerprint != table.fingerprint:
        raise CapsuleError(
            f"{where}: made by another model, precision, plan or kernel version: its "
            f"fingerprint is {parcel.fingerprint}, the engine's {table.fingerprint}"
        )
    limit = len(table.lanes[0].journal)
    if parcel.position > limit:
        raise CapsuleError(
            f"{where}: position {parcel.position} > max_positions {limit}; load the engine with a "
            "larger max_positions"
        )
    if parcel.base is None:
        base = None
    elif base is None or base.digest != parcel.base:
        raise CapsuleError(f"{where}: its base, capsule {parcel.base}, is not here")
    else:
        table.check(base)
    _check_bytes(parcel, table, 0 if base is None else base.position, where)
    below = np.empty(0, np.int32) if base is None else base.tokens
    tokens = np.concatenate([below, *(part.tokens for part in parcel.parts)])
    admit_image(table.arena, _header(parcel, where), parcel.fixed, tokens, admit)
    segment = None if base is None else base.segment
    for part in parcel.parts:
        rows = Extent(part.rows.nbytes, HostBytes.holding(part.rows))
        own_tokens = part.tokens.copy()  # or they would keep the whole parcel alive
        segment = Segment(segment, part.start, part.stop, own_tokens, rows)
    fixed = Extent(parcel.fixed.nbytes, HostBytes.holding(parcel.fixed))
    own = sum(part.rows.nbytes for part in parcel.parts)
    made = Capsule(table, segment, fixed, fixed.nbytes + own, None, parcel.digest)
    table.adopt(made)
    return made


def _check_bytes(parcel: Parcel, table: CapsuleTable, start: int, where: str) -> None:
    """Raises CapsuleError unless parts follow each other from `start`, have the sizes of the
    engine's plan, and match their checksums.
    """
    rows = table.arena.lane(0).rows
    for part in parcel.parts:
        follows = part.start == start < part.stop and len(part.tokens) == part.stop - part.start
        if not follows or segment_layout(rows, part.start, part.stop)[1] != part.rows.nbytes:
            raise CapsuleError(
                f"{where}: rows [{part.start}, {part.stop}) do not fit the engine's plan"
            )
        if _sum(part.rows, part.tokens) != part.sum:
            raise CapsuleError(
                f"{where}: rows [{part.start}, {part.stop}) are damaged (checksum differs)"
            )
        start = part.stop
    if start != parcel.position or parcel.fixed.nbytes != table.fixed_nbytes:
        raise CapsuleError(f"{where}: sizes of its parts do not fit the engine's plan")
    if _sum(parcel.fixed) != parcel.fixed_sum:
        raise CapsuleError(f"{where}: its fixed band is damaged (checksum differs)")


def _header(parcel: Parcel, where: str) -> CapsuleHeader:
    """What the engine's own checks ask of a file."""
    return CapsuleHeader(
        path=Path(where),
        fingerprint=parcel.fingerprint,
        position=parcel.position,
        name=None,
        digest=parcel.digest,
        parent_digest=None,
        table={},
        sums={},
    )


def _sum(*arrays: Bytes | NDArray[np.int32]) -> str:
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()
