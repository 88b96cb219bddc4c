"""Manifests: what one stored capsule is made of; small, immutable JSON files.

IS: the record and its canonical text, every field checked when read. The file's name tells the
position, the digest of the tokens below it and that of the file, so that a listing alone answers
which stored capsules are a prefix of a prompt. IS NOT: objects or policy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import StoreError
from flashrt.core.backend import Bytes
from flashrt.store.folder import MOST_MANIFEST_NBYTES

FORMAT = "flashrt-manifest-1"
CAPSULES = "capsules"
MOST_NBYTES = MOST_MANIFEST_NBYTES
MAX_POSITION = 1 << 31
_DIGEST = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(
    rf"{CAPSULES}/([0-9a-f]{{32}})/(\d{{10}})-([0-9a-f]{{32}})-([0-9a-f]{{32}})\.json"
)


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """An object by its content."""

    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """Rows [start, stop): their bytes, and their tokens as int32."""

    start: int
    stop: int
    rows: ObjectRef
    tokens: ObjectRef


@dataclass(frozen=True, slots=True)
class Place:
    """The name of a manifest, taken apart."""

    fingerprint: str
    position: int
    tokens_digest: str
    id: str

    @property
    def name(self) -> str:
        """The file, within a store."""
        file = f"{self.position:010d}-{self.tokens_digest}-{self.id}.json"
        return f"{CAPSULES}/{self.fingerprint}/{file}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A capsule in a store. Segments are contiguous from 0 to the position, oldest first."""

    fingerprint: str
    position: int
    tokens_digest: str
    digest: str  # of the state
    parent: str | None  # id of another manifest
    fixed: ObjectRef
    segments: tuple[SegmentRecord, ...]

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """All objects that the capsule needs."""
        rows = (ref for s in self.segments for ref in (s.rows, s.tokens))
        return self.fixed, *rows

    def encode(self) -> tuple[Place, Bytes]:
        """The canonical text, and the name that it goes by."""
        fields = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "position": self.position,
            "tokens_digest": self.tokens_digest,
            "digest": self.digest,
            "parent": self.parent,
            "fixed": [self.fixed.digest, self.fixed.nbytes],
            "segments": [
                [s.start, s.stop, s.rows.digest, s.rows.nbytes, s.tokens.digest, s.tokens.nbytes]
                for s in self.segments
            ],
        }
        text = json.dumps(fields, sort_keys=True, indent=1) + "\n"
        data: Bytes = np.frombuffer(text.encode(), np.uint8)
        digest = xxhash.xxh3_128_hexdigest(data.data)
        return Place(self.fingerprint, self.position, self.tokens_digest, digest), data


def tokens_digest(tokens: NDArray[np.int32]) -> str:
    """xxh3-128 of int32 token ids."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens, "<i4").data)


def prefix_digests(tokens: NDArray[np.int32], positions: list[int]) -> dict[int, str]:
    """`tokens_digest` of tokens[:p] for ascending positions, in one pass."""
    state, at, found = xxhash.xxh3_128(), 0, {}
    raw = np.ascontiguousarray(tokens, "<i4")
    for position in positions:
        state.update(raw[at:position].data)
        at = position
        found[position] = state.hexdigest()
    return found


def place_of(name: str) -> Place | None:
    """The manifest that a file name stands for; None for other files."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    fingerprint, position, tokens, digest = match.groups()
    return Place(fingerprint, int(position), tokens, digest)


def decode(place: Place, data: Bytes) -> Manifest:
    """A checked manifest. Raises StoreError naming what is wrong."""
    where = place.name
    if xxhash.xxh3_128_hexdigest(data.data) != place.id:
        raise StoreError(f"{where} is damaged: it does not match its name")
    try:
        fields = json.loads(data.tobytes())
        manifest = _manifest(fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"{where} is not a manifest: {error!r}") from error
    named = (place.fingerprint, place.position, place.tokens_digest)
    if (manifest.fingerprint, manifest.position, manifest.tokens_digest) != named:
        raise StoreError(f"{where} describes another capsule than its name says")
    return manifest


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version reads {FORMAT!r}")
    segments, at = [], 0
    for start, stop, rows, rows_nbytes, tokens, tokens_nbytes in fields["segments"]:
        if start != at or not at < _integer(stop) < MAX_POSITION:
            raise ValueError(f"segment [{start}, {stop}) does not follow position {at}")
        if tokens_nbytes != 4 * (stop - start):
            raise ValueError(f"{tokens_nbytes} bytes of tokens for [{start}, {stop})")
        refs = (
            ObjectRef(_digest(rows), _integer(rows_nbytes)),
            ObjectRef(_digest(tokens), tokens_nbytes),
        )
        segments.append(SegmentRecord(start, stop, *refs))
        at = stop
    if at != _integer(fields["position"]):
        raise ValueError(f"segments end at {at}, the position is {fields['position']}")
    fixed, fixed_nbytes = fields["fixed"]
    return Manifest(
        fingerprint=_digest(fields["fingerprint"]),
        position=at,
        tokens_digest=_digest(fields["tokens_digest"]),
        digest=_digest(fields["digest"]),
        parent=None if fields["parent"] is None else _digest(fields["parent"]),
        fixed=ObjectRef(_digest(fixed), _integer(fixed_nbytes)),
        segments=tuple(segments),
    )


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is not 32 hex digits")
    return value


def _integer(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
