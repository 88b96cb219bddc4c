"""Notes: what a caller recorded beside a stored capsule; small, immutable JSON files.

IS: log-probabilities of tokens, and which checkpoint has the words for them; the canonical text,
every field checked when read; a capsule's notes as files `notes/CAPSULE-ID/DIGEST.json`. IS NOT:
state. A capsule whose notes are damaged or gone loads as before, and versions that know no notes
pass over the folder: hence they are no part of the manifest.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.checks import as_integer, as_number
from flashrt.base.errors import StoreError
from flashrt.base.messages import shown
from flashrt.core.backend import Bytes
from flashrt.store.folder import MOST_MANIFEST_NBYTES, Folder, Publishing
from flashrt.store.manifest import Place

FORMAT = "flashrt-notes-1"
NOTES = "notes"
_MOST_ID = 1 << 31
_MOST_PATH = 4096
_TRIES = 3  # of a reader, when others replace what it has just listed
_NAME = re.compile(rf"{NOTES}/([0-9a-f]{{32}})/([0-9a-f]{{32}})\.json")


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What the model thought of the token at a position: the log of its probability, and the
    likeliest tokens with theirs. After a token of `generate`:
    `TokenNote(session.position - 1, token, *session.logprobs(5))`.

    Raises StoreError naming what is wrong.
    """

    position: int
    token: int
    logprob: float | None = None
    alternatives: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        position, token = as_integer(self.position), as_integer(self.token)
        if position is None or not 0 <= position < _MOST_ID:
            raise StoreError(f"notes: {shown(self.position)} is not a position")
        if token is None or not 0 <= token < _MOST_ID:
            raise StoreError(f"notes at {position}: {shown(self.token)} is not a token id")
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "token", token)
        if self.logprob is not None:
            object.__setattr__(self, "logprob", _logprob(self.logprob, position))
        try:
            pairs = [(as_integer(t), _logprob(x, position)) for t, x in self.alternatives]
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"notes at {position}: alternatives are not pairs of (token id, logprob)"
            ) from error
        ids = [t for t, _ in pairs if t is not None and 0 <= t < _MOST_ID]
        if len(set(ids)) < len(pairs):
            raise StoreError(f"notes at {position}: alternatives want token ids, each once")
        object.__setattr__(self, "alternatives", tuple(pairs))

    def logprob_of(self, token: int) -> float | None:
        """Of any token at this position; None where it was not recorded."""
        if token == self.token and self.logprob is not None:
            return self.logprob
        return dict(self.alternatives).get(token)


@dataclass(frozen=True, slots=True)
class Notes:
    """What is recorded beside one capsule. Raises StoreError unless positions ascend."""

    tokens: Sequence[TokenNote] = ()
    checkpoint: str | None = None  # where the model came from: its tokenizer has the text of tokens

    def __post_init__(self) -> None:
        tokens = tuple(self.tokens)
        if not all(isinstance(t, TokenNote) for t in tokens):
            raise StoreError("notes: `tokens` are not all a TokenNote")
        for before, after in itertools.pairwise(tokens):
            if before.position >= after.position:
                raise StoreError(f"notes: position {after.position} follows {before.position}")
        where = self.checkpoint
        if where is not None and not (isinstance(where, str) and 0 < len(where) <= _MOST_PATH):
            raise StoreError(f"notes: checkpoint {shown(where)} is not the path of one")
        object.__setattr__(self, "tokens", tokens)

    def at(self, position: int) -> TokenNote | None:
        """What is recorded of a position."""
        return next((t for t in self.tokens if t.position == position), None)

    def check(self, tokens: NDArray[np.int32]) -> None:
        """Raises StoreError unless all of it is about these tokens, those of a capsule from 0."""
        for note in self.tokens:
            if note.position >= len(tokens):
                raise StoreError(
                    f"notes: position {note.position} is not below the capsule's, {len(tokens)}"
                )
            if tokens[note.position] != note.token:
                raise StoreError(f"notes: the capsule has another token at {note.position}")

    def encode(self, capsule_id: str) -> tuple[str, str, Bytes]:
        """The file, its digest, and the canonical text. Raises StoreError when it is too long."""
        fields = {
            "format": FORMAT,
            "capsule": capsule_id,
            "checkpoint": self.checkpoint,
            "tokens": [[t.position, t.token, t.logprob, t.alternatives] for t in self.tokens],
        }
        text = json.dumps(fields, sort_keys=True, allow_nan=False) + "\n"
        data: Bytes = np.frombuffer(text.encode(), np.uint8)
        if data.nbytes > MOST_MANIFEST_NBYTES:
            raise StoreError(f"notes: {data.nbytes:,} bytes; at most {MOST_MANIFEST_NBYTES:,} fit")
        digest = xxhash.xxh3_128_hexdigest(data.data)
        return f"{NOTES}/{capsule_id}/{digest}.json", digest, data


