"""The store: capsules that outlive the process, in a folder that works like git's.

IS: publish (save), load, names, and the search for the longest stored prefix of a prompt.
    format               what this folder is
    objects/ab/cdef...   segments' rows, segments' tokens, fixed bands; named by content
    capsules/FINGERPRINT/POSITION-TOKENS-ID.json    manifests
    refs/NAME            one line: the manifest that a name stands for
IS NOT: files (folder), sweeping and checking (upkeep), or sessions from prompts (opening).

Order of writes: objects, manifest, name. So whatever is seen is whole, and a killed writer leaves
objects that nobody refers to. A capsule that is loaded stays on the disk tier until it is restored.
"""

from __future__ import annotations

import os
import urllib.parse
import weakref
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, StoreError
from flashrt.base.messages import listed
from flashrt.capsule.capsule import Capsule, CapsuleOwner
from flashrt.capsule.extent import Extent, StoredBytes
from flashrt.capsule.image import fixed_image, rows_image
from flashrt.capsule.lineage import Segment, chain_of, segment_layout
from flashrt.engine.admission import check_state
from flashrt.engine.tokens import TokenEngine
from flashrt.store import manifest as manifests
from flashrt.store.folder import Folder, open_folder
from flashrt.store.manifest import Manifest, ObjectRef, Place, SegmentRecord
from flashrt.store.objects import StoredObject, put
from flashrt.store.reuse import Rates

FORMAT = b"flashrt-store-1\n"
FORMAT_FILE, REFS = "format", "refs"


@dataclass(frozen=True, slots=True)
class Saved:
    """What `Store.save` did."""

    place: Place
    new_objects: int
    new_nbytes: int
    shared_nbytes: int  # in the store already


@dataclass(slots=True)
class _Known:
    """What a process knows of the segments of one engine: none is written or made twice."""

    records: weakref.WeakKeyDictionary[Extent, SegmentRecord] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    segments: weakref.WeakValueDictionary[tuple[Segment | None, str, int], Segment] = field(
        default_factory=weakref.WeakValueDictionary
    )
    capsules: weakref.WeakKeyDictionary[Capsule, Place] = field(
        default_factory=weakref.WeakKeyDictionary
    )


