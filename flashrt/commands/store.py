"""`flashrt store`: what a store of capsules holds, as a list or a tree; check it, sweep it.

IS: its options; listings with sizes; remove and sweep. IS NOT: the store itself (store.store,
store.upkeep), or what it tells of sessions (store_history).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from flashrt.base.errors import StoreError
from flashrt.commands import console, store_history
from flashrt.commands.store_history import ID_DIGITS
from flashrt.store import upkeep
from flashrt.store.history import History, StoredCapsule
from flashrt.store.manifest import Manifest, Place
from flashrt.store.store import Store
from flashrt.view.units import bytes_text

_MOST_DIGITS = 9  # of a count
_WHICH = "a name, or the beginning of an id or a digest"


class Subparsers(Protocol):
    """What argparse's add_subparsers returns, as far as it is needed here."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser: ...


def register(commands: Subparsers) -> None:
    """Add `store` and its subcommands to the command line."""
    purpose = "Look into a store of capsules: list, tree, check, sweep, remove."
    examples = (
        "examples:\n  flashrt store ls ~/capsules\n  flashrt store tree s3://bucket/capsules\n"
        "  flashrt store log ~/capsules --checkpoint ~/models/Qwen3.5-0.8B\n"
        "  flashrt store diff ~/capsules plan-a plan-b\n"
        '  flashrt store show ~/capsules "system prompt"\n  flashrt store verify ~/capsules\n'
        "  flashrt store rm ~/capsules 3fa2c1d0 && flashrt store gc ~/capsules"
    )
    parser = commands.add_parser("store", help=purpose, description=purpose, epilog=examples)
    parser.set_defaults(command=lambda options: _help(parser))
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    _add(actions, "ls", "list capsules", lambda o: ls(_open(o.store), o.json))
    _add(
        actions,
        "tree",
        "who descends from whom, and what each one adds",
        lambda o: tree(_open(o.store)),
    )
    log_parser = _add(
        actions,
        "log",
        "the tree, newest first, with the first words of each",
        lambda o: store_history.log(_open(o.store), o.which, o.checkpoint, o.json),
    )
    log_parser.add_argument(
        "which", nargs="?", metavar="CAPSULE", help=f"this one and its ancestors only; {_WHICH}"
    )
    show_parser = _add(
        actions,
        "show",
        "one capsule: its text, sampler and objects",
        lambda o: store_history.show(_open(o.store), o.which, o.checkpoint, o.json),
    )
    show_parser.add_argument("which", metavar="CAPSULE", help=_WHICH)
    diff_parser = _add(
        actions,
        "diff",
        "where two capsules part",
        lambda o: store_history.diff(_open(o.store), o.a, o.b, o.around, o.checkpoint, o.json),
    )
    diff_parser.add_argument("a", metavar="A", help=_WHICH)
    diff_parser.add_argument("b", metavar="B", help=_WHICH)
    diff_parser.add_argument(
        "--around", type=_count, default=8, metavar="N",
        help="tokens to show before and after they part (default: 8)",
    )  # fmt: skip
    for each in (log_parser, show_parser, diff_parser):
        each.add_argument(
            "--checkpoint", metavar="CHECKPOINT",
            help="its tokenizer has the text of tokens; no weights are read (default: the one that "
            "notes in the store name)",
        )  # fmt: skip
    _add(actions, "verify", "read and check every byte", lambda o: verify(_open(o.store), o.json))
    gc_parser = _add(
        actions,
        "gc",
        "remove objects that no capsule needs",
        lambda o: gc(_open(o.store), o.json, o.take_over),
    )
    gc_parser.add_argument(
        "--take-over",
        action="store_true",
        help="a gc of this store was killed, and you know that its process is gone (remote only)",
    )
    rm_parser = _add(
        actions, "rm", "forget capsules", lambda o: rm(_open(o.store), o.which, o.json)
    )
    rm_parser.add_argument("which", nargs="+", metavar="CAPSULE", help="names or ids")


def ls(store: Store, as_json: bool) -> int:
    """The command: all capsules, by position."""
    rows = _rows(store)
    if as_json:
        console.print_json(rows)
        return 0
    sums = upkeep.totals(store)
    table = [
        [r["id"][:ID_DIGITS], r["names"], f"{r['position']:,}", bytes_text(r["own_bytes"]),
         bytes_text(r["bytes"]), r["fingerprint"][:ID_DIGITS]]
        for r in rows
    ]  # fmt: skip
    columns = ("id", "~name", ">position", ">own", ">with all rows", "model")
    note = (
        f"{sums.capsules} capsules in {bytes_text(sums.stored_nbytes)}; "
        f"as separate copies: {bytes_text(sums.separate_nbytes)}{_strays(sums.strays)}"
    )
    screen = console.screen()
    screen.print(console.table(f"Store {store.folder.url}", columns, table))
    screen.print(note)
    return 0


