"""The store: capsules that outlive the process, in a folder that works like git's.

IS: publish (save), load, names, and the search for the longest stored prefix of a prompt.
    format               what this folder is
    objects/ab/cdef...   segments' rows, segments' tokens, fixed bands; named by content
    capsules/FINGERPRINT/POSITION-TOKENS-ID.json    manifests
    refs/NAME            one line: the manifest that a name stands for
    notes/ID/DIGEST.json    what was recorded beside a capsule
IS NOT: files (directory, remote), sweeping and checking (upkeep), or sessions (opening).

Order of writes: objects, manifest, name. So whatever is seen is whole, and a killed writer leaves
objects that nobody refers to. A capsule that is loaded stays on the disk tier until it is restored.
"""

from __future__ import annotations

import difflib
import errno
import functools
import os
import urllib.parse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, StoreError
from flashrt.base.messages import listed, shown
from flashrt.capsule.capsule import Capsule, CapsuleOwner
from flashrt.capsule.extent import Extent, Tier
from flashrt.capsule.file import CapsuleHeader, admit_image
from flashrt.capsule.image import begin_fixed_image, begin_rows_image, rows_image
from flashrt.capsule.lineage import Segment, chain_of, segment_layout
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes
from flashrt.engine.engine import Engine
from flashrt.store import manifest as manifests
from flashrt.store.directory import Directory
from flashrt.store.folder import FORMAT_FILE, REFS, Folder, Publishing
from flashrt.store.manifest import Manifest, ObjectRef, Place, SegmentRecord
from flashrt.store.notes import Notes, read_notes, write_notes
from flashrt.store.objects import Near, StoredObject, object_id, object_name
from flashrt.store.remote import Remote
from flashrt.store.reuse import Rates

FORMAT = b"flashrt-store-1\n"
_NO_REF = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG)
_TRIES = 5  # of a save that sweeps took for dead, each time after a minute of silence
_MOST_COMPARED = 2000  # names with one that was mistyped
_LOCAL = ("file://", "local://")  # fsspec's names for what a Directory does better


@dataclass(frozen=True, slots=True)
class Saved:
    """What `Store.save` did."""

    place: Place
    new_objects: int
    new_nbytes: int
    shared_nbytes: int  # in the store already


_Image = Callable[[], Bytes]
_RowsOf = Callable[[Arena, Segment, SegmentRecord | None], _Image]


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


@dataclass(slots=True)
class _Tally:
    """What a save wrote, and what it found."""

    new_objects: int = 0
    new_nbytes: int = 0
    shared_nbytes: int = 0