class Store:
    """A repository of capsules. Several processes may use one at the same time."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """A directory (made at the first save), or an fsspec URL such as s3://bucket/store.

        Raises StoreError when there is something else.
        """
        self.folder: Folder = open_folder(os.fspath(url))
        if self.is_there:
            found = self.folder.read(FORMAT_FILE)[:64].tobytes()
            if found != FORMAT:
                raise StoreError(
                    f"{self.folder.url}: format {found!r}, this version reads {FORMAT!r}"
                )
        self.rates = Rates()
        self._known: weakref.WeakKeyDictionary[CapsuleOwner, _Known] = weakref.WeakKeyDictionary()

    @property
    def is_there(self) -> bool:
        """Whether something was saved here ever."""
        return self.folder.size(FORMAT_FILE) is not None

    # -- publishing -----------------------------------------------------------------------------

    def save(self, capsule: Capsule, name: str | None = None) -> Saved:
        """Publish a capsule, whole or not at all; objects that are there are not written again.

        `name`: a ref for it (default: the capsule's name); a ref that exists moves. Raises
        CapsuleError for a dropped capsule, StoreError when the store cannot be written.
        """
        return capsule.owner.change(lambda: self._save(capsule, name))

    def _save(self, capsule: Capsule, name: str | None) -> Saved:
        table = capsule.owner
        table.check(capsule)
        name = capsule.name if name is None else name
        ref = None if name is None else _ref_file(name)
        known = self._known.setdefault(table, _Known())
        with self.folder.publishing():
            if not self.is_there:
                self.folder.write(FORMAT_FILE, np.frombuffer(FORMAT, np.uint8))
            tally = [0, 0, 0]
            segments = [self._publish(table, known, s, tally) for s in _oldest_first(capsule)]
            fixed = self._put(fixed_image(table.arena, capsule.fixed), tally)
            made = Manifest(
                fingerprint=table.fingerprint,
                position=capsule.position,
                tokens_digest=manifests.tokens_digest(capsule.tokens),
                digest=capsule.digest,
                parent=self._parent_id(capsule, known),
                fixed=fixed,
                segments=tuple(segments),
            )
            place, text = made.encode()
            if self.folder.size(place.name) is None:
                self.folder.write(place.name, text)
            if ref is not None:
                self.folder.write(ref, np.frombuffer(f"{place.name}\n".encode(), np.uint8))
                if self.folder.size(place.name) is None:  # removed meanwhile, see `remove`
                    self.folder.write(place.name, text)
        known.capsules[capsule] = place
        return Saved(place, *tally)

    def offload(self, capsule: Capsule) -> Saved:
        """Publish a capsule and move it to the disk tier: its bytes are in the store."""
        return capsule.owner.change(lambda: self._offload(capsule))

    def _offload(self, capsule: Capsule) -> Saved:
        saved = self._save(capsule, None)
        known = self._known[capsule.owner]
        made = self.manifest(saved.place)
        sources: dict[Extent, StoredBytes] = {capsule.fixed: self._source(made.fixed)}
        for segment in chain_of(capsule.segment):
            sources[segment.rows] = self._source(known.records[segment.rows].rows)
        capsule.owner.offload(capsule, sources)
        return saved

    # -- questions ------------------------------------------------------------------------------

    def places(self, fingerprint: str | None = None) -> list[Place]:
        """All capsules, or those of a fingerprint; by fingerprint, position, id."""
        below = manifests.CAPSULES + (f"/{fingerprint}" if fingerprint else "")
        found = (manifests.place_of(e.name) for e in self.folder.list(below))
        return [p for p in found if p is not None]

    def refs(self) -> dict[str, Place]:
        """Names and what they stand for; a name whose capsule was removed is left out."""
        targets = self._targets()
        there = {p.name: p for p in self.places()}  # listed last: they are written before names
        return {name: there[target] for name, target in targets.items() if target in there}

    def resolve(self, which: str) -> Place:
        """The capsule that a name or the beginning of an id (at least 4 digits) stands for.

        Raises StoreError when there is none, or more than one.
        """
        refs = self.refs()
        if which in refs:
            return refs[which]
        matching = [p for p in self.places() if len(which) >= 4 and p.id.startswith(which)]
        if len(matching) != 1:
            what = (
                f"{len(matching)} capsules' ids begin with" if matching else "no capsule is called"
            )
            raise StoreError(
                f"{self.folder.url}: {what} {which!r}; `flashrt store ls` lists what is there"
            )
        return matching[0]

    def manifest(self, place: Place) -> Manifest:
        """The checked manifest of a capsule. Raises StoreError."""
        return manifests.decode(place, self.folder.read(place.name))

    def find(self, fingerprint: str, tokens: NDArray[np.int32]) -> list[Place]:
        """Stored capsules whose tokens are a prefix of `tokens`, deepest first.

        One listing, and no file is read: names carry positions and digests of tokens.
        """
        places = [p for p in self.places(fingerprint) if 0 < p.position <= len(tokens)]
        digests = manifests.prefix_digests(tokens, sorted({p.position for p in places}))
        found = [p for p in places if digests[p.position] == p.tokens_digest]
        return sorted(found, key=lambda p: (-p.position, p.id))

    # -- loading --------------------------------------------------------------------------------

    def load(self, engine: TokenEngine, which: str | Place) -> Capsule:
        """A stored capsule, on the disk tier; rows that the engine knows already are shared.

        Raises StoreError or CapsuleError for what is missing, damaged or foreign; nothing is
        changed then.
        """
        return engine.capsules.change(lambda: self._load(engine, which))

    def _load(self, engine: TokenEngine, which: str | Place) -> Capsule:
        place = which if isinstance(which, Place) else self.resolve(which)
        found, table = self.manifest(place), engine.capsules
        where = f"{self.folder.url}/{place.name}"
        self._check(engine, found, where)
        tokens = [self._tokens(s) for s in found.segments]
        together = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        if manifests.tokens_digest(together) != found.tokens_digest:
            raise StoreError(f"{where}: its tokens do not match their digest")
        fixed = self._source(found.fixed)
        slot = table.arena.lane(0).fixed.slot("cursor")
        first = slot.offset - table.arena.lane(0).fixed.offset
        cursor = fixed.look()[first : first + slot.storage.nbytes]
        check_state(where, cursor, together, found.position, engine.vocab_size)
        known = self._known.setdefault(table, _Known())
        segment: Segment | None = None
        for record, part in zip(found.segments, tokens, strict=True):
            segment = self._segment(known, segment, record, part)
        own = found.segments[-1].rows.nbytes if found.segments else 0
        extent = Extent(found.fixed.nbytes, fixed)
        nbytes = found.fixed.nbytes + own
        capsule = Capsule(table, segment, extent, nbytes, self._name_of(place), found.digest)
        table.adopt(capsule)
        known.capsules[capsule] = place
        return capsule

    def remove(self, which: str | Place) -> Place:
        """Forget a name, and the capsule when it was its last; by id, the capsule and all names.

        Its objects go with the next sweep. Raises StoreError when there is no such capsule.

        Without a lock, the same capsule may be saved under another name meanwhile. The save looks
        for the manifest again once its name is there; this looks for names again once the manifest
        is gone. So one of the two sees the other, and writes the manifest again.
        """
        with self.folder.sweeping():
            refs = self.refs()
            place = which if isinstance(which, Place) else self.resolve(which)
            names = [name for name, target in refs.items() if target == place]
            if isinstance(which, str) and which in refs:
                names.remove(which)
                self.folder.delete(_ref_file(which))
                if names:
                    return place
            for name in names:
                self.folder.delete(_ref_file(name))
            text = self.folder.read(place.name).copy()
            self.folder.delete(place.name)
            if place.name in self._targets().values():
                self.folder.write(place.name, text)
        return place

    # -- inside ---------------------------------------------------------------------------------

    def _targets(self) -> dict[str, str]:
        """Names, and the manifests that they stand for, be they there or not."""
        targets: dict[str, str] = {}
        for entry in self.folder.list(REFS):
            try:
                text = self.folder.read(entry.name)[:256].tobytes()
            except StoreError:
                if self.folder.size(entry.name) is None:  # removed since it was listed
                    continue
                raise
            name = urllib.parse.unquote(entry.name.removeprefix(f"{REFS}/"))
            targets[name] = text.decode("utf-8", "replace").strip()
        return targets

    def _publish(
        self, table: CapsuleOwner, known: _Known, segment: Segment, tally: list[int]
    ) -> SegmentRecord:
        record = known.records.get(segment.rows)
        if record is not None and all(self._has(r) for r in (record.rows, record.tokens)):
            tally[2] += record.rows.nbytes + record.tokens.nbytes
            return record
        tokens = np.ascontiguousarray(segment.tokens, "<i4").view(np.uint8)
        rows = self._put(rows_image(table.arena, segment), tally)
        record = SegmentRecord(segment.start, segment.stop, rows, self._put(tokens, tally))
        known.records[segment.rows] = record
        known.segments[segment.parent, rows.digest, segment.stop] = segment
        return record

    def _put(self, data: NDArray[np.uint8], tally: list[int]) -> ObjectRef:
        stored, is_new = put(self.folder, data)
        tally[0] += is_new
        tally[1 if is_new else 2] += stored.nbytes
        return ObjectRef(stored.digest, stored.nbytes)

    def _has(self, ref: ObjectRef) -> bool:
        return self._source(ref).is_there

    def _source(self, ref: ObjectRef) -> StoredObject:
        return StoredObject(self.folder, ref.digest, ref.nbytes)

    def _parent_id(self, capsule: Capsule, known: _Known) -> str | None:
        parent = capsule.parent
        while parent is not None:
            place = known.capsules.get(parent)
            if place is not None and self.folder.size(place.name) is not None:
                return place.id
            parent = parent.parent
        return None

    def _check(self, engine: TokenEngine, found: Manifest, where: str) -> None:
        table = engine.capsules
        if found.fingerprint != table.fingerprint:
            raise CapsuleError(
                f"{where}: made by another model, precision, plan or kernel version: its "
                f"fingerprint is {found.fingerprint}, the engine's {table.fingerprint}"
            )
        if found.position > engine.max_positions:
            raise CapsuleError(
                f"{where}: position {found.position} > max_positions {engine.max_positions}; load "
                "the engine with a larger max_positions"
            )
        rows = table.arena.lane(0).rows
        sizes = [segment_layout(rows, s.start, s.stop)[1] for s in found.segments]
        if [s.rows.nbytes for s in found.segments] != sizes or (
            found.fixed.nbytes != table.fixed_nbytes
        ):
            raise StoreError(f"{where}: sizes of its objects do not fit the engine's plan")
        gone = [ref.digest for ref in found.objects if not self._has(ref)]
        if gone:
            raise StoreError(f"{where}: objects {listed(gone)} are missing or have another size")

    def _tokens(self, record: SegmentRecord) -> NDArray[np.int32]:
        raw = self._source(record.tokens).read()
        return raw.view("<i4").astype(np.int32)

    def _segment(
        self,
        known: _Known,
        parent: Segment | None,
        record: SegmentRecord,
        tokens: NDArray[np.int32],
    ) -> Segment:
        """The engine's segment of these rows; made, or given its bytes back, when it has none."""
        key = (parent, record.rows.digest, record.stop)
        segment = known.segments.get(key)
        if segment is None or known.records.get(segment.rows) != record:  # or it was merged since
            rows = Extent(record.rows.nbytes)
            segment = Segment(parent, record.start, record.stop, tokens, rows)
            known.segments[key] = segment
            known.records[rows] = record
        if not segment.is_stored:
            segment.rows.place = self._source(record.rows)
        return segment

    def _name_of(self, place: Place) -> str | None:
        return next((name for name, target in self.refs().items() if target == place), None)


def _oldest_first(capsule: Capsule) -> list[Segment]:
    return list(chain_of(capsule.segment))[::-1]


def _ref_file(name: str) -> str:
    quoted = urllib.parse.quote(name, safe="")
    if not 0 < len(quoted) <= 200:
        raise StoreError(f"{name!r} is not a name: 1 to 200 bytes when percent-encoded")
    return f"{REFS}/{quoted.replace('.', '%2E', 1) if quoted.startswith('.') else quoted}"