def capsule_of(name: str) -> str | None:
    """The id of the capsule that a file of notes belongs to; None for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else match[1]


def write_notes(folder: Folder, turn: Publishing, place: Place, notes: Notes) -> None:
    """In place of those that the capsule has, within a writer's turn; read back before the others
    go. Those that another process writes meanwhile stay. Raises StoreError.
    """
    name, digest, data = notes.encode(place.id)
    before = [n for n in folder.names(f"{NOTES}/{place.id}") if capsule_of(n) is not None]
    turn.spare(name)
    if not folder.has(name, digest, data.nbytes):
        folder.write(name, data)
        folder.check(name, digest, data.nbytes)
    for other in before:
        if other != name:
            folder.delete(other)


def read_notes(folder: Folder, place: Place) -> tuple[Notes | None, list[str]]:
    """The notes of a capsule, and what is wrong with those that cannot be read.

    Processes that recorded at the same time leave several files: of each position that counts
    which has the most alternatives. Raises StoreError only where the folder cannot be listed.
    """
    found: list[Notes] = []
    problems: list[str] = []
    for _ in range(_TRIES):
        found, problems, is_changing = [], [], False
        for name in folder.names(f"{NOTES}/{place.id}"):
            if capsule_of(name) is None:
                continue
            try:
                found.append(_read(folder, name, place))
            except StoreError as error:
                if folder.size(name) is None:
                    is_changing = True
                else:
                    problems.append(str(error))
        if not is_changing:
            break
    return _together(found), problems


def _read(folder: Folder, name: str, place: Place) -> Notes:
    match = _NAME.fullmatch(name)
    assert match is not None, "asked for by a name that is one"
    data = folder.read(name, match[2])
    where = f"{folder.url}/{name}"
    try:
        notes = _decoded(json.loads(data.tobytes()), place.id)
    except (ValueError, TypeError, KeyError, RecursionError, StoreError) as error:
        # The text of a StoreError quotes a position or an id, never a text of the session.
        why = str(error) if isinstance(error, StoreError) else type(error).__name__
        raise StoreError(f"{where} does not hold notes: {why}") from error
    if notes.tokens and notes.tokens[-1].position >= place.position:
        raise StoreError(f"{where} has notes beyond position {place.position}")
    return notes


def _decoded(fields: Mapping[str, Any], capsule_id: str) -> Notes:
    if fields["format"] != FORMAT:
        raise StoreError(f"format {shown(fields['format'])}, this version reads {FORMAT!r}")
    if fields["capsule"] != capsule_id:
        raise StoreError("they are those of another capsule")
    tokens = [
        TokenNote(position, token, logprob, [(t, x) for t, x in alternatives])
        for position, token, logprob, alternatives in fields["tokens"]
    ]
    return Notes(tokens, fields["checkpoint"])


def _together(found: Sequence[Notes]) -> Notes | None:
    if len(found) < 2:
        return found[0] if found else None
    best: dict[int, TokenNote] = {}
    for note in (t for notes in found for t in notes.tokens):
        known = best.get(note.position)
        if known is None or _says(note) > _says(known):
            best[note.position] = note
    where: Iterable[str] = (n.checkpoint for n in found if n.checkpoint is not None)
    return Notes([best[p] for p in sorted(best)], next(iter(where), None))


def _says(note: TokenNote) -> tuple[bool, int]:
    return note.logprob is not None, len(note.alternatives)


def _logprob(value: object, position: int) -> float:
    number = as_number(value)
    if number is None or not -math.inf < number <= 0:
        raise StoreError(f"notes at {position}: {shown(value)} is not a logprob, in (-inf, 0]")
    return number