def tree(store: Store) -> int:
    """The command: lineage as a picture in text."""
    history = History(store)
    for problem in history.problems:
        console.complain(f"problem: {problem}")
    picture = console.Tree(console.styled(store.folder.url, "bold"))
    branches: dict[str, console.Tree] = {}
    for entry in sorted(history.entries.values(), key=lambda e: (e.place.position, e.id)):
        left = [e for e in entry.path() if e.id not in branches]
        for each in reversed(left):
            trunk = picture if each.parent is None else branches[each.parent.id]
            branches[each.id] = trunk.add(*_label(each))
    console.screen().print(picture)
    return 0


def verify(store: Store, as_json: bool) -> int:
    """The command; 1 when there are problems."""
    found = upkeep.verify(store)
    if as_json:
        console.print_json(dataclasses.asdict(found))
    else:
        screen = console.screen()
        for problem in found.problems:
            screen.print(console.styled("problem", "bold red"), f" {problem}")
        n_problems = f"{len(found.problems)} problems"
        verdict = n_problems if found.problems else console.styled("whole", "green")
        screen.print(
            f"{store.folder.url}: ",
            verdict,
            f"; {found.capsules} capsules, {found.objects} objects, {bytes_text(found.nbytes)} "
            f"read, {bytes_text(found.unused_nbytes)} unused{_strays(found.strays)}",
        )
    return 1 if found.problems else 0


def gc(store: Store, as_json: bool, take_over: bool) -> int:
    """The command: sweep."""
    with console.warnings_as_notes():
        swept = upkeep.sweep(store, take_over=take_over)
    if as_json:
        found = dataclasses.asdict(swept)
        console.print_json({"objects": found.pop("objects"), "bytes": found.pop("nbytes"), **found})
    else:
        young = f"; {swept.young} unused ones are too young to go" if swept.young else ""
        notes = f", {swept.notes} notes" if swept.notes else ""
        console.screen().print(
            f"removed {swept.objects} objects{notes}, {bytes_text(swept.nbytes)}, and "
            f"{swept.names} names{young}{_strays(swept.strays)}"
        )
    return 0


def rm(store: Store, which: Iterable[str], as_json: bool) -> int:
    """The command: all or none of them. A name goes, and its capsule with its last name; by id, a
    capsule and all its names.
    """
    words = list(dict.fromkeys(which))
    places = [store.resolve(word) for word in words]
    with console.warnings_as_notes():
        for word, place in zip(words, places, strict=True):
            if store.folder.size(place.name) is not None:  # else it went by another name
                store.remove(word)
    if as_json:
        console.print_json([p.id for p in places])
    else:
        listed = ", ".join(p.id[:ID_DIGITS] for p in places)
        console.screen().print(f"forgot {listed}; `flashrt store gc` frees the space")
    return 0


def _strays(count: int) -> str:
    return f"; strays, which are not the store's: {count}" if count else ""


def _open(url: str) -> Store:
    """A store that is there. Raises StoreError."""
    store = Store(url)
    if not store.is_there:
        raise StoreError(f"there is no store at {store.folder.url}; the first save makes one")
    return store


def _rows(store: Store) -> list[dict[str, Any]]:
    names = _names(store)
    return [_row(p, store.manifest(p), names.get(p, [])) for p in store.places()]


def _row(place: Place, manifest: Manifest, names: list[str]) -> dict[str, Any]:
    last = manifest.segments[-1].rows.nbytes if manifest.segments else 0
    return {
        "id": place.id,
        "names": ", ".join(names),
        "position": place.position,
        "own_bytes": manifest.fixed.nbytes + last,
        "bytes": sum(ref.nbytes for ref in manifest.objects),
        "fingerprint": place.fingerprint,
        "own_start": manifest.segments[-1].start if manifest.segments else 0,
        "parent": manifest.parent,
        "chain": [s.rows.digest for s in manifest.segments],
    }


def _names(store: Store) -> dict[Place, list[str]]:
    names: dict[Place, list[str]] = {}
    for name, place in sorted(store.refs().items()):
        names.setdefault(place, []).append(name)
    return names


def _label(entry: StoredCapsule) -> list[console.Part]:
    since = entry.place.position - entry.own_start
    names = ", ".join(entry.names)
    name: list[console.Part] = [console.styled(names, "bold"), " "] if names else []
    size = bytes_text(entry.own_nbytes)
    position = f" position {entry.place.position:,} (+{since:,}), {size}"
    return [*name, console.styled(entry.id[:ID_DIGITS], "dim"), position]


def _add(
    actions: Subparsers, name: str, purpose: str, command: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=purpose, description=purpose)
    parser.set_defaults(command=command)
    parser.add_argument("store", metavar="STORE", help="a folder, or an fsspec URL")
    if name != "tree":
        parser.add_argument(
            "--json", action="store_true", help="one JSON document on stdout instead"
        )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of tokens")
    return int(text)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0
