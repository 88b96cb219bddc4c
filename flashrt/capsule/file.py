"""A capsule as a file: a safetensors file whose tensors are the stored bytes of regions.

IS: writing it whole or not at all, and reading it, with every check before a byte reaches the
arena. IS NOT: policy on where files live, or who may be admitted (the engine's `admit`). It exists
so that one state can be handed to another process or machine.

Tensors are U8: `fixed/<region>` [bytes] and `rows/<region>` [planes, bytes of rows [0, position)
widened to granules]. Metadata: format, fingerprint, position, digest, parent_digest, name, an
xxh3-128 per tensor, and one over all metadata and the tensor table.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.base.files import PRIVATE, opened, outcome, read_exactly, replacing
from flashrt.base.messages import listed, shown
from flashrt.base.tensor_file import StoredTensor, read_table, write_tensors
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Extent
from flashrt.capsule.image import fixed_image, row_parts, rows_image, stamp_gaps
from flashrt.capsule.lineage import Segment, path_to, segment_layout
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes
from flashrt.core.copylist import Copy, CopyList, Upload

FORMAT = "flashrt-capsule-1"
JOURNAL = "journal"  # the rows region of committed tokens, int32 [1, max_positions, 1]
MOST_HEADER_NBYTES = 16 << 20  # of a file; one of a thousand regions has 200 KB
_SUM = "xxh3:"


@dataclass(frozen=True, slots=True)
class CapsuleHeader:
    """What a capsule file says of itself; `table` maps tensor names to (shape, first byte)."""

    path: Path
    fingerprint: str
    position: int
    name: str | None
    digest: str
    parent_digest: str | None
    table: Mapping[str, tuple[tuple[int, ...], int]]
    sums: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) for shape, _ in self.table.values())


Admission = Callable[[CapsuleHeader, Mapping[str, Bytes], NDArray[np.int32]], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A capsule's bytes in the pool: not a capsule yet."""

    fixed: Extent
    segment: Segment | None
    nbytes: int


def save(arena: Arena, fingerprint: str, capsule: Capsule, path: str | os.PathLike[str]) -> None:
    """Write a capsule. The file appears whole or not at all.

    Raises CapsuleError when the file cannot be written.
    """
    tensors = {**_fixed(arena, capsule), **_rows(arena, capsule)}
    parent = capsule.parent
    digest = capsule.digest
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "position": str(capsule.position),
        "digest": digest,
        **{_SUM + name: xxhash.xxh3_128_hexdigest(t.data) for name, t in tensors.items()},
    }
    if capsule.name is not None:
        metadata["name"] = capsule.name
    if parent is not None and not parent.is_dropped:
        metadata["parent_digest"] = parent.digest
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata["header"] = _header_sum(metadata, shapes)
    _write(Path(path), tensors, metadata)


def read_header(path: str | os.PathLike[str]) -> CapsuleHeader:
    """The checked header of a capsule file. Raises CapsuleError unless it is whole."""
    file = Path(path)
    try:
        with opened(file) as (handle, nbytes):
            found = read_table(handle, nbytes, MOST_HEADER_NBYTES)
        metadata = found.metadata
        table = {name: (_shape(name, t), t.offset) for name, t in found.tensors.items()}
        if metadata.get("format") != FORMAT:
            what = shown(metadata.get("format"))
            raise CapsuleError(f"{file}: format {what}, this version reads {FORMAT!r}")
        expected = _header_sum(metadata, {name: shape for name, (shape, _) in table.items()})
        if metadata.get("header") != expected:
            raise CapsuleError(f"{file}: the header does not match its checksum; it is damaged")
        return CapsuleHeader(
            path=file,
            fingerprint=metadata["fingerprint"],
            position=int(metadata["position"]),
            name=metadata.get("name"),
            digest=metadata["digest"],
            parent_digest=metadata.get("parent_digest"),
            table=table,
            sums={n.removeprefix(_SUM): s for n, s in metadata.items() if n.startswith(_SUM)},
        )
    except FileNotFoundError as error:
        raise CapsuleError(f"{file}: no such file") from error
    except OSError as error:
        raise CapsuleError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise CapsuleError(f"{file}: not a whole capsule file: {error}") from error


def read_tensors(header: CapsuleHeader) -> dict[str, Bytes]:
    """The tensors, read and verified. Raises CapsuleError naming a tensor that is damaged."""
    tensors: dict[str, Bytes] = {}
    try:
        with opened(header.path) as (handle, nbytes):
            for name, (shape, first) in header.table.items():
                size, state = math.prod(shape), xxhash.xxh3_128()
                if first + size > nbytes:
                    raise CapsuleError(
                        f"{header.path}: ends inside tensor {shown(name)}; it was replaced or cut "
                        "meanwhile"
                    )
                tensor = read_exactly(handle, size, first, state.update)
                if state.hexdigest() != header.sums.get(name):
                    raise CapsuleError(
                        f"{header.path}: tensor {shown(name)} is damaged (checksum differs)"
                    )
                tensors[name] = tensor.reshape(shape)
    except OSError as error:
        raise CapsuleError(f"{header.path}: cannot be read: {error.strerror}") from error
    return tensors


