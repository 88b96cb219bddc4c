"""Upkeep of a store: sweep what nobody refers to, check every byte, tell what is shared.

IS: garbage collection, verification, totals. IS NOT: publishing (store).

Every manifest is a root: a capsule stays until it is removed, whether or not it has a name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashrt.base.errors import StoreError
from flashrt.store import manifest as manifests
from flashrt.store.manifest import Manifest, ObjectRef, Place
from flashrt.store.objects import OBJECTS, StoredObject, object_name
from flashrt.store.store import REFS, Store


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed."""

    objects: int
    nbytes: int
    names: int  # refs to capsules that are gone


@dataclass(slots=True)
class Verdict:
    """What a check found; fine when there are no problems."""

    capsules: int = 0
    objects: int = 0
    nbytes: int = 0
    unused_nbytes: int = 0  # of objects that nobody refers to; `gc` removes them
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a store shares."""

    capsules: int
    stored_nbytes: int
    separate_nbytes: int  # if every capsule had objects of its own


def sweep(store: Store) -> Swept:
    """Remove objects that no manifest needs, and names of capsules that are gone.

    Raises StoreError, removing nothing, while a manifest is damaged: it might need any object.
    """
    with store.folder.sweeping() as youngest_s:
        needed = {object_name(r.digest) for p in store.places() for r in store.manifest(p).objects}
        unused = [
            e for e in store.folder.list(OBJECTS) if e.name not in needed and e.age_s >= youngest_s
        ]
        for entry in unused:
            store.folder.delete(entry.name)
        names = 0
        living = {p.name for p in store.places()}
        for entry in store.folder.list(REFS):
            target = store.folder.read(entry.name)[:256].tobytes().decode("utf-8", "replace")
            if target.strip() not in living:
                store.folder.delete(entry.name)
                names += 1
    return Swept(len(unused), sum(e.nbytes for e in unused), names)


def verify(store: Store) -> Verdict:
    """Read everything once. Problems are collected, not raised. A file that another process
    removes meanwhile is not a problem.
    """
    found = Verdict()
    wanted: dict[ObjectRef, list[Place]] = {}
    for place, manifest in _manifests(store, found):
        for ref in manifest.objects:
            wanted.setdefault(ref, []).append(place)
    for ref, places in wanted.items():
        try:
            StoredObject(store.folder, ref.digest, ref.nbytes).read()
        except StoreError as error:
            found.problems += [
                f"{place.id[:8]} at {place.position}: {error}"
                for place in places
                if store.folder.size(place.name) is not None
            ][:1]
        found.objects += 1
        found.nbytes += ref.nbytes
    needed = {object_name(ref.digest) for ref in wanted}
    unused = (e.nbytes for e in store.folder.list(OBJECTS) if e.name not in needed)
    found.unused_nbytes = sum(unused)
    for entry in store.folder.list(manifests.CAPSULES):
        if manifests.place_of(entry.name) is None:
            found.problems.append(f"{entry.name} is no manifest")
    return found


def totals(store: Store) -> Totals:
    """Bytes of all objects once, and as if nothing were shared. Raises StoreError."""
    found = [store.manifest(p).objects for p in store.places()]
    together = {ref for refs in found for ref in refs}
    return Totals(
        len(found), sum(r.nbytes for r in together), sum(r.nbytes for refs in found for r in refs)
    )


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
