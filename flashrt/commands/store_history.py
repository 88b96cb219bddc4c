"""`flashrt store log | show | diff`: a store's capsules as git shows commits.

IS: the tree newest first, one capsule, where two part; as text and as JSON. No model is loaded: a
tokenizer is enough for words, and ids are shown where there is none. IS NOT: the tree itself
(store.history), or upkeep (store).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, FlashrtError, StoreError
from flashrt.base.messages import listed
from flashrt.commands import console
from flashrt.hub.resolve import resolve
from flashrt.load import text_of
from flashrt.store.history import History, Parting, Side, StoredCapsule, sampler_of
from flashrt.store.notes import TokenNote
from flashrt.store.store import Store
from flashrt.text.tokenizer import Tokenizer, tokenizer_of
from flashrt.view.units import bytes_text
from flashrt.weights.opening import open_weights

ID_DIGITS = 8
_PREVIEW_TOKENS, _PREVIEW = 32, 60  # tokens read, characters shown
_MOST_SHOWN = 2000  # characters of a capsule's text on a screen; JSON has all
_AGES = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (0.0, "s"))


def log(store: Store, which: str | None, checkpoint: str | None, as_json: bool) -> int:
    """The command: all capsules, or one and those it descends from; children before parents."""
    history = History(store)
    words = _Words(history, checkpoint)
    if which is None:
        drawn = list(_graph(history.newest_first()))
    else:
        path = list(history.pick(which).path())
        drawn = [("", entry) for entry in path]
    texts = {e.id: words.preview(e) for _, e in drawn if e is not None}
    if as_json:
        capsules = [_facts(e) | {"text": texts[e.id]} for _, e in drawn if e is not None]
        console.print_json({"capsules": capsules, "problems": history.problems})
        return 0
    screen = console.screen()
    _print_problems(screen, history.problems)
    for i, (guide, entry) in enumerate(drawn):
        if entry is None:
            screen.print(guide)
            continue
        screen.print(guide, "* ", *_headline(entry))
        if text := texts[entry.id]:
            screen.print(guide, "  " if entry.parent is None else "| ", "    ", text)
        if entry.parent is None and i + 1 < len(drawn):
            screen.print("")  # else another tree's capsule would look like a parent
    return 0


def show(store: Store, which: str, checkpoint: str | None, as_json: bool) -> int:
    """The command: one capsule, its own text, and its objects."""
    history = History(store)
    entry = history.pick(which)
    words = _Words(history, checkpoint)
    found = _capsule(history, entry, words)
    if as_json:
        console.print_json(found)
        return 0
    screen = console.screen()
    _print_problems(screen, found["problems"])
    screen.print(console.table(f"Capsule {which}", ("", "~"), _fact_rows(entry, found)))
    if found["text"]:
        own = f"text of its own tokens, {entry.own_start:,} to {entry.place.position:,}"
        screen.print(console.styled(own, "bold"))
        screen.print(_cut(found["text"]))
    manifest = entry.manifest
    objects = [["fixed", manifest.fixed.digest, bytes_text(manifest.fixed.nbytes)]]
    for s in manifest.segments:
        for what, ref in (("rows", s.rows), ("tokens", s.tokens)):
            objects.append(
                [f"{what} {s.start:,} to {s.stop:,}", ref.digest, bytes_text(ref.nbytes)]
            )
    screen.print(console.table("Objects", ("what", "object", ">bytes"), objects))
    return 0


def diff(store: Store, a: str, b: str, around: int, checkpoint: str | None, as_json: bool) -> int:
    """The command: where two capsules part."""
    history = History(store)
    words = _Words(history, checkpoint)
    parting = history.part(history.pick(a), history.pick(b), around)
    found = _parting(parting, words)
    found["problems"] = history.problems
    if as_json:
        console.print_json(found)
    else:
        _print_parting(parting, found)
    return 0


# -- the log --------------------------------------------------------------------------------------


def _graph(roots: Iterable[StoredCapsule]) -> Iterator[tuple[str, StoredCapsule | None]]:
    """Guides of lines, and the capsules on them: each one below its children, of which the first
    stays in its parent's column. No capsule: a line where a branch meets its trunk.
    """
    for root in roots:
        left: list[tuple[str, StoredCapsule | None, bool]] = [("", root, False)]
        while left:
            guide, entry, is_ready = left.pop()
            if entry is None or is_ready:
                yield guide, entry
                continue
            left.append((guide, entry, True))
            for i, child in reversed(list(enumerate(entry.children))):
                if i:
                    left.append((f"{guide}|/", None, True))
                left.append((f"{guide}| " if i else guide, child, False))


def _headline(entry: StoredCapsule) -> list[console.Part]:
    own = entry.place.position - entry.own_start
    parts: list[console.Part] = [console.styled(entry.id[:ID_DIGITS], "yellow"), " "]
    if entry.names:
        parts += [console.styled(f"({console.one_line(', '.join(entry.names))})", "bold"), " "]
    return [
        *parts,
        f"position {entry.place.position:,} (+{own:,}), {bytes_text(entry.own_nbytes)}, ",
        f"{_age_text(entry.age_s)}",
    ]


def _facts(entry: StoredCapsule) -> dict[str, Any]:
    return {
        "id": entry.id,
        "digest": entry.manifest.digest,
        "fingerprint": entry.place.fingerprint,
        "names": list(entry.names),
        "position": entry.place.position,
        "parent": None if entry.parent is None else entry.parent.id,
        "own_start": entry.own_start,
        "own_tokens": entry.place.position - entry.own_start,
        "own_bytes": entry.own_nbytes,
        "bytes": entry.nbytes,
        "age_s": entry.age_s,
        "has_notes": entry.has_notes,
    }


# -- one capsule ----------------------------------------------------------------------------------


def _capsule(history: History, entry: StoredCapsule, words: _Words) -> dict[str, Any]:
    manifest = entry.manifest
    own = history.tokens(entry, entry.own_start, entry.place.position)
    sampler, problems = None, []
    try:
        sampler = sampler_of(history.store, entry)
    except StoreError as error:
        problems.append(str(error))
    notes = history.notes(entry)
    bands = {
        "fixed": [manifest.fixed],
        "rows": [s.rows for s in manifest.segments],
        "tokens": [s.tokens for s in manifest.segments],
    }
    return _facts(entry) | {
        "tokens_digest": manifest.tokens_digest,
        "recorded_parent": manifest.parent,
        "fixed": {"object": manifest.fixed.digest, "bytes": manifest.fixed.nbytes},
        "segments": [
            {"start": s.start, "stop": s.stop, "object": s.rows.digest, "bytes": s.rows.nbytes}
            for s in manifest.segments
        ],
        "bands": {
            name: {"objects": len(refs), "bytes": sum(r.nbytes for r in refs)}
            for name, refs in bands.items()
        },
        "sampler": None if sampler is None else dataclasses.asdict(sampler),
        "tokens": None if own is None else own.tolist(),
        "text": None if own is None else words.text(entry, own),
        "notes": None if notes is None else [_note(t) for t in notes.tokens],
        "checkpoint": None if notes is None else notes.checkpoint,
        "problems": [*history.problems, *problems],
    }


def _note(note: TokenNote) -> dict[str, Any]:
    return {
        "position": note.position,
        "token": note.token,
        "logprob": note.logprob,
        "alternatives": [{"token": t, "logprob": x} for t, x in note.alternatives],
    }


def _fact_rows(entry: StoredCapsule, found: Mapping[str, Any]) -> list[list[str]]:
    parent = "none" if entry.parent is None else _called(entry.parent)
    if entry.manifest.parent not in (None, found["parent"]):
        parent += f"; made from {entry.manifest.parent}, which is gone"
    rows = [
        ["names", console.one_line(", ".join(entry.names)) or "none"],
        ["id", entry.id],
        ["digest", found["digest"]],
        ["parent", parent],
        ["position", f"{found['position']:,} (+{found['own_tokens']:,})"],
        ["saved", _age_text(entry.age_s)],
        ["fingerprint", found["fingerprint"]],
        ["tokens digest", found["tokens_digest"]],
    ]
    rows += [
        [name, f"{bytes_text(band['bytes'])} in {band['objects']} objects"]
        for name, band in found["bands"].items()
    ]
    rows.append(["its own bytes", bytes_text(entry.own_nbytes)])
    sampler = found["sampler"]
    rows.append(["sampler", "none recorded" if sampler is None else _sampler_text(sampler)])
    if notes := found["notes"]:
        logprobs = [t["logprob"] for t in notes if t["logprob"] is not None]
        mean = f", mean {sum(logprobs) / len(logprobs):.3f}" if logprobs else ""
        rows.append(["logprobs", f"of {len(logprobs):,} tokens{mean}"])
    return rows


def _sampler_text(sampler: Mapping[str, Any]) -> str:
    """What is not at its default; numbers as float32 keeps them, rounded."""
    if not sampler["temperature"]:
        return "greedy"
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
             "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
    parts = [f"temperature {sampler['temperature']:.6g}", f"seed {sampler['seed']}"]
    parts += [f"{k} {sampler[k]:.6g}" for k, default in plain.items() if sampler[k] != default]
    if sampler["logit_bias"]:
        parts.append(f"a bias on {len(sampler['logit_bias'])} tokens")
    return ", ".join(parts)


# -- two capsules ---------------------------------------------------------------------------------


def _parting(parting: Parting, words: _Words) -> dict[str, Any]:
    before = parting.before
    sides = {"a": parting.a, "b": parting.b}
    found: dict[str, Any] = {
        "relation": parting.relation,
        "position": parting.position,
        "ancestor": None if parting.ancestor is None else _facts(parting.ancestor),
        "is_one_model": parting.is_one_model,
        "before": {"tokens": before.tolist(), "text": words.text(parting.a.entry, before)},
    }
    for name, side in sides.items():
        other = parting.b if name == "a" else parting.a
        found[name] = _facts(side.entry) | {
            "tokens": side.tokens.tolist(),
            "text": words.text_after(side.entry, before, side.tokens),
            "token": side.token,
            "token_text": words.text_after(side.entry, before, side.tokens[:1]),
            "logprob": side.logprob_of(side.token),
            "logprob_of_other": side.logprob_of(other.token),
            "alternatives": 0 if side.note is None else len(side.note.alternatives),
        }
    return found


def _print_parting(parting: Parting, found: Mapping[str, Any]) -> None:
    screen = console.screen()
    _print_problems(screen, found["problems"])
    for name, side in (("a", parting.a), ("b", parting.b)):
        screen.print(console.styled(name, "bold"), f"  {_called(side.entry)}")
    ancestor = parting.ancestor
    screen.print("common ancestor: ", "none" if ancestor is None else _called(ancestor))
    if not parting.is_one_model:
        screen.print("their models differ: ids and logprobs may not mean the same")
    position = parting.position
    if parting.relation == "same tokens":
        state = parting.a.entry.manifest.digest == parting.b.entry.manifest.digest
        screen.print(
            f"the same {position:,} tokens; their states are ", "equal" if state else "different"
        )
    elif parting.relation == "differ":
        since = 0 if ancestor is None else ancestor.place.position
        screen.print(
            f"first difference at position {position:,}, after {position - since:,} common tokens "
            + ("from the start" if ancestor is None else "since the ancestor")
        )
    else:
        longer = parting.relation[0]
        more = abs(parting.a.entry.place.position - parting.b.entry.place.position)
        screen.print(f"{longer} goes on where the other ends, at {position:,}: {more:,} tokens")
    rows = [[_range(position - len(parting.before), position), *_words_of(found["before"])]]
    for name, side in (("a", parting.a), ("b", parting.b)):
        if len(side.tokens):
            end = position + len(side.tokens)
            rows.append([f"{name} {_range(position, end)}", *_words_of(found[name])])
    screen.print(console.table("", ("tokens", "~ids", "~text"), rows))
    if parting.relation == "differ":
        table = [_choice(name, side, found) for name, side in (("a", parting.a), ("b", parting.b))]
        columns = ("", ">token", "~text", ">logprob", "~of the other's token")
        screen.print(console.table(f"At position {position:,}", columns, table))


def _choice(name: str, side: Side, found: Mapping[str, Any]) -> list[str]:
    mine, text = found[name], found[name]["token_text"]
    other = mine["logprob_of_other"]
    if other is not None:
        of_other = f"{other:.4f}"
    elif side.note is None:
        of_other = "not recorded"
    else:
        of_other = f"not among the {mine['alternatives']} recorded"
    logprob = "not recorded" if mine["logprob"] is None else f"{mine['logprob']:.4f}"
    return [name, str(mine["token"]), _quoted(text), logprob, of_other]


def _words_of(part: Mapping[str, Any]) -> list[str]:
    return [" ".join(map(str, part["tokens"])) or "none", _quoted(part["text"])]


def _range(start: int, stop: int) -> str:
    return f"[{start:,}, {stop:,})"


# -- words ----------------------------------------------------------------------------------------


class _Words:
    """Text of tokens: by the checkpoint that was given, else by the one that notes name."""

    def __init__(self, history: History, checkpoint: str | None) -> None:
        """Raises CheckpointError for a checkpoint that was given and has no tokenizer."""
        self._history = history
        self._given = None if checkpoint is None else _tokenizer_in(checkpoint)
        self._found: dict[str, Tokenizer | None] = {}  # by fingerprint

    def text(self, entry: StoredCapsule, tokens: NDArray[np.int32]) -> str | None:
        """Of any tokens of a capsule, special ones spelled out; None where nobody knows."""
        tokenizer = self._given or self._of_notes(entry.place.fingerprint)
        return None if tokenizer is None else tokenizer.decode(tokens, skip_special=False)

    def text_after(
        self, entry: StoredCapsule, before: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> str | None:
        """Of tokens that follow others, as it reads there: some begin with a space only then."""
        whole = self.text(entry, np.concatenate([before, tokens]))
        first = self.text(entry, before)
        if whole is None or first is None or not whole.startswith(first):
            return self.text(entry, tokens)
        return whole[len(first) :]

    def preview(self, entry: StoredCapsule) -> str | None:
        """The first words of a capsule's own tokens, on one line."""
        start, fingerprint = entry.own_start, entry.place.fingerprint
        if self._given is None and self._of_notes(fingerprint) is None:
            return None
        stop = min(start + _PREVIEW_TOKENS, entry.place.position)
        tokens = self._history.tokens(entry, start, stop)
        text = None if tokens is None else self.text(entry, tokens)
        if text is None:
            return None
        text = " ".join(text.split())
        if len(text) > _PREVIEW:
            text = text[:_PREVIEW].rpartition(" ")[0] or text[:_PREVIEW]
            return f"{text} ..."
        return text if stop == entry.place.position else f"{text} ..."

    def _of_notes(self, fingerprint: str) -> Tokenizer | None:
        if fingerprint not in self._found:
            self._found[fingerprint] = self._look(fingerprint)
        return self._found[fingerprint]

    def _look(self, fingerprint: str) -> Tokenizer | None:
        """The first checkpoint that notes of this model name and that is here."""
        tried = set[str]()
        for entry in self._history.entries.values():
            if entry.place.fingerprint != fingerprint or not entry.has_notes:
                continue
            notes = self._history.notes(entry)
            where = None if notes is None else notes.checkpoint
            if where is None or where in tried:
                continue
            tried.add(where)
            try:
                return _tokenizer_in(where)
            except FlashrtError as error:
                self._history.problems.append(f"no text: {error}")
        return None


