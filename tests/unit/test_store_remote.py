"""Stores on services without locks and clocks: no save that was reported is lost; what is damaged,
half-written or of unknown age is known for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import StoreError
from flashrt.base.flags import flags
from flashrt.store import remote, upkeep
from flashrt.store.remote import Remote
from flashrt.store.store import Saved, Store, open_folder
from tests.unit.far_filesystem import Far, FarFilesystem, Killed, Schedule

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["farther", "far"], ids=["atomic put", "in place"])
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Far:
    monkeypatch.setattr(remote, "flags", lambda: replace(flags(), cache_dir=tmp_path / "cache"))
    far = Far(is_atomic=request.param == "farther")
    monkeypatch.setattr(FarFilesystem, "far", far)
    return far


@pytest.fixture
def url(far: Far, tmp_path: Path) -> str:
    return f"{'farther' if far.is_atomic else 'far'}://store/{tmp_path.name}"


@pytest.fixture(scope="module")
def engine() -> flashrt.Engine:
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=96, lanes=1)


@pytest.fixture
def capsule(engine: flashrt.Engine) -> Iterator[flashrt.Capsule]:
    """On the host tier: what saves it in a thread runs no kernel."""
    with engine.session() as session:
        session.prefill(range(20))
        capsule = session.snapshot("c")
    capsule.to("host")
    yield capsule
    for each in list(engine.capsules.capsules):
        each.drop()


def opened(url: str, schedule: Schedule | None = None) -> Store:
    """A store as another process sees it: nothing is known yet."""
    store = Store(url)
    assert isinstance(store.folder, Remote)
    if schedule is not None:
        store.folder.writers.sleep, store.folder.writers.clock = schedule.sleep, schedule.clock
    return store


def with_old_objects(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """A store whose objects nobody needs any more, but the next save shares."""
    store = opened(url)
    store.save(capsule)
    store.remove("c")
    assert len([p for p in far.files if "/objects/" in p]) == 3
    far.now_s += 7200


def killing(n: int) -> Callable[[str, str], None]:
    """The process ends at its n-th operation."""
    left = [n]

    def step(op: str, path: str) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed

    return step


def is_whole(url: str) -> bool:
    store = opened(url)
    return upkeep.verify(store).problems == [] and store.resolve("c").position == 20


# -- a save that meets a sweep --------------------------------------------------------------------


def operations(far: Far, url: str, capsule: flashrt.Capsule) -> tuple[int, int]:
    """How many a save takes that shares all, and a sweep that removes all."""
    counts = []
    for work in (lambda: opened(url).save(capsule), lambda: upkeep.sweep(opened(url), grace_s=0)):
        far.files.clear()
        with_old_objects(far, url, capsule)
        before = far.operations
        work()
        counts.append(far.operations - before)
    return counts[0], counts[1]


def meet(
    far: Far,
    url: str,
    capsule: flashrt.Capsule,
    turns: list[tuple[str, int]],
    frozen: str = "",
    pace: float = 1.0,
) -> dict[str, object]:
    """A save and a sweep that take turns; what each said."""
    far.files.clear()
    with_old_objects(far, url, capsule)
    schedule = Schedule(far, turns, frozen, pace)
    saver, sweeper = opened(url, schedule), opened(url, schedule)
    said = schedule.run(
        save=lambda: saver.save(capsule), gc=lambda: upkeep.sweep(sweeper, grace_s=0)
    )
    assert not isinstance(said["save"], AssertionError), said
    return said


def check_every_meeting(far: Far, url: str, capsule: flashrt.Capsule, stride: int) -> None:
    n_save, n_sweep = operations(far, url, capsule)
    met = 0
    for i in range(1, n_save + 1, stride):
        for j in range(1 + (i // stride) % stride, n_sweep + 1, stride):
            for turns in (
                [("save", i), ("gc", j), ("save", 10**6)], [("gc", j), ("save", i), ("gc", 10**6)],
            ):  # fmt: skip
                said = meet(far, url, capsule, turns)
                assert isinstance(said["save"], Saved), (turns, said)
                assert isinstance(said["gc"], upkeep.Swept), (turns, said)
                assert is_whole(url), turns
                met += 1
    assert met > 50
    assert not [p for p in far.files if "/writers/" in p]
    print(f"{met} meetings of a save of {n_save} operations and a sweep of {n_sweep}")


def test_a_save_that_meets_a_sweep(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """Red without announcements: 24 of 60 meetings lost what was reported saved."""
    check_every_meeting(far, url, capsule, stride=7 if far.is_atomic else 9)


@pytest.mark.slow
def test_a_save_that_meets_a_sweep_at_every_step(
    far: Far, url: str, capsule: flashrt.Capsule, request: pytest.FixtureRequest
) -> None:
    """The same, with --stride 1 at each operation of the one and of the other."""
    check_every_meeting(far, url, capsule, max(1, request.config.getoption("--stride") // 8))


def test_a_save_that_was_taken_for_dead(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """A process stopped at any operation for longer than a lease, with a whole sweep meanwhile:
    when it goes on, what it reports is there. Red without the look at its own announcement.
    """
    n_save, _ = operations(far, url, capsule)
    reported = swept = 0
    for i in range(1, n_save + 1):
        said = meet(far, url, capsule, [("save", i)], frozen="save")
        assert isinstance(said["gc"], upkeep.Swept), (i, said)
        if isinstance(said["save"], Saved):
            assert is_whole(url), i
            reported += 1
            swept += said["gc"].objects > 0
        else:  # its temporary file went under its hands, and it says so
            assert isinstance(said["save"], StoreError) and not far.is_atomic, (i, said)
    assert reported > 0.8 * n_save
    assert swept > 5  # or nothing was at stake


@pytest.mark.parametrize("is_dense", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_save_that_goes_on_in_the_middle_of_a_sweep(
    far: Far, url: str, capsule: flashrt.Capsule, is_dense: bool, request: pytest.FixtureRequest
) -> None:
    """Stopped at any operation until it is taken for dead; it goes on at any operation of the sweep
    that did so. Red when it reports without a look at its own announcement: that sweep looked for
    manifests before this one was there, and deletes what it shares.
    """
    n_save, n_sweep = operations(far, url, capsule)
    stride = max(1, request.config.getoption("--stride") // 8) if is_dense else 7
    met = 0
    for i in range(1, n_save + 1, stride):
        for j in range(1 + (i // stride) % stride, n_sweep + 12, stride):
            turns = [("save", i), ("gc", j), ("save", 10**6)]
            said = meet(far, url, capsule, turns, frozen="save", pace=60.0)
            assert isinstance(said["gc"], upkeep.Swept), (turns, said)
            if isinstance(said["save"], Saved):
                assert is_whole(url), turns
                met += 1
            else:
                assert isinstance(said["save"], StoreError) and not far.is_atomic, (turns, said)
    assert met > 20
    print(f"{met} saves that went on")


def test_a_sweep_that_was_taken_for_dead(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """A sweep stopped at any operation: a save goes on without it while it looked, and is refused,
    by name, where the sweep may still delete what the save needs. Nothing reported is lost.
    """
    _, n_sweep = operations(far, url, capsule)
    refused = saved = 0
    for j in range(1, n_sweep + 1):
        said = meet(far, url, capsule, [("gc", j)], frozen="gc")
        if isinstance(said["save"], StoreError):
            assert "take-over" in str(said["save"])
            refused += 1
        else:
            assert isinstance(said["save"], Saved), (j, said)
            assert is_whole(url), j
            saved += 1
    assert refused and saved


@pytest.mark.parametrize("who", ["save", "gc"])
def test_processes_that_are_killed(far: Far, url: str, capsule: flashrt.Capsule, who: str) -> None:
    """At any operation: the other goes on after a lease at most, a person's word at worst; and what
    was reported before stays.
    """
    for n in itertools.count(1):
        far.files.clear()
        with_old_objects(far, url, capsule)
        schedule = Schedule(far, [("", 0)])
        far.before = killing(n)
        try:
            store = opened(url, schedule)
            store.save(capsule) if who == "save" else upkeep.sweep(store, grace_s=0)
        except Killed:
            pass
        else:
            break
        finally:
            far.before = lambda op, path: None
        store = opened(url, schedule)
        try:
            store.save(capsule)
        except StoreError as error:
            assert who == "gc" and "take-over" in str(error)
            upkeep.sweep(store, take_over=True, grace_s=0)
            store.save(capsule)
        upkeep.sweep(store, grace_s=0, take_over=who == "gc")
        assert is_whole(url), n
        assert not [p for p in far.files if "/writers/" in p or "/tmp/" in p], n
    assert n > 20


def test_two_sweeps_do_not_meet(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """One says that the other is there; neither removes what the other's save shares."""
    _, n_sweep = operations(far, url, capsule)
    opened(url).save(capsule)
    for j in range(1, n_sweep + 1, 3):
        schedule = Schedule(far, [("a", j), ("b", 10**6)])
        work = {n: partial(upkeep.sweep, opened(url, schedule), grace_s=0) for n in ("a", "b")}
        said = schedule.run(**work)
        for result in said.values():
            is_refusal = isinstance(result, StoreError) and "another sweep" in str(result)
            assert is_refusal or isinstance(result, upkeep.Swept), (j, said)
        assert is_whole(url)


