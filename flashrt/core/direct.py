"""Weights that a backend on the host reads, hashes and packs itself: by all threads, in one call.

IS: the nouns of that call, and the protocol of a backend that offers it beside `Backend`. IS NOT:
which bytes are which weights (weights.loader). It exists because bytes that are packed where they
were read are still in that core's cache, and need no second copy in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flashrt.core.backend import Bytes
from flashrt.core.region import Region


@dataclass(frozen=True, slots=True)
class FilePart:
    """Rows of a matrix that lie in a file, [rows, columns] from byte `offset` on, and the address
    of the storage that they fill: whole panels.

    before: bytes to hash first. file: a descriptor; negative for a part that is `before` alone.
    order: row n is row order[n] of those read. blocks: the type of ggml's blocks that rows are made
    of; "" for values of the region's dtype.
    """

    before: bytes
    file: int = -1
    offset: int = 0
    nbytes: int = 0
    address: int = 0
    region: Region | None = None
    rows: int = 0
    blocks: str = ""
    order: NDArray[np.int64] | None = None


class FileHash(Protocol):
    """xxh3-128 of all bytes of all parts, in their order; of more than 240 bytes."""

    def hexdigest(self) -> str: ...


@runtime_checkable
class DirectBackend(Protocol):
    """A backend in whose memory the host may write."""

    def room(self, address: int, nbytes: int) -> Bytes:
        """Memory of this backend as an array: what is packed there needs no `write`."""
        ...

    def packs(self, region: Region, blocks: str) -> bool:
        """Whether `load_parts` knows such parts."""
        ...

    def new_hash(self) -> FileHash: ...
    def load_parts(self, parts: Sequence[FilePart], hash_: FileHash) -> tuple[int, int] | None:
        """Fill storage, and go on with the hash. None, or the index of a part that cannot be read
        and why (an errno); what it and those after it fill is undefined then.
        """
        ...