def _tokenizer_in(checkpoint: str) -> Tokenizer:
    """Raises CheckpointError where there is none."""
    path = Path(resolve(checkpoint)).expanduser()
    found = tokenizer_of(path) if path.is_dir() else text_of(open_weights(path)).tokenizer
    if found is None:
        raise CheckpointError(f"{path} has no tokenizer: token ids have no text")
    return found


def _quoted(text: str | None) -> str:
    return "" if text is None else f'"{console.one_line(text)}"'


def _cut(text: str) -> str:
    if len(text) <= _MOST_SHOWN:
        return text
    half = _MOST_SHOWN // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[{left_out:,} characters left out; --json has all]\n{text[-half:]}"


def _called(entry: StoredCapsule) -> str:
    names = f" ({console.one_line(listed(entry.names))})" if entry.names else ""
    return f"{entry.id[:ID_DIGITS]}{names} position {entry.place.position:,}"


def _age_text(age_s: float | None) -> str:
    """E.g. `3 min ago`."""
    if age_s is None:
        return "of unknown age"
    age_s = max(age_s, 0.0)
    unit_s, unit = next((s, unit) for s, unit in _AGES if age_s >= s)
    return f"{age_s / (unit_s or 1):.0f} {unit} ago"


def _print_problems(screen: console.Screen, problems: Sequence[str]) -> None:
    for problem in problems:
        screen.print(console.styled("problem", "bold red"), f" {problem}")