def read(
    arena: Arena, fingerprint: str, max_positions: int, path: str | os.PathLike[str]
) -> tuple[CapsuleHeader, dict[str, Bytes]]:
    """Header and tensors of a file that fits the engine. Raises CapsuleError for one that is
    foreign, truncated, damaged or too long.
    """
    header = read_header(path)
    if header.fingerprint != fingerprint:
        raise CapsuleError(
            f"{header.path}: made by another model, precision, plan or kernel version: its "
            f"fingerprint is {header.fingerprint}, the engine's {fingerprint}"
        )
    if not 0 <= header.position <= max_positions:
        raise CapsuleError(
            f"{header.path}: position {header.position} > max_positions {max_positions}; load the "
            "engine with a larger max_positions"
        )
    wanted = expected_table(arena, header.position)
    found = {name: shape for name, (shape, _) in header.table.items()}
    if found != wanted:
        wrong = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        raise CapsuleError(
            f"{header.path}: tensors {listed(wrong)} do not fit the engine's plan; save the "
            "capsule again, from the engine that made it"
        )
    return header, read_tensors(header)


def place(
    arena: Arena,
    take: Callable[..., tuple[int, ...]],
    header: CapsuleHeader,
    tensors: Mapping[str, Bytes],
) -> Loaded:
    """The bytes of `read`, put into blocks that `take` gives. Raises PoolFull, changing nothing."""
    plan, position = arena.lane(0), header.position
    blocks, rows_nbytes = segment_layout(plan.rows, 0, position) if position else ([], 0)
    fixed: Bytes = np.empty(plan.fixed.nbytes, np.uint8)
    for slot in plan.fixed.slots:
        first = slot.offset - plan.fixed.offset
        fixed[first : first + slot.storage.nbytes] = tensors[f"fixed/{slot.region.name}"]
    stamp_gaps(arena, fixed)
    fixed_block, block = take(fixed.size, rows_nbytes)
    base = arena.memory.address
    arena.backend.write(base + fixed_block, fixed)
    segment = None
    if position:
        uploads = []
        for b in blocks:
            data = tensors[f"rows/{b.slot.region.name}"].reshape(-1)
            moves = CopyList([Copy(0, block + b.offset, data.size)])
            uploads.append(Upload(data, moves.check(arena.plan.nbytes, data.size)))
        arena.backend.upload(uploads, base)
        rows = Extent(rows_nbytes, block)
        segment = Segment(None, 0, position, journal(tensors, position), rows)
    return Loaded(Extent(fixed.size, fixed_block), segment, fixed.size + rows_nbytes)


def admit_image(
    arena: Arena,
    header: CapsuleHeader,
    fixed: Bytes,
    tokens: NDArray[np.int32],
    admit: Admission,
) -> None:
    """`admit` of a fixed band's image, uint8 [nbytes of the band], and of all tokens below the
    position. Raises what it raises.
    """
    band = arena.lane(0).fixed
    tensors = {
        f"fixed/{s.region.name}": fixed[s.offset - band.offset : s.stop - band.offset]
        for s in band.slots
    }
    admit(header, tensors, tokens)


def expected_table(arena: Arena, position: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a capsule at a position."""
    plan = arena.lane(0)
    shapes: dict[str, tuple[int, ...]] = {
        f"fixed/{s.region.name}": (s.storage.nbytes,) for s in plan.fixed.slots
    }
    if position:
        for b in segment_layout(plan.rows, 0, position)[0]:
            shapes[f"rows/{b.slot.region.name}"] = (b.planes, b.width)
    return shapes


def journal(tensors: Mapping[str, Bytes], position: int) -> NDArray[np.int32]:
    """The host's copy of the tokens; the device's is the rows region that declares them."""
    if not position:
        return np.empty(0, np.int32)
    return tensors[f"rows/{JOURNAL}"].reshape(-1)[: 4 * position].copy().view(np.int32)


def _fixed(arena: Arena, capsule: Capsule) -> dict[str, Bytes]:
    fixed = arena.lane(0).fixed
    image = fixed_image(arena, capsule.fixed)
    first = fixed.offset
    return {f"fixed/{s.region.name}": image[s.offset - first : s.stop - first] for s in fixed.slots}


def _rows(arena: Arena, capsule: Capsule) -> dict[str, Bytes]:
    rows = arena.lane(0).rows
    if not capsule.position:
        return {}
    whole, _ = segment_layout(rows, 0, capsule.position)
    tensors: dict[str, Bytes] = {
        b.slot.region.name: np.zeros((b.planes, b.width), np.uint8) for b in whole
    }
    for segment in path_to(capsule.segment, 0):  # the younger one last: it owns a shared granule
        blocks, _ = segment_layout(rows, segment.start, segment.stop)
        parts = row_parts(blocks, rows_image(arena, segment))
        for b in blocks:
            name, at = b.slot.region.name, b.start * b.slot.storage.row_nbytes
            tensors[name][:, at : at + b.width] = parts[name]
    return {f"rows/{name}": tensor for name, tensor in tensors.items()}


def _shape(name: str, tensor: StoredTensor) -> tuple[int, ...]:
    if tensor.dtype != "U8" or not 1 <= len(tensor.shape) <= 2:
        raise ValueError(f"tensor {shown(name)} is {tensor.dtype} {shown(tensor.shape)}")
    return tensor.shape


def _header_sum(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    rest = {k: v for k, v in metadata.items() if k != "header"}
    text = json.dumps([rest, {k: list(v) for k, v in shapes.items()}], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _write(path: Path, tensors: dict[str, Bytes], metadata: dict[str, str]) -> None:
    try:
        with replacing(path, is_durable=True, mode=PRIVATE) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        raise CapsuleError(f"cannot write {path}: {error}; {outcome(error)}") from error