class Store:
    """A repository of capsules. Several processes may use one at the same time."""

    def __init__(self, url: str | os.PathLike[str], *, is_shared: bool = False) -> None:
        """A directory (made at the first save), or an fsspec URL such as s3://bucket/store.

        is_shared: a store made here has the modes that the umask gives, for a group or for all;
        else only its owner can read it. One that exists stays as it was made. Raises StoreError
        when there is something else.
        """
        self.folder: Folder = open_folder(os.fspath(url), is_shared=is_shared)
        self._has_format()
        self.rates = Rates()
        self._near = Near()
        self._known: weakref.WeakKeyDictionary[CapsuleOwner, _Known] = weakref.WeakKeyDictionary()

    @property
    def is_there(self) -> bool:
        """Whether something was saved here ever."""
        return self.folder.size(FORMAT_FILE) is not None

    # -- publishing -----------------------------------------------------------------------------

    def save(self, capsule: Capsule, name: str | None = None, notes: Notes | None = None) -> Saved:
        """Publish a capsule, whole or not at all; objects that are there are not written again, but
        read: one that was damaged is replaced.

        `name`: a ref for it (default: the capsule's name); a ref that exists moves. `notes`: see
        `annotate`. Raises CapsuleError for a dropped capsule, StoreError for notes that are not
        about its tokens, or when the store cannot be written.
        """
        return capsule.owner.change(lambda: self._save(capsule, name, notes))

    def _save(self, capsule: Capsule, name: str | None, notes: Notes | None = None) -> Saved:
        saving = self._taken(capsule, name, notes, _rows_when_asked)
        saved = saving.publish()
        saving.finish()
        return saved

    def begin(
        self, capsule: Capsule, name: str | None = None, notes: Notes | None = None
    ) -> Saving:
        """The first half of a save: what it needs of the engine is copied into host memory. The
        other half, `publish`, keeps nobody from using the engine, and may run in any thread.

        Raises CapsuleError for a dropped capsule, or bytes that cannot be read.
        """
        return capsule.owner.change(lambda: self._taken(capsule, name, notes, self._rows_at_once))

    def _taken(
        self, capsule: Capsule, name: str | None, notes: Notes | None, rows: _RowsOf
    ) -> Saving:
        table = capsule.owner
        table.check(capsule)
        if notes is not None:
            notes.check(capsule.tokens)
        name = capsule.name if name is None else name
        ref = None if name is None else ref_file(name)
        known = self._known.setdefault(table, _Known())
        parts = []
        for segment in _oldest_first(capsule):
            record = known.records.get(segment.rows)
            image = rows(table.arena, segment, record)
            extent, parent = segment.rows, segment.parent
            tokens = np.ascontiguousarray(segment.tokens, "<i4").view(np.uint8)
            parts.append(
                _Part(segment, parent, extent, segment.start, segment.stop, tokens, record, image)
            )
        parents, parent_ = [], capsule.parent
        while parent_ is not None:
            if (place := known.capsules.get(parent_)) is not None:
                parents.append(place)
            parent_ = parent_.parent
        return Saving(
            self, capsule, ref, tuple(parts), _once(begin_fixed_image(table.arena, capsule.fixed)),
            manifests.tokens_digest(capsule.tokens), capsule.digest, tuple(parents), notes,
        )  # fmt: skip

    def _rows_at_once(self, arena: Arena, segment: Segment, record: SegmentRecord | None) -> _Image:
        """Rows that are stored already are not copied; should they be lost within this save, it
        fails.
        """
        if record is not None and self.folder.has(
            object_name(record.rows.digest), record.rows.digest, record.rows.nbytes
        ):
            return _lost
        return _once(begin_rows_image(arena, segment))

    def publish(self, saving: Saving) -> tuple[Saved, list[SegmentRecord]]:
        """See Saving.publish."""
        with self.folder.publishing() as turn:
            for _ in range(_TRIES):
                tally = _Tally()
                place, records, is_there = self._publish(saving, turn, tally)
                if saving.notes is not None:
                    write_notes(self.folder, turn, place, saving.notes)
                if turn.still_counts() and is_there:
                    saved = Saved(place, tally.new_objects, tally.new_nbytes, tally.shared_nbytes)
                    return saved, records
        raise StoreError(
            f"{self.folder.url}: what this save wrote was removed again, {_TRIES} times, by sweeps "
            "that took it for dead or by somebody else; nothing is reported saved. Save again"
        )

    def _publish(
        self, saving: Saving, turn: Publishing, tally: _Tally
    ) -> tuple[Place, list[SegmentRecord], bool]:
        """Objects, manifest, name; then a look at all of them: whether they are there."""
        if not self._has_format():
            self.folder.write(FORMAT_FILE, _bytes(FORMAT))
        put, ref = _Put(self.folder, turn, tally), saving.ref
        records = [part.put(put) for part in saving.parts]
        parents = (p.id for p in saving.parents if self.folder.size(p.name) is not None)
        made = Manifest(
            fingerprint=saving.capsule.owner.fingerprint,
            position=records[-1].stop if records else 0,
            tokens_digest=saving.tokens_digest,
            digest=saving.digest,
            parent=next(parents, None),
            fixed=put(saving.fixed()),
            segments=tuple(records),
        )
        place, text = made.encode()
        self._write(place, text)
        if ref is not None:
            turn.spare(ref)
            self.folder.write(ref, _bytes(f"{place.name}\n".encode()))
            self._write(place, text)  # it may have been removed meanwhile, see `remove`
        is_there = self._has_format() and all(self._source(r).is_there for r in made.objects)
        if ref is not None and manifests.place_of(self._target(ref) or "") is None:
            is_there = False
        return place, records, is_there

    def finish(self, saving: Saving, place: Place, records: Sequence[SegmentRecord]) -> None:
        """See Saving.finish."""
        known = self._known[saving.capsule.owner]
        for part, record in zip(saving.parts, records, strict=True):
            known.records[part.extent] = record
            known.segments[part.parent, record.rows.digest, record.stop] = part.segment
        known.capsules[saving.capsule] = place

    def _write(self, place: Place, text: Bytes) -> None:
        """A manifest, unless it is there and whole."""
        if not self.folder.has(place.name, place.id, text.nbytes):
            self.folder.write(place.name, text)
            self.folder.check(place.name, place.id, text.nbytes)

    def offload(self, capsule: Capsule) -> Saved:
        """Publish a capsule and move it to the disk tier: its bytes are in the store. They are read
        back before memory is given away.
        """
        return capsule.owner.change(lambda: self._offload(capsule))

    def _offload(self, capsule: Capsule) -> Saved:
        saved = self._save(capsule, None)
        known = self._known[capsule.owner]
        made = self.manifest(saved.place)
        sources = {capsule.fixed: self._source(made.fixed)}
        for segment in chain_of(capsule.segment):
            sources[segment.rows] = self._source(known.records[segment.rows].rows)
        for extent, source in sources.items():
            if extent.tier is not Tier.DISK:
                source.check()
        capsule.owner.offload(capsule, sources)
        return saved

    def annotate(self, which: str | Place, notes: Notes) -> Place:
        """Record notes beside a stored capsule, in place of those that it has; the capsule stays as
        it is. They go with it, at the next sweep.

        Raises StoreError where there is no such capsule, for notes that are not about its tokens,
        or when the store cannot be written.
        """
        place = which if isinstance(which, Place) else self.resolve(which)
        found = self.manifest(place)
        notes.check(self.tokens(found))
        with self.folder.publishing() as turn:
            for _ in range(_TRIES):
                write_notes(self.folder, turn, place, notes)
                if turn.still_counts():
                    break
            else:
                raise StoreError(f"{self.folder.url}: sweeps took this for dead; annotate again")
            if self.folder.size(place.name) is None:
                raise StoreError(f"{self.folder.url}/{place.name} was removed meanwhile")
        return place

    # -- questions ------------------------------------------------------------------------------

    def places(self, fingerprint: str | None = None) -> list[Place]:
        """All capsules, or those of a fingerprint; by fingerprint, position, id."""
        below = manifests.CAPSULES + (f"/{fingerprint}" if fingerprint else "")
        found = (manifests.place_of(name) for name in self.folder.names(below))
        return [p for p in found if p is not None]

    def refs(self) -> dict[str, Place]:
        """Names and what they stand for; a name whose capsule was removed is left out."""
        targets = self._targets()
        there = {p.name: p for p in self.places()}  # listed last: they are written before names
        return {name: there[target] for name, target in targets.items() if target in there}

    def refs_and_targets(self) -> list[tuple[str, str]]:
        """Files of names, and the manifests that they stand for, be these there or not."""
        found = ((ref, self._target(ref)) for ref in self.folder.names(REFS))
        return [(ref, target) for ref, target in found if target is not None]

    def named(self, which: str) -> Place | None:
        """The capsule that a name stands for; None where there is no such name, or no capsule.
        Raises StoreError for a name that cannot be read.
        """
        try:
            ref = ref_file(which)
        except StoreError:  # it is no name: perhaps an id
            return None
        place = manifests.place_of(self._target(ref) or "")
        return place if place is not None and self.folder.size(place.name) is not None else None

    def resolve(self, which: str) -> Place:
        """The capsule that a name or the beginning of an id (at least 4 digits) stands for.

        Raises StoreError when there is none, or more than one.
        """
        if (named := self.named(which)) is not None:
            return named
        matching = [p for p in self.places() if len(which) >= 4 and p.id.startswith(which)]
        if len(matching) == 1:
            return matching[0]
        raise self.no_such(which, matching)

    def no_such(self, which: str, matching: Sequence[Place]) -> StoreError:
        """The error for what stands for several capsules or for none, with those that were perhaps
        meant: by id, position and name.
        """
        names = self.refs()
        if matching:
            by_place = {place: name for name, place in names.items()}
            digits = _digits_apart([p.id for p in matching])
            candidates = [
                f"{p.id[:digits]} at {p.position:,}"
                + (f" ({by_place[p]})" if p in by_place else "")
                for p in matching
            ]
            what = f"{which!r} may be any of {len(matching)} capsules: {listed(candidates)}"
            return StoreError(f"{self.folder.url}: {what}; give more digits, or a name")
        close = difflib.get_close_matches(which, list(names)[:_MOST_COMPARED], n=3, cutoff=0.5)
        close = close or list(names)
        there = f"there is {listed(close)}" if close else "no capsule here has a name"
        return StoreError(
            f"{self.folder.url}: no capsule is called {which!r}; {there}; `flashrt store ls` lists "
            "what is there"
        )

    def manifest(self, place: Place) -> Manifest:
        """The checked manifest of a capsule. Raises StoreError."""
        return manifests.decode(place, self.folder.read(place.name, place.id))

    def tokens(self, found: Manifest, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """Tokens [start, stop) of a capsule, int32, stop being its position unless given; only the
        segments that have them are read. Raises StoreError for what is gone or damaged.
        """
        stop = found.position if stop is None else min(stop, found.position)
        parts = [
            self._tokens(s)[max(start - s.start, 0) : stop - s.start]
            for s in found.segments
            if s.start < stop and s.stop > start
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def notes(self, which: str | Place) -> tuple[Notes | None, list[str]]:
        """What is recorded beside a capsule, and what is wrong with what cannot be read. Raises
        StoreError where there is no such capsule.
        """
        place = which if isinstance(which, Place) else self.resolve(which)
        return read_notes(self.folder, place)

    def find(self, fingerprint: str, tokens: NDArray[np.int32]) -> list[Place]:
        """Stored capsules whose tokens are a prefix of `tokens`, deepest first.

        One listing, and no file is read: names carry positions and digests of tokens.
        """
        places = [p for p in self.places(fingerprint) if 0 < p.position <= len(tokens)]
        digests = manifests.prefix_digests(tokens, sorted({p.position for p in places}))
        found = [p for p in places if digests[p.position] == p.tokens_digest]
        return sorted(found, key=lambda p: (-p.position, p.id))

    # -- loading --------------------------------------------------------------------------------

    def load(self, engine: Engine, which: str | Place) -> Capsule:
        """A stored capsule, on the disk tier; rows that the engine knows already are shared. Its
        name is the one that it was asked for by.

        Raises StoreError or CapsuleError for what is missing, damaged or foreign; nothing is
        changed then.
        """
        return engine.capsules.change(lambda: self._load(engine, which))

    def _load(self, engine: Engine, which: str | Place) -> Capsule:
        named = self.named(which) if isinstance(which, str) else None
        name = which if named is not None and isinstance(which, str) else None
        place = named or (which if isinstance(which, Place) else self.resolve(which))
        found, table = self.manifest(place), engine.capsules
        where = f"{self.folder.url}/{place.name}"
        self._check(engine, found, where)
        tokens = [self._tokens(s) for s in found.segments]
        together = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        if manifests.tokens_digest(together) != found.tokens_digest:
            raise StoreError(f"{where}: its tokens do not match their digest")
        fixed = self._source(found.fixed)
        self._admit(engine, found, where, fixed.look(), together)
        known = self._known.setdefault(table, _Known())
        segment: Segment | None = None
        for record, part in zip(found.segments, tokens, strict=True):
            segment = self._segment(known, segment, record, part)
        own = found.segments[-1].rows.nbytes if found.segments else 0
        extent = Extent(found.fixed.nbytes, fixed)
        capsule = Capsule(table, segment, extent, found.fixed.nbytes + own, name, found.digest)
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
        with self.folder.removing() as turn:
            named = self.named(which) if isinstance(which, str) else None
            place = named or (which if isinstance(which, Place) else self.resolve(which))
            if named is None and self.folder.size(place.name) is None:
                raise StoreError(f"{self.folder.url}/{place.name}: there is no such capsule")
            refs = [ref for ref, target in self.refs_and_targets() if target == place.name]
            if named is not None and isinstance(which, str):
                self.folder.delete(ref_file(which))
                if set(refs) - {ref_file(which)}:
                    return place
            for ref in refs:
                self.folder.delete(ref)
            text = self.folder.read_text(place.name, manifests.MOST_NBYTES)
            self.folder.delete(place.name)
            if turn is not None and any(t == place.name for _, t in self.refs_and_targets()):
                self._write(place, _bytes(text))
                if not turn.still_counts():
                    raise StoreError(
                        f"{self.folder.url}: a sweep took this removal for dead; run `flashrt "
                        "store verify`, and save again what it names"
                    )
        return place

    # -- inside ---------------------------------------------------------------------------------

    def _has_format(self) -> bool:
        """Whether the file is whole. One that was cut short, as by a writer that was killed where
        files are written in place, is written again by the next save. Raises StoreError.
        """
        if not self.is_there:
            return False
        found = self.folder.read_text(FORMAT_FILE)
        if not FORMAT.startswith(found):
            raise StoreError(
                f"{self.folder.url}: format {shown(found[:64])}, this version reads {FORMAT!r}"
            )
        return found == FORMAT

    def _target(self, ref: str) -> str | None:
        """The manifest that a ref stands for, be it there or not. None where there is no such ref,
        or something else of this name.
        """
        try:
            text = self.folder.read_text(ref)
        except StoreError as error:
            cause = error.__cause__
            if cause is None or (isinstance(cause, OSError) and cause.errno in _NO_REF):
                return None
            raise
        return text.decode("utf-8", "replace").strip()

    def _targets(self) -> dict[str, str]:
        """The same by names as people give them."""
        return {
            urllib.parse.unquote(ref.removeprefix(f"{REFS}/")): target
            for ref, target in self.refs_and_targets()
        }

    def _source(self, ref: ObjectRef) -> StoredObject:
        return StoredObject(self.folder, ref.digest, ref.nbytes, near=self._near)

    def _check(self, engine: Engine, found: Manifest, where: str) -> None:
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
        gone = [ref.digest for ref in found.objects if not self._source(ref).is_there]
        if gone:
            raise StoreError(f"{where}: objects {listed(gone)} are missing or have another size")

    def _admit(
        self,
        engine: Engine,
        found: Manifest,
        where: str,
        fixed: Bytes,
        tokens: NDArray[np.int32],
    ) -> None:
        """The engine's own checks, as of a file. Raises CapsuleError."""
        header = CapsuleHeader(
            path=Path(where),
            fingerprint=found.fingerprint,
            position=found.position,
            name=None,
            digest=found.digest,
            parent_digest=None,
            table={},
            sums={},
        )
        admit_image(engine.arena, header, fixed, tokens, engine.admit)

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


@dataclass(frozen=True, slots=True)
class _Put:
    """Objects of one save, within its turn, counted."""

    folder: Folder
    turn: Publishing
    tally: _Tally

    def __call__(self, data: Bytes) -> ObjectRef:
        """An object of these bytes, written unless it is there and whole."""
        ref = ObjectRef(object_id(data), data.nbytes)
        if not self.shares(ref):
            self.folder.write(object_name(ref.digest), data)
            self.tally.new_objects += 1
            self.tally.new_nbytes += ref.nbytes
        return ref

    def shares(self, *refs: ObjectRef) -> bool:
        """Whether all are there and whole; then they are counted."""
        for ref in refs:
            self.turn.spare(object_name(ref.digest))
        is_shared = all(self.folder.has(object_name(r.digest), r.digest, r.nbytes) for r in refs)
        self.tally.shared_nbytes += is_shared * sum(r.nbytes for r in refs)
        return is_shared


@dataclass(frozen=True, slots=True)
class _Part:
    """A segment as it was when a save began; it may be merged with another meanwhile."""

    segment: Segment
    parent: Segment | None
    extent: Extent
    start: int
    stop: int
    tokens: Bytes
    record: SegmentRecord | None  # where its bytes are in the store, if they were put there
    rows: _Image

    def put(self, put: _Put) -> SegmentRecord:
        """Its objects, written unless they are there and whole."""
        if self.record is not None and put.shares(self.record.rows, self.record.tokens):
            return self.record
        return SegmentRecord(self.start, self.stop, put(self.rows()), put(self.tokens))


@dataclass(slots=True)
class Saving:
    """A save that has begun: see Store.begin."""

    store: Store
    capsule: Capsule
    ref: str | None
    parts: tuple[_Part, ...]
    fixed: _Image
    tokens_digest: str
    digest: str
    parents: tuple[Place, ...]  # stored ancestors, the nearest first
    notes: Notes | None
    _done: tuple[Place, list[SegmentRecord]] | None = None

    @property
    def place(self) -> Place | None:
        """Where it is, once it was published."""
        return None if self._done is None else self._done[0]

    def publish(self) -> Saved:
        """Write it, whole or not at all. Uses no engine. Raises StoreError."""
        saved, records = self.store.publish(self)
        self._done = saved.place, records
        return saved

    def finish(self) -> None:
        """It was published: later saves and loads of this process know so. For whoever uses the
        engine.
        """
        assert self._done is not None, "after publish"
        done = self._done
        self.capsule.owner.change(lambda: self.store.finish(self, *done))


def _rows_when_asked(arena: Arena, segment: Segment, _: SegmentRecord | None) -> _Image:
    """For a save that has the engine until its end: only what is not stored yet is copied."""
    return lambda: rows_image(arena, segment)


def _once(image: _Image) -> _Image:
    """What the device sends is taken once."""
    return functools.cache(image)


def _lost() -> Bytes:
    raise StoreError("what a save relied on was removed from the store meanwhile; save again")


def open_folder(url: str, *, is_shared: bool = False) -> Folder:
    """A directory path, or a URL of fsspec (s3://bucket/store, gs://..., memory://...)."""
    for scheme in _LOCAL:
        if url.startswith(scheme):
            return Directory(Path(url.removeprefix(scheme)), is_shared=is_shared)
    return Remote(url) if "://" in url else Directory(Path(url), is_shared=is_shared)


def _oldest_first(capsule: Capsule) -> list[Segment]:
    return list(chain_of(capsule.segment))[::-1]


def _digits_apart(ids: Sequence[str]) -> int:
    """The fewest digits, 8 at least, that tell ids apart."""
    for digits in range(8, 32):
        if len({id[:digits] for id in ids}) == len(ids):
            return digits
    return 32


def _bytes(text: bytes) -> Bytes:
    return np.frombuffer(text, np.uint8)


def ref_file(name: str) -> str:
    """The file of a ref. Raises StoreError for what cannot be a name."""
    quoted = urllib.parse.quote(name, safe="")
    if not 0 < len(quoted) <= 200:
        raise StoreError(f"{name!r} is not a name: 1 to 200 bytes when percent-encoded")
    return f"{REFS}/{quoted.replace('.', '%2E', 1) if quoted.startswith('.') else quoted}"
