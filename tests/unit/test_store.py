"""The store: what is saved is there, whole, shared and checked; what is not is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

import flashrt
from flashrt.base.errors import StoreError
from flashrt.store import upkeep
from flashrt.store.opening import matching_capsules, open_session
from flashrt.store.reuse import Action
from flashrt.store.store import Store, open_folder

GOLDEN = Path(__file__).parents[1] / "golden"
PREFIX = list(range(200))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def other() -> flashrt.Engine:
    """As another process would have it: other lanes, another context length."""
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=640)


@pytest.fixture
def elsewhere(other: flashrt.Engine) -> Iterator[flashrt.Session]:
    with other.session() as session:
        yield session
    for capsule in list(other.capsules.capsules):
        capsule.drop()
    other.capsules.check_integrity()


def files(store: Store, below: str) -> list[Path]:
    return sorted(p for p in Path(store.folder.url, below).rglob("*") if p.is_file())


def test_another_engine_continues_with_the_same_bits(
    session: flashrt.Session, elsewhere: flashrt.Session, other: flashrt.Engine, store: Store
) -> None:
    session.prefill(PREFIX)
    list(session.generate(5, temperature=1.0, seed=3))
    store.save(session.snapshot(), "here")
    capsule = Store(store.folder.url).load(other, "here")
    capsule.prefetch()
    assert (capsule.tier, capsule.name, capsule.position) == ("disk", "here", session.position)
    assert capsule.tokens.tolist() == session.tokens.tolist()
    other.poison_lane(elsewhere.lane)
    elsewhere.restore(capsule)
    assert other.stats()["pool_used_bytes"] == 0  # straight from disk into the lane
    assert elsewhere.digest() == session.digest() == capsule.digest
    assert elsewhere.logits().tobytes() == session.logits().tobytes()
    assert list(elsewhere.generate(8)) == list(session.generate(8))
    other.arena.check_guards()


def test_another_process_finds_the_longest_prefix(session: flashrt.Session, store: Store) -> None:
    session.prefill(PREFIX)
    store.save(session.snapshot())
    list(session.generate(3))
    code = (
        "import flashrt, sys; from flashrt.store.opening import open_session; "
        "from flashrt.store.store import Store; "
        "e = flashrt.load(sys.argv[1], device='cpu', max_positions=300); "
        "o = open_session(Store(sys.argv[2]), e, list(range(200)) + [1, 2]); "
        "print(o.decision.action, o.decision.position, o.session.digest())"
    )
    command = [sys.executable, "-c", code, str(GOLDEN / "tiny"), store.folder.url]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    session.rollback(200)
    session.prefill([1, 2])
    assert result.stdout.strip() == f"restore 200 {session.digest()}"


def test_branches_cost_one_prefix_and_their_own_rows(
    engine: flashrt.Engine, session: flashrt.Session, store: Store
) -> None:
    session.prefill(PREFIX)
    root = session.snapshot("root")
    first = store.save(root)
    fixed, prefix = engine.stats()["fixed_bytes"], root.nbytes - engine.stats()["fixed_bytes"]
    assert (first.new_objects, first.shared_nbytes) == (3, 0)
    for i in range(5):
        session.restore(root)
        session.prefill([i] * 10)
        branch = session.snapshot(f"branch {i}")
        saved = store.save(branch)
        assert saved.new_objects == 3
        assert saved.new_nbytes == branch.nbytes + 4 * 10
        assert saved.shared_nbytes == prefix + 4 * 200
    totals = upkeep.totals(store)
    own = sum(c.nbytes for c in engine.capsules.capsules) + 4 * (200 + 5 * 10)
    assert (totals.capsules, totals.stored_nbytes) == (6, own)
    on_disk = sum(p.stat().st_size for p in files(store, "objects"))
    assert on_disk == own < fixed * 6 + prefix * 2
    assert store.save(root).new_objects == 0
    tree = {p.id: store.manifest(p).parent for p in store.places()}
    assert sorted(p or "" for p in tree.values()) == ["", *[first.place.id] * 5]


def test_equal_states_of_two_engines_are_stored_once(
    session: flashrt.Session, elsewhere: flashrt.Session, store: Store
) -> None:
    session.prefill([9] * 150)
    session.rollback(0)
    session.prefill(PREFIX[:70])
    elsewhere.prefill(PREFIX[:40])
    elsewhere.prefill(PREFIX[40:70])
    store.save(session.snapshot())
    capsule = elsewhere.snapshot()
    saved = Store(store.folder.url).save(capsule)
    rows_nbytes = capsule.nbytes - capsule.owner.fixed_nbytes
    assert saved.shared_nbytes >= rows_nbytes + 4 * 70  # the cursor may differ, rows may not
    rows = {s.rows for p in store.places() for s in store.manifest(p).segments}
    assert len(rows) == 1


def test_loaded_capsules_share_rows_and_know_lineage(
    session: flashrt.Session, elsewhere: flashrt.Session, other: flashrt.Engine, store: Store
) -> None:
    session.prefill(PREFIX)
    store.save(session.snapshot("root"))
    session.prefill([5, 6])
    store.save(session.snapshot("leaf"))
    leaf, root = store.load(other, "leaf"), store.load(other, "root")
    other.capsules.check_integrity()
    elsewhere.restore(leaf)
    fixed = other.stats()["fixed_bytes"]
    assert other.capsules.moves_to_restore(elsewhere.lane, root).nbytes == fixed
    leaf.drop()
    root.drop()
    again = store.load(other, "root")  # the lane still holds its rows
    other.capsules.check_integrity()
    assert other.capsules.moves_to_restore(elsewhere.lane, again).nbytes == fixed
    elsewhere.restore(again)
    elsewhere.prefill([8])
    child = elsewhere.snapshot("child")
    saved = store.save(child)
    assert store.manifest(saved.place).parent == store.resolve("root").id
    assert saved.shared_nbytes >= again.nbytes - fixed
    again.to("device")
    assert again.digest == child.owner.digest_capsule(again)


@pytest.mark.parametrize("what", ["fixed", "rows", "tokens", "manifest"])
@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "empty", "gone", "link", "fifo"])
def test_damage_is_refused_and_nothing_changes(
    engine: flashrt.Engine, session: flashrt.Session, store: Store, what: str, how: str
) -> None:
    session.prefill(PREFIX[:90])
    saved = store.save(session.snapshot("c"))
    session.prefill([4])
    made = store.manifest(saved.place)
    refs = {"fixed": made.fixed, "rows": made.segments[0].rows, "tokens": made.segments[0].tokens}
    name = saved.place.name
    if what != "manifest":
        name = f"objects/{refs[what].digest[:2]}/{refs[what].digest[2:]}"
    path = Path(store.folder.url, name)
    raw = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip":
        raw[len(raw) // 2] ^= 16
    damaged = {"truncate": raw[:-1], "extend": raw + b"x", "empty": b"", "flip": raw}
    if how == "link":
        path.symlink_to("/dev/zero")
    elif how == "fifo":
        os.mkfifo(path)
    elif how != "gone":
        path.write_bytes(damaged[how])
    digest = session.digest()
    for capsule in list(engine.capsules.capsules):
        capsule.drop()  # or its rows on the device would do
    with engine.session() as fresh, pytest.raises(flashrt.CapsuleError):
        engine.poison_lane(fresh.lane)
        fresh.restore(store.load(engine, "c"))
    assert session.digest() == digest
    if not (what == "manifest" and how == "gone"):
        assert upkeep.verify(store).problems
    engine.capsules.check_integrity()


def test_foreign_capsules_are_refused_with_both_fingerprints(
    engine: flashrt.Engine, session: flashrt.Session, store: Store
) -> None:
    session.prefill(PREFIX)
    store.save(session.snapshot("c"))
    foreign = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=300, kv_dtype="float32")
    with pytest.raises(flashrt.CapsuleError, match=engine.fingerprint) as caught:
        store.load(foreign, "c")
    assert foreign.fingerprint in str(caught.value)
    assert store.find(foreign.fingerprint, np.array(PREFIX, np.int32)) == []
    short = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=64)
    with pytest.raises(flashrt.CapsuleError, match="position 200 > max_positions 64"):
        store.load(short, "c")


def test_forged_manifests_are_refused(
    engine: flashrt.Engine, session: flashrt.Session, store: Store
) -> None:
    """Whoever can make checksums can still not make the engine read beyond its rows."""
    session.prefill(PREFIX[:64])
    session.snapshot()
    session.prefill(PREFIX[64:90])
    place = store.save(session.snapshot("c")).place
    fields = json.loads(store.folder.read_text(place.name))
    first, second = fields["segments"]
    forgeries = [
        {"segments": [first]},
        {"segments": [second, first]},
        {"segments": [first, second], "position": 91},
        {"segments": [[0, 90, *first[2:]]]},
        {"segments": [[0, 1 << 40, *first[2:5], 4 << 40]], "position": 1 << 40},
        {"segments": [first, [64, 64, *second[2:]]], "position": 64},
        {"segments": [first, [64, 90, "../../etc/passwd", *second[3:]]]},
        {"segments": [first, [64, 90, second[2], -1, *second[4:]]]},
        {"segments": [first, [64, 90, second[2], True, *second[4:]]]},
        {"segments": [first, [64, 90, first[2], first[3], *second[4:]]]},
        {"segments": {}}, {"segments": "x"}, {"segments": [[]]}, {"segments": None},
        {"fixed": [first[2], first[3]]}, {"fixed": None}, {"fixed": ["0" * 32, 10]},
        {"fingerprint": "0" * 32}, {"fingerprint": 5}, {"format": "other"}, {"parent": "x"},
        {"digest": None}, {"tokens_digest": "0" * 32}, {"position": 1.5},
    ]  # fmt: skip
    for forgery in forgeries:
        text = json.dumps({**fields, **forgery}).encode()
        data = np.frombuffer(text, np.uint8)
        position = forgery.get("position", place.position)
        name = (
            f"capsules/{place.fingerprint}/{int(position) % 10**10:010d}-{place.tokens_digest}-"
            f"{xxhash.xxh3_128_hexdigest(text)}.json"
        )
        store.folder.write(name, data)
        [made] = [p for p in store.places() if p.name == name]
        with pytest.raises(flashrt.CapsuleError):
            store.load(engine, made)
        store.folder.delete(name)
    engine.capsules.check_integrity()


def test_names(session: flashrt.Session, store: Store) -> None:
    session.prefill([1])
    capsule = session.snapshot()
    for name in ("a/b", "..", ".", "ü ?", "x" * 200):
        saved = store.save(capsule, name)
        assert store.refs()[name] == saved.place == store.resolve(name)
    assert len(files(store, "refs")) == 5
    for name in ("", "x" * 201, "\0" * 100):
        with pytest.raises(StoreError, match="is not a name"):
            store.save(capsule, name)
    assert store.resolve(saved.place.id[:6]) == saved.place
    with pytest.raises(StoreError, match="no capsule is called"):
        store.resolve("absent")
    session.prefill([2])
    moved = store.save(session.snapshot(), "..")
    assert store.resolve("..") == moved.place != saved.place
    store.remove("..")
    assert ".." not in store.refs() and moved.place not in store.places()
    store.remove(".")
    assert saved.place in store.places()  # it has other names
    store.remove(saved.place.id)
    assert store.refs() == {}
    for name in ("../x", "a//b", "/etc/passwd", "a/../b", "", ".hidden"):
        with pytest.raises(StoreError, match="is not a name of a file"):
            store.folder.read_text(name)


def test_sweep_keeps_what_is_needed(
    session: flashrt.Session, elsewhere: flashrt.Session, other: flashrt.Engine, store: Store
) -> None:
    session.prefill(PREFIX)
    store.save(session.snapshot("root"))
    session.prefill([5])
    store.save(session.snapshot("leaf"))
    Path(store.folder.url, "tmp", "123-dead").write_bytes(b"half")
    assert upkeep.sweep(store) == upkeep.Swept(0, 0, 0)
    assert files(store, "tmp") == []
    store.remove("root")
    swept = upkeep.sweep(store)
    assert swept.objects == 1  # its fixed band; the leaf needs its rows
    assert upkeep.verify(store).problems == []
    elsewhere.restore(store.load(other, "leaf"))
    assert elsewhere.digest() == session.digest()
    place = store.remove("leaf")
    assert upkeep.sweep(store).objects == 5
    assert files(store, "objects") == []
    store.folder.write(place.name, np.frombuffer(b"{}", np.uint8))
    with pytest.raises(StoreError, match="damaged"):
        upkeep.sweep(store)


def test_save_again_after_a_sweep(session: flashrt.Session, store: Store) -> None:
    session.prefill(PREFIX)
    capsule = session.snapshot("c")
    store.save(capsule)
    store.remove("c")
    upkeep.sweep(store)
    assert store.save(capsule).new_objects == 3
    assert upkeep.verify(store).problems == []


def test_a_full_disk_leaves_nothing_half_written(
    session: flashrt.Session, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prefill(PREFIX)
    store.save(session.snapshot("before"))
    session.prefill([1])
    capsule, digest = session.snapshot("after"), session.digest()
    real = os.fsync
    for room in itertools.count():
        left = [room]

        def full(handle: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", full)
        try:
            store.save(capsule)
        except StoreError as error:
            assert "No space left" in str(error)
        else:
            break
        finally:
            monkeypatch.undo()
        assert files(store, "tmp") == []
        assert upkeep.verify(store).problems == []
        upkeep.sweep(store)
    assert room >= 8  # each file, and its folder
    assert upkeep.verify(store).problems == []
    assert session.digest() == digest
    store.save(capsule)
    assert set(store.refs()) == {"before", "after"}


def test_a_store_in_a_place_that_is_none(session: flashrt.Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    session.prefill([1])
    capsule = session.snapshot()
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError):
            Store(url).save(capsule)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "format").write_text("something else")
    with pytest.raises(StoreError, match="flashrt-store-1"):
        Store(tmp_path / "s")
    with pytest.raises(StoreError, match="cannot open"):
        Store("nosuch://bucket/x")


def test_a_folder_that_may_not_be_written(session: flashrt.Session, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    session.prefill([1])
    capsule, digest, user = session.snapshot(), session.digest(), os.geteuid()
    try:
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        with pytest.raises(StoreError, match="Permission denied"):
            Store(folder / "store").save(capsule)
        with pytest.raises(flashrt.CapsuleError, match="Permission denied"):
            capsule.save(folder / "c")
    finally:
        os.seteuid(user)
    assert (capsule.tier, session.digest(), list(folder.iterdir())) == ("device", digest, [])


def test_open_session_goes_the_cheapest_way(
    engine: flashrt.Engine, session: flashrt.Session, store: Store
) -> None:
    prompt = [*PREFIX, 300, 301]
    cold = open_session(store, engine, prompt, session=session, boundaries=[150], every=64)
    assert (cold.decision.action, cold.decision.n_prefill) == (Action.COLD, 202)
    assert [c.position for c in cold.published] == [64, 128, 150, 192]
    assert {c.tier for c in cold.published} == {"disk"}
    expected = session.digest()

    further = open_session(store, engine, [*prompt, 5], session=session)
    assert (further.decision.action, further.decision.position) == (Action.CONTINUE, 202)
    back = open_session(store, engine, [*PREFIX[:195], 9], session=session)
    assert (back.decision.action, back.decision.position) == (Action.ROLLBACK, 192)
    for capsule in cold.published:
        capsule.drop()
    with engine.session() as fresh:
        engine.poison_lane(fresh.lane)
        found = open_session(store, engine, prompt, session=fresh)
        assert (found.decision.action, found.decision.position) == (Action.RESTORE, 192)
        assert fresh.digest() == expected
    nothing = open_session(store, engine, [400, 401])
    assert nothing.decision.action is Action.COLD
    nothing.session.close()


def test_open_session_refuses_before_it_takes_a_lane(
    engine: flashrt.Engine, other: flashrt.Engine, elsewhere: flashrt.Session, store: Store
) -> None:
    """Red: every=0 was a ValueError of range, a negative one published nothing in silence, and a
    session of another engine ended in an AttributeError or in that engine's capsules.
    """
    for every in (0, -5):
        with pytest.raises(flashrt.SessionError, match="number of tokens"):
            open_session(store, engine, PREFIX, every=every)
    with pytest.raises(flashrt.SessionError, match="another engine"):
        open_session(store, engine, PREFIX, session=elsewhere)
    for _ in engine.lanes:
        with engine.session():
            pass
    assert elsewhere.position == 0 and store.places() == []


def test_open_session_passes_over_what_it_cannot_read(
    engine: flashrt.Engine, session: flashrt.Session, store: Store
) -> None:
    session.prefill(PREFIX[:100])
    store.offload(session.snapshot())
    session.prefill(PREFIX[100:150])
    place = store.offload(session.snapshot()).place
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    rows = store.manifest(place).segments[-1].rows.digest
    path = Path(store.folder.url, "objects", rows[:2], rows[2:])
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    with engine.session() as fresh:
        engine.poison_lane(fresh.lane)
        opened = open_session(store, engine, PREFIX, session=fresh)
        assert (opened.decision.action, opened.decision.position) == (Action.RESTORE, 100)
        assert "passed over 150" in opened.decision.reason
        assert [c.position for c in engine.capsules.capsules] == [100]
        session.prefill(PREFIX[150:])
        assert fresh.digest() == session.digest()


def test_matching_capsules(session: flashrt.Session) -> None:
    session.prefill([1, 2, 3])
    a = session.snapshot()
    session.prefill([4])
    b = session.snapshot()
    session.restore(a)
    session.prefill([5, 6])
    c = session.snapshot()

    def found(*tokens: int) -> list[flashrt.Capsule]:
        return matching_capsules([a, b, c], np.array(tokens, np.int32))

    assert found(1, 2, 3, 4, 9) == [b, a]
    assert found(1, 2, 3, 5, 6) == [c, a]
    assert found(1, 2, 3, 5) == [a]
    assert found(1, 2) == []
    assert found(2, 2, 3, 4) == []


def test_remote_stores_are_read_through_a_cache(
    session: flashrt.Session, elsewhere: flashrt.Session, other: flashrt.Engine, tmp_path: Path
) -> None:
    store = Store(f"memory://flashrt-test/{tmp_path.name}")
    session.prefill(PREFIX)
    saved = store.save(session.snapshot("far"))
    assert (saved.new_objects, store.save(session.snapshot()).new_nbytes) == (3, 0)
    capsule = store.load(other, "far")
    capsule.prefetch()
    elsewhere.restore(capsule)
    assert elsewhere.digest() == session.digest()
    assert upkeep.verify(store).problems == []
    assert {p.position for p in store.find(other.fingerprint, session.tokens)} == {200}
    store.remove("far")
    assert upkeep.sweep(store).objects == 0  # young files may belong to a publisher
    assert store.refs() == {}


@pytest.mark.parametrize("moment", ["before the manifest goes", "before the name is written"])
def test_a_save_and_an_rm_that_meet_without_a_lock(
    session: flashrt.Session,
    other: flashrt.Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Whoever is second sees the first: what was reported saved stays."""
    store, rival = (Store(f"memory://flashrt-test/{tmp_path.name}") for _ in range(2))
    session.prefill(PREFIX)
    capsule = session.snapshot("one")
    place = store.save(capsule).place
    if moment == "before the manifest goes":
        real = store.folder.delete

        def delete(name: str) -> None:
            if name == place.name:
                rival.save(capsule, "two")  # finds the manifest, and relies on it
            real(name)

        monkeypatch.setattr(store.folder, "delete", delete)
        store.remove("one")
    else:
        write = rival.folder.write

        def late(name: str, data: np.ndarray) -> None:
            if name == "refs/two":
                store.remove("one")  # sees no other name yet
            write(name, data)

        monkeypatch.setattr(rival.folder, "write", late)
        rival.save(capsule, "two")
    assert store.refs() == {"two": place}
    assert store.load(other, "two").digest == session.digest()


def test_open_folder_chooses(tmp_path: Path) -> None:
    assert open_folder(f"file://{tmp_path}").url == str(tmp_path)
    assert open_folder("memory://x/").url == "memory://x"
