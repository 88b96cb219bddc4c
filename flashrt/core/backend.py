"""The backend protocol: the few verbs a device has to offer.

IS: the contract that backends/cpu, backends/cuda and backends/simt implement and tests/backend
checks. IS NOT: policy or model knowledge.

Contract. Addresses are plain integers into the two allocations (arena, weights). All verbs but
`read` and `sync` may be asynchronous; they take effect in call order. After `seal` the verbs
allocate, compile and capture (`allocate`, `build`, `capture`) raise SealedError, and `counters`
shows that nothing else did either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.core.copylist import CopyList, Upload
from flashrt.core.digest import DigestTerm
from flashrt.core.groups import Planes
from flashrt.core.op import Launch, Op
from flashrt.core.region import ActDTypes, Region
from flashrt.core.runs import Stride

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a backend stores a region: `nbytes` in all, `lead_nbytes` per entry of the leading axis.

    For rows: a plane is `lead_nbytes`; `row_nbytes` per position; positions come in granules that
    can only be moved whole, so plane bytes [g * row_nbytes * granule, ...) hold positions [g *
    granule, (g + 1) * granule).
    """

    nbytes: int
    lead_nbytes: int
    row_nbytes: int = 0
    granule: int = 1


@dataclass(slots=True)
class Counters:
    """What happened since the backend was opened; `seal` freezes the first three."""

    allocations: int = 0
    compilations: int = 0
    captures: int = 0
    replays: int = 0
    launches: int = 0
    copies: int = 0
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """A launch with the address of each operand.

    Where operands move with the runs of a replay: the address of the table, how far each moves, and
    how many runs there are at most.
    """

    launch: Launch
    addresses: tuple[int, ...]
    runs: int = 0
    strides: tuple[Stride, ...] = ()
    max_runs: int = 1

    def pack(self, acts: ActDTypes) -> bytes:
        """The argument block."""
        return self.launch.pack(self.addresses, acts, self.runs, self.strides)


class Graph(Protocol):
    """A captured list of launches; opaque."""

    @property
    def n_launches(self) -> int: ...


class Memory(Protocol):
    """One allocation."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Backend(Protocol):
    """A device."""

    @property
    def name(self) -> str: ...
    @property
    def acts(self) -> ActDTypes: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def is_async(self) -> bool:
        """Whether a replay returns before it is done, so that the next may be queued behind it."""
        ...

    @property
    def kernel_digest(self) -> str:
        """Hash of kernel sources and what else decides bits; part of the fingerprint."""
        ...

    def storage(self, region: Region) -> Storage: ...
    def pack(self, region: Region, array: NDArray[np.generic] | Planes, out: Bytes) -> None:
        """Logical array -> storage bytes. bfloat16 arrays come as uint16 bits, matrices in groups
        as planes.
        """
        ...

    def unpack(self, region: Region, raw: Bytes) -> NDArray[np.generic]:
        """Storage bytes -> logical array (bfloat16 as uint16 bits); not for matrices in groups."""
        ...

    def digest_layout(self, region: Region) -> int:
        """How rows of a region lie in storage: a code of core.digest.LAYOUT_CODE."""
        ...

    def build(self, ops: Sequence[Op], progress: Progress | None = None) -> None:
        """Compile what the ops need, or load it from the cache.

        Where there is something to compile, now or at a capture, progress("kernels", done, total)
        is called; without it a line on stderr announces the wait.
        """
        ...

    def allocate(self, name: str, nbytes: int) -> Memory: ...
    def write(self, address: int, data: Bytes) -> None:
        """Host to device; `data` may change once this returns."""
        ...

    def read(self, address: int, out: Bytes) -> None: ...
    def begin_read(self, address: int, nbytes: int) -> Callable[[], Bytes]:
        """Start to read; what is returned waits for the bytes. Later writes, fills and copies come
        after it; replays must leave the range alone.
        """
        ...

    def begin_read_word(self, address: int) -> Callable[[], int]:
        """Start to read an int32 as it is at this place; what is returned waits for it. Later
        replays come after it, too.
        """
        ...

    def fill(self, address: int, nbytes: int, byte: int) -> None: ...
    def copy(self, moves: CopyList, src_base: int, dst_base: int) -> None: ...
    def upload(self, uploads: Sequence[Upload], dst_base: int) -> None:
        """Host to device, as one batch; sources may change once this returns."""
        ...

    def digest(self, terms: Sequence[DigestTerm], base: int) -> list[tuple[int, int]]: ...
    def begin_digest(
        self, terms: Sequence[DigestTerm], base: int
    ) -> Callable[[], list[tuple[int, int]]]:
        """The same of the bytes as they are now, in stream order; what is returned waits for it."""
        ...

    def capture(self, launches: Sequence[BoundLaunch]) -> Graph: ...
    def replay(self, graph: Graph, table: bytes | None = None, at: int = 0) -> None:
        """Run a graph; before it, in one step that no other call comes between, write `table`, the
        runs that its launches read, to the address `at`.
        """
        ...

    def eager(self, launches: Sequence[BoundLaunch]) -> None:
        """Run launches one by one, without a graph: for checks and debugging."""
        ...

    def sync(self) -> None: ...
    def seal(self) -> None: ...
    def close(self) -> None: ...


Progress = Callable[[str, int, int], None]  # what, done, total
