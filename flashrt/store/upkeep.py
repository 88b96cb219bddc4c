"""Upkeep of a store: sweep what nobody refers to, check every byte, tell what is shared.

IS: garbage collection, verification, totals. IS NOT: publishing (store).

Every manifest is a root: a capsule stays until it is removed, whether or not it has a name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field

from flashrt.base.errors import StoreError
from flashrt.store import manifest as manifests
from flashrt.store.folder import REFS, TMP, Entry
from flashrt.store.manifest import Manifest, ObjectRef, Place
from flashrt.store.notes import NOTES, Notes, capsule_of
from flashrt.store.objects import OBJECTS, StoredObject, is_object, object_name
from flashrt.store.store import Store


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed, and what it left alone."""

    objects: int
    nbytes: int
    names: int  # refs to capsules that are gone
    young: int = 0  # files that nobody needs, but that are young, or of an age that is unknown
    strays: int = 0  # files that are not the store's
    notes: int = 0  # files of notes on capsules that are gone


@dataclass(slots=True)
class Verdict:
    """What a check found; fine when there are no problems."""

    capsules: int = 0
    objects: int = 0
    nbytes: int = 0
    unused_nbytes: int = 0  # of objects that nobody refers to; `gc` removes them
    strays: int = 0  # files that are not the store's
    notes: int = 0  # capsules that have some
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a store shares."""

    capsules: int
    stored_nbytes: int
    separate_nbytes: int  # if every capsule had objects of its own
    strays: int  # files that are not the store's


def sweep(store: Store, *, take_over: bool = False, grace_s: float | None = None) -> Swept:
    """Remove objects that no manifest needs, and names of and notes on capsules that are gone.

    grace_s: younger files stay (default: as long as the folder needs). take_over: a sweep that did
    not end is known to be dead. Raises StoreError, removing nothing, while a manifest is damaged
    (it might need any object), or another sweep is at work.
    """
    folder = store.folder
    with folder.sweeping(take_over=take_over) as turn:
        least_s = turn.grace_s if grace_s is None else grace_s
        needed = set[str]()
        for place in store.places():
            needed |= {object_name(r.digest) for r in store.manifest(place).objects}
            turn.go_on()
        places = store.places()
        living = {p.name for p in places}
        targets = [(r, t) for r, t in store.refs_and_targets() if manifests.place_of(t) is not None]
        dead = [ref for ref, target in targets if target not in living]
        turn.go_on()
        objects = [e for e in folder.list(OBJECTS) if e.is_plain and is_object(e.name)]
        unused = [e for e in objects if e.name not in needed]
        unused += _orphans(store, places)
        left = [e for e in folder.list(TMP) if e.is_plain]  # by writers who are dead
        gone = [e for e in (*unused, *left) if _is_older(e, least_s)]
        turn.condemn([*(e.name for e in gone), *dead])
        for name in (*(e.name for e in gone), *dead):
            turn.go_on()
            folder.delete(name)
    objects, notes = (
        [e for e in gone if is_ours(e.name)]
        for is_ours in (is_object, lambda name: capsule_of(name) is not None)
    )
    young = len(unused) + len(left) - len(gone)
    nbytes = sum(e.nbytes for e in (*objects, *notes))
    return Swept(len(objects), nbytes, len(dead), young, len(strays(store)), len(notes))


def strays(store: Store) -> list[str]:
    """Files in the store's folders that are not the store's: left alone, by a sweep too."""
    refs = {r for r, target in store.refs_and_targets() if manifests.place_of(target) is not None}
    folders = (OBJECTS, manifests.CAPSULES, REFS, NOTES)
    found = [e for below in folders for e in store.folder.list(below)]
    return [
        e.name
        for e in found
        if manifests.place_of(e.name) is None  # one that is no file is a problem, see `verify`
        and not (e.is_plain and (e.name in refs or is_object(e.name) or capsule_of(e.name)))
    ]


def verify(store: Store) -> Verdict:
    """Read everything once. Problems are collected, not raised. A file that another process
    removes meanwhile is not a problem.
    """
    found = Verdict()
    wanted: dict[ObjectRef, list[Place]] = {}
    noted = {capsule_of(name) for name in store.folder.names(NOTES)}
    for place, manifest in _manifests(store, found):
        for ref in manifest.objects:
            wanted.setdefault(ref, []).append(place)
        if place.id in noted:
            found.notes += 1
            found.problems += _verify_notes(store, place, manifest)
    for ref, places in wanted.items():
        try:
            StoredObject(store.folder, ref.digest, ref.nbytes).check()
        except StoreError as error:
            found.problems += [
                f"{place.id[:8]} at {place.position}: {error}"
                for place in places
                if store.folder.size(place.name) is not None
            ][:1]
        found.objects += 1
        found.nbytes += ref.nbytes
    needed = {object_name(ref.digest) for ref in wanted}
    objects = [e for e in store.folder.list(OBJECTS) if e.is_plain and is_object(e.name)]
    unused = [e for e in objects if e.name not in needed]
    unused += _orphans(store, store.places())
    found.unused_nbytes = sum(e.nbytes for e in unused)
    found.strays = len(strays(store))
    return found


def totals(store: Store) -> Totals:
    """Bytes of all objects once, and as if nothing were shared. Raises StoreError."""
    found = [store.manifest(p).objects for p in store.places()]
    together = {ref for refs in found for ref in refs}
    return Totals(
        len(found),
        sum(r.nbytes for r in together),
        sum(r.nbytes for refs in found for r in refs),
        len(strays(store)),
    )


def _orphans(store: Store, places: Collection[Place]) -> list[Entry]:
    """Files of notes on capsules that are gone."""
    living = {p.id for p in places}
    listed = [(e, capsule_of(e.name)) for e in store.folder.list(NOTES) if e.is_plain]
    return [e for e, of in listed if of is not None and of not in living]


def _verify_notes(store: Store, place: Place, manifest: Manifest) -> list[str]:
    """What is wrong with a capsule's notes: they cannot be read, or are about other tokens."""
    notes, problems = store.notes(place)
    with contextlib.suppress(StoreError):  # a problem of objects
        tokens = store.tokens(manifest)
        try:
            (notes or Notes()).check(tokens)
        except StoreError as error:
            problems.append(f"{place.id[:8]} at {place.position}: {error}")
    return problems if store.folder.size(place.name) is not None else []


def _is_older(entry: Entry, least_s: float) -> bool:
    """Whether a file is old enough to go. One of an unknown age is young, where age matters."""
    return least_s <= 0 or (entry.age_s is not None and entry.age_s >= least_s)


def _manifests(store: Store, found: Verdict) -> list[tuple[Place, Manifest]]:
    good = []
    for place in store.places():
        try:
            good.append((place, store.manifest(place)))
        except StoreError as error:
            if store.folder.size(place.name) is not None:
                found.problems.append(str(error))
    found.capsules = len(good)
    return good
