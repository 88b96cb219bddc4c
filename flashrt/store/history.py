"""The history of a store: who descends from whom, and where two capsules part.

IS: the tree of stored capsules with what each one adds, one capsule by name or digest, the first
token in which two differ; all of it from the store's files, without an engine. IS NOT: text, or
output (commands). Damage is collected in `problems`; what is whole is told all the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import SessionError, StoreError
from flashrt.core.arena import GUARD_BYTE
from flashrt.core.backend import Bytes
from flashrt.core.planner import GUARD_NBYTES, align
from flashrt.ops.cursor import CURSOR_WORDS, CursorWord
from flashrt.ops.sample import BIAS_ENTRIES, SAMPLER_WORDS, SamplerParams, unpack
from flashrt.store import manifest as manifests
from flashrt.store.manifest import Manifest, Place
from flashrt.store.notes import NOTES, Notes, TokenNote, capsule_of
from flashrt.store.objects import StoredObject
from flashrt.store.store import Store

_LEAST_DIGITS = 4  # of the beginning of an id or a digest
_DIGITS = re.compile(rf"[0-9a-f]{{{_LEAST_DIGITS},32}}")


@dataclass(slots=True, eq=False)
class StoredCapsule:
    """A stored capsule in its tree."""

    place: Place
    manifest: Manifest
    names: tuple[str, ...]
    age_s: float | None  # since it was saved; None: the filesystem does not tell
    has_notes: bool
    parent: StoredCapsule | None = (
        None  # the one it was made from, or else the deepest that is there
    )
    children: list[StoredCapsule] = field(default_factory=list)

    @property
    def id(self) -> str:
        """32 hex digits."""
        return self.place.id

    @property
    def own_start(self) -> int:
        """Where its own tokens begin: the parent's position."""
        return 0 if self.parent is None else self.parent.place.position

    @property
    def own_nbytes(self) -> int:
        """Of the fixed band, and of what the parent does not have."""
        shared = set() if self.parent is None else {*self.parent.manifest.objects}
        own = {ref for s in self.manifest.segments for ref in (s.rows, s.tokens)} - shared
        return self.manifest.fixed.nbytes + sum(ref.nbytes for ref in own)

    @property
    def nbytes(self) -> int:
        """Of all that a load reads."""
        return sum(ref.nbytes for ref in self.manifest.objects)

    def path(self) -> Iterator[StoredCapsule]:
        """This capsule, its parent, and so on to the root."""
        at: StoredCapsule | None = self
        while at is not None:
            yield at
            at = at.parent


