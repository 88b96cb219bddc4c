"""Stores with many names, strays and links: cheap where it can be, and never out of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flashrt
from flashrt import cli
from flashrt.store import upkeep
from flashrt.store.store import Store


@pytest.fixture
def store(session: flashrt.Session, tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    session.prefill(range(40))
    store.save(session.snapshot("a"))
    session.prefill([1])
    store.save(session.snapshot("b"))
    return store


def test_a_load_by_name_reads_one_name(
    engine: flashrt.Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while every name was read, for the name asked for and for the capsule's own: 10.7 s
    with 60,000 of them.
    """
    target = store.resolve("a").name
    for i in range(200):
        Path(store.folder.url, "refs", f"more-{i}").write_text(target + "\n")
    read, asked = store.folder.read_text, list[str]()
    monkeypatch.setattr(store.folder, "read_text", lambda n, *m: (asked.append(n), read(n, *m))[1])
    monkeypatch.setattr(store.folder, "list", None)  # no listing with sizes, either
    monkeypatch.setattr(store.folder, "names", None)
    assert store.load(engine, "more-7").name == "more-7"
    assert set(asked) == {"refs/more-7"}
    monkeypatch.undo()
    place = store.remove("more-7")
    assert place.name == target and "more-7" not in store.refs()
    assert store.load(engine, place.id[:8]).name is None


def test_strays_are_left_alone_and_counted(
    engine: flashrt.Engine, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red while one file of an editor in refs/ made every load fail, and one in objects/ every
    sweep; and while a sweep removed what only lay in objects/.
    """
    root = Path(store.folder.url)
    strays = [
        root / "refs" / ".a.swp", root / "refs" / "notes", root / "objects" / ".ab.swp",
        root / "objects" / "README", root / "objects" / "ab" / "cd~", root / "capsules" / ".x",
    ]  # fmt: skip
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("mine")
    assert store.load(engine, "a").position == 40
    store.remove("a")
    swept = upkeep.sweep(store)
    assert (swept.objects, swept.strays) == (1, 6)
    assert all(stray.read_text() == "mine" for stray in strays)
    for words in (["ls"], ["gc"], ["verify"]):
        assert cli.main(["store", *words, store.folder.url]) == cli.OK
        assert "strays, which are not the store's: 6" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["store", "gc", store.folder.url, "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["strays"] == 6


@pytest.mark.parametrize("where", ["tmp", "objects", "objects/zz", "refs", "capsules"])
def test_nothing_is_removed_through_a_link(store: Store, tmp_path: Path, where: str) -> None:
    """Red while gc emptied a folder that tmp/ or objects/ was a link to."""
    outside = tmp_path / "outside"
    inner = outside / "zz"
    inner.mkdir(parents=True)
    kept = [outside / "1-a", inner / ("0" * 30), outside / "a"]
    for path in kept:
        path.write_text("precious")
    link = Path(store.folder.url, where)
    if link.exists():
        link.rename(tmp_path / "aside")
    link.symlink_to(outside)
    upkeep.sweep(store)
    with pytest.raises(flashrt.CapsuleError):
        store.remove("no such name")
    assert [path.read_text() for path in kept] == ["precious"] * 3
    if where == "refs":
        with pytest.raises(flashrt.CapsuleError, match="is a link"):
            store.folder.delete("refs/a")


def test_rm_forgets_one_name(store: Store, session: flashrt.Session) -> None:
    """Red while `flashrt store rm NAME` took the capsule and all its names."""
    session.rollback(0)
    session.prefill([5])
    capsule = session.snapshot()
    store.save(capsule, "one")
    store.save(capsule, "two")
    assert cli.main(["store", "rm", store.folder.url, "one"]) == cli.OK
    assert "one" not in store.refs() and store.resolve("two").position == 1
    assert cli.main(["store", "rm", store.folder.url, "two", store.resolve("two").id]) == cli.OK
    assert 1 not in {p.position for p in store.places()}


def test_names_of_capsules_that_are_gone_go(store: Store) -> None:
    """A name that stands for a capsule which was removed is swept; nothing else in refs/ is."""
    Path(store.folder.url, store.resolve("a").name).unlink()
    assert upkeep.sweep(store).names == 1
    assert set(store.refs()) == {"b"}