# -- files ----------------------------------------------------------------------------------------


def test_half_written_files(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """A writer killed at any operation leaves nothing that is taken for whole; the next save heals
    it. Red while files were written in place: a cut `format` or manifest closed the store.
    """
    for n in itertools.count(1):
        far.files.clear()
        far.before = killing(n)
        try:
            opened(url).save(capsule)
        except Killed:
            pass
        else:
            break
        finally:
            far.before = lambda op, path: None
        store = opened(url)
        assert upkeep.verify(store).problems == [], n
        store.save(capsule)
        assert is_whole(url), n
    assert n > 20


@pytest.mark.parametrize("name", ["format", "capsules/", "objects/", "refs/"])
def test_files_that_others_cut_short(
    far: Far, url: str, capsule: flashrt.Capsule, name: str
) -> None:
    """As versions before this one did on filesystems that write in place."""
    opened(url).save(capsule)
    for path in [p for p in far.files if f"/{name}" in p]:
        data, changed = far.files[path]
        far.files[path] = data[: len(data) // 2], changed
    opened(url).save(capsule)
    assert is_whole(url)


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0, 0.0])
def test_ages_are_by_the_services_clock(
    far: Far, url: str, capsule: flashrt.Capsule, skew_s: float
) -> None:
    """Red while ages were differences of two clocks: an hour apart, young files went."""
    far.skew_s = skew_s
    store = opened(url)
    store.save(capsule)
    store.remove("c")
    far.now_s += 1800
    assert upkeep.sweep(store).young == 3
    far.now_s += 1801
    swept = upkeep.sweep(store)
    assert (swept.objects, swept.young) == (3, 0)