@dataclass(frozen=True, slots=True)
class Side:
    """What one of two capsules has from the position on where they part."""

    entry: StoredCapsule
    tokens: NDArray[np.int32]  # from that position; empty where it ends there
    note: TokenNote | None  # what is recorded of that position

    @property
    def token(self) -> int | None:
        """The first of them."""
        return int(self.tokens[0]) if len(self.tokens) else None

    def logprob_of(self, token: int | None) -> float | None:
        """Of a token at this place; None where it was not recorded."""
        return None if self.note is None or token is None else self.note.logprob_of(token)


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two capsules part: tokens [0, position) are those of both."""

    a: Side
    b: Side
    position: int
    ancestor: (
        StoredCapsule | None
    )  # the deepest capsule that both descend from; it may be one of them
    before: NDArray[np.int32]  # the last tokens that are those of both

    @property
    def relation(self) -> str:
        """`same tokens`, `a goes on`, `b goes on`, or `differ`."""
        ends = (self.a.token is None, self.b.token is None)
        return {
            (True, True): "same tokens",
            (False, True): "a goes on",
            (True, False): "b goes on",
            (False, False): "differ",
        }[ends]

    @property
    def is_one_model(self) -> bool:
        """Whether both were made by the same model, precision and kernels."""
        return self.a.entry.place.fingerprint == self.b.entry.place.fingerprint


class History:
    """The capsules of a store as they were when this was made."""

    def __init__(self, store: Store) -> None:
        """Reads all names and manifests. Raises StoreError where the store cannot be listed."""
        self.store = store
        self.problems: list[str] = []
        self._refs = store.refs()
        names: dict[Place, list[str]] = {}
        for name, named in sorted(self._refs.items()):
            names.setdefault(named, []).append(name)
        noted = {capsule_of(name) for name in store.folder.names(NOTES)}
        self.entries: dict[str, StoredCapsule] = {}
        self._unreadable: list[tuple[Place, StoreError]] = []
        for listed in store.folder.list(manifests.CAPSULES):
            place = manifests.place_of(listed.name)
            if place is None:
                continue
            try:
                found = store.manifest(place)
            except StoreError as error:
                if store.folder.size(place.name) is not None:  # else it was removed just now
                    self.problems.append(str(error))
                    self._unreadable.append((place, error))
                continue
            self.entries[place.id] = StoredCapsule(
                place, found, tuple(names.get(place, ())), listed.age_s, place.id in noted
            )
        self._find_parents()

    # -- the tree -------------------------------------------------------------------------------

    def newest_first(self) -> list[StoredCapsule]:
        """The roots, by their youngest descendants; children are put in this order too."""
        youngest: dict[str, tuple[float, int, str]] = {}
        roots = [e for e in self.entries.values() if e.parent is None]
        for entry in reversed(_parents_first(roots)):
            age = math.inf if entry.age_s is None else entry.age_s
            own = (age, -entry.place.position, entry.id)
            youngest[entry.id] = min([own, *(youngest[c.id] for c in entry.children)])
            entry.children.sort(key=lambda e: youngest[e.id])
        return sorted(roots, key=lambda e: youngest[e.id])

    def pick(self, which: str) -> StoredCapsule:
        """The capsule that a name stands for, or the beginning of its id or of its state's digest,
        at least 4 digits. Raises StoreError with candidates where there is none, or more than one.
        """
        entries = self.entries.values()
        named = [e for e in entries if which in e.names]
        begins = which if _DIGITS.fullmatch(which) else None
        for matching in (
            named,
            [e for e in entries if begins and e.id.startswith(begins)],
            [e for e in entries if begins and e.manifest.digest.startswith(begins)],
        ):
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise self.store.no_such(which, [e.place for e in matching])
        for place, error in self._unreadable:
            if self._refs.get(which) == place or (begins and place.id.startswith(begins)):
                raise error
        raise self.store.no_such(which, [])

    def tokens(self, entry: StoredCapsule, start: int, stop: int) -> NDArray[np.int32] | None:
        """Tokens [start, stop) of a capsule; None, and a problem, where they cannot be read."""
        try:
            return self.store.tokens(entry.manifest, start, stop)
        except StoreError as error:
            self._problem(str(error))
            return None

    def notes(self, entry: StoredCapsule) -> Notes | None:
        """What is recorded beside a capsule, held against its tokens; None, and a problem, where
        it cannot be read or is about others.
        """
        if not entry.has_notes:
            return None
        notes, problems = self.store.notes(entry.place)
        for problem in problems:
            self._problem(problem)
        if notes is None or not notes.tokens:
            return notes
        tokens = self.tokens(entry, 0, entry.place.position)
        if tokens is None:
            return None
        try:
            notes.check(tokens)
        except StoreError as error:
            self._problem(f"{self.store.folder.url}: {entry.id[:8]}: {error}")
            return None
        return notes

    def note_at(self, entry: StoredCapsule, position: int) -> TokenNote | None:
        """What a capsule, or one of those above it that have the token too, recorded of it."""
        for above in entry.path():
            if above.place.position <= position:
                break
            notes = self.notes(above)
            note = None if notes is None else notes.at(position)
            if note is not None:
                return note
        return None

    # -- where two part -------------------------------------------------------------------------

    def part(self, a: StoredCapsule, b: StoredCapsule, around: int) -> Parting:
        """Where two capsules part, with up to `around` tokens before and after; the first after is
        always told. Raises StoreError where their tokens cannot be read.
        """
        position = self._common(a.manifest, b.manifest)
        above = {e.id for e in a.path()}
        ancestor = next((e for e in b.path() if e.id in above), None)
        tokens = self.store.tokens
        before = tokens(a.manifest, max(0, position - around), position)
        stop = position + max(around, 1)
        left, right = (
            Side(e, tokens(e.manifest, position, stop), self.note_at(e, position)) for e in (a, b)
        )
        return Parting(left, right, position, ancestor, before)

    def _common(self, a: Manifest, b: Manifest) -> int:
        """How many tokens two capsules have in common; objects that both have are not read."""
        start = 0
        for mine, other in zip(a.segments, b.segments, strict=False):
            if (mine.stop, mine.tokens) != (other.stop, other.tokens):
                break
            start = mine.stop
        stop = min(a.position, b.position)
        left, right = (self.store.tokens(m, start, stop) for m in (a, b))
        different = np.flatnonzero(left != right)
        return start + int(different[0]) if len(different) else stop

    # -- inside ---------------------------------------------------------------------------------

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def _find_parents(self) -> None:
        """The recorded parent, while it is there; else the deepest capsule that has the first
        segments, found in a trie of rows: (node above, digest of rows) -> node.
        """
        nodes: dict[tuple[object, str], int] = {}
        at_node: dict[int, StoredCapsule] = {}
        chains: dict[str, list[int]] = {}
        for entry in self.entries.values():
            node: object = entry.place.fingerprint
            chain: list[int] = []
            for segment in entry.manifest.segments:
                node = nodes.setdefault((node, segment.rows.digest), len(nodes))
                chain.append(node)
            chains[entry.id] = chain
            if chain:
                known = at_node.get(chain[-1])
                if known is None or entry.id > known.id:
                    at_node[chain[-1]] = entry
        for entry in self.entries.values():
            parent = self.entries.get(entry.manifest.parent or "")
            if parent is None or not _may_be_parent(parent, entry):
                above = (at_node.get(n) for n in reversed(chains[entry.id][:-1]))
                parent = next((e for e in above if e is not None), None)
            entry.parent = parent
            if parent is not None:
                parent.children.append(entry)


def sampler_of(store: Store, entry: StoredCapsule) -> SamplerParams | None:
    """What the last `generate` before a capsule of tokens asked for, from its fixed band; None
    where nothing was asked for yet, or where the band is not laid out as that of a lane of tokens.

    The band begins with cursor, sampler and bias, each after a gap of zeros and a guard, and the
    cursor stands where the capsule does: all of that is checked. Raises StoreError for a band that
    is gone or damaged.
    """
    ref = entry.manifest.fixed
    fixed = StoredObject(store.folder, ref.digest, ref.nbytes).read()
    slots: list[Bytes] = []
    at = 0
    for nbytes in (4 * CURSOR_WORDS, 4 * SAMPLER_WORDS, 8 * BIAS_ENTRIES):
        stop = align(at + nbytes) + GUARD_NBYTES
        gap = fixed[at + nbytes : stop]
        if len(gap) < stop - at - nbytes or (
            gap[:-GUARD_NBYTES].any() or (gap[-GUARD_NBYTES:] != GUARD_BYTE).any()
        ):
            return None
        slots.append(fixed[at : at + nbytes])
        at = stop
    cursor, sampler, bias = slots
    if cursor.view("<i4")[CursorWord.POSITION] != entry.place.position or not sampler.any():
        return None
    try:
        return unpack(sampler.tobytes(), bias.tobytes())
    except SessionError:
        return None


def _may_be_parent(parent: StoredCapsule, of: StoredCapsule) -> bool:
    """Whether a recorded parent can be one; ids are digests that cover it, so none is a circle."""
    mine, its = of.place, parent.place
    return its.fingerprint == mine.fingerprint and its.position <= mine.position


def _parents_first(roots: list[StoredCapsule]) -> list[StoredCapsule]:
    found, left = [], list(roots)
    while left:
        entry = left.pop()
        found.append(entry)
        left += entry.children
    return found