def test_an_unknown_age_is_young(far: Far, url: str, capsule: flashrt.Capsule) -> None:
    """Red while it was infinite: a sweep took what had just been written."""
    far.has_times = False
    store = opened(url)
    store.save(capsule)
    store.remove("c")
    swept = upkeep.sweep(store)
    assert (swept.objects, swept.young) == (0, 3)
    assert upkeep.sweep(store, grace_s=0).objects == 3


def test_damaged_copies_in_the_cache_heal(
    far: Far, url: str, capsule: flashrt.Capsule, engine: flashrt.Engine, tmp_path: Path
) -> None:
    """Red while a copy of the right size was believed: a manifest's for ever, an object's once."""
    opened(url).save(capsule)
    digest = capsule.digest
    with engine.session() as session:
        session.restore(opened(url).load(engine, "c"))
    copies = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(copies) == 4
    for copy in copies:
        copy.write_bytes(bytes([copy.read_bytes()[0] ^ 1]) + copy.read_bytes()[1:])
    for each in list(engine.capsules.capsules):
        each.drop()
    with engine.session() as session:
        session.restore(opened(url).load(engine, "c"))
        assert session.digest() == digest


def test_damage_at_the_service_heals_at_a_save(
    far: Far, url: str, capsule: flashrt.Capsule
) -> None:
    """Red while a file of the right size was taken for the right one."""
    opened(url).save(capsule)
    for path, (data, changed) in far.files.items():
        if "/objects/" in path:
            far.files[path] = bytes([data[0] ^ 1]) + data[1:], changed + 1
    assert len(upkeep.verify(opened(url)).problems) == 3
    opened(url).save(capsule)
    assert is_whole(url)


def test_a_local_url_is_a_directory(tmp_path: Path) -> None:
    """Red while local:// wrote in place, without a lock."""
    assert open_folder(f"local://{tmp_path}").url == str(tmp_path)
    folder = open_folder(f"local://{tmp_path}")
    folder.write("objects/x", np.zeros(4, np.uint8))
    assert (tmp_path / "objects" / "x").stat().st_size == 4
