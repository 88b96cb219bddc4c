"""Writers of a store killed at random moments, and several at once: what was reported is there.

The writers are forked and never run a kernel: their capsules are on the host tier already. Longer
runs: `--kills N`, `--seconds S`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import StoreError
from flashrt.store import upkeep
from flashrt.store.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def capsules() -> Iterator[list[flashrt.Capsule]]:
    """Three branches over one prefix, and another history."""
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400)
    session, made = engine.session(), []
    session.prefill(range(150))
    root = session.snapshot()
    for token in range(3):
        session.restore(root)
        session.prefill([token] * 20)
        made.append(session.snapshot())
    session.rollback(0)
    session.prefill([9] * 30)
    made += [root, session.snapshot()]
    for capsule in made:
        capsule.to("host")
    yield made


def spawn(work: Callable[[], None]) -> int:
    """A forked process that does `work` and exits; 1 when it raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def churn(folder: Path, report: Path, seed: int, capsules: list[flashrt.Capsule]) -> None:
    """Save, remove and sweep without end; a line in `report` before a removal, after a save."""
    rng, store, mine = np.random.default_rng(seed), Store(folder), list[str]()
    with report.open("a", buffering=1) as told:
        for i in range(1 << 30):
            name = f"{seed}-{i}"
            told.write(f"saving {name}\n")
            saved = store.save(capsules[int(rng.integers(len(capsules)))], name)
            told.write(f"saved {name} {saved.new_nbytes} {saved.shared_nbytes}\n")
            mine.append(name)
            while len(mine) > 3:
                gone = mine.pop(int(rng.integers(len(mine))))
                told.write(f"removing {gone}\n")
                store.remove(gone)
            if rng.random() < 0.3:
                upkeep.sweep(store)


def there(report: Path) -> set[str]:
    """Names that were reported saved and that nobody began to remove."""
    lines = [line.split() for line in report.read_text().splitlines() if line]
    gone = {words[1] for words in lines if words[0] == "removing"}
    return {words[1] for words in lines if words[0] == "saved" and len(words) == 4} - gone


def test_killed_writers_lose_nothing_that_was_reported(
    tmp_path: Path, capsules: list[flashrt.Capsule], request: pytest.FixtureRequest
) -> None:
    rng, kept, reports = np.random.default_rng(2), set[str](), 0
    for kill in range(request.config.getoption("--kills")):
        report = tmp_path / f"report-{kill}"
        report.touch()
        child = spawn(lambda r=report, k=kill: churn(tmp_path / "store", r, k, capsules))
        until = time.monotonic() + 20
        while not report.stat().st_size and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(float(rng.exponential(0.02)))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = Store(tmp_path / "store")
        kept |= there(report)
        reports += report.read_text().count("saved")
        assert upkeep.verify(store).problems == []
        assert kept <= set(store.refs()), f"after kill {kill}"
        if len(kept) > 12:  # or verification takes all the time
            for name in kept:
                store.remove(name)
            kept = set()
    assert reports > 0
    upkeep.sweep(store)
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    assert upkeep.verify(store).unused_nbytes == 0


def test_four_processes_share_one_store(
    tmp_path: Path, capsules: list[flashrt.Capsule], request: pytest.FixtureRequest
) -> None:
    reports = [tmp_path / f"report-{i}" for i in range(4)]
    for report in reports:
        report.touch()
    children = [
        spawn(lambda r=report, i=i: churn(tmp_path / "store", r, i, capsules))
        for i, report in enumerate(reports)
    ]
    began, seconds = time.monotonic(), request.config.getoption("--seconds")
    checked = 0

    def is_long_enough() -> bool:
        """Each writer has saved twice as much as there is to write, on however busy a machine."""
        passed = time.monotonic() - began
        done = [report.read_text().count("saved") for report in reports]
        return passed > seconds and (min(done) > 2 * len(capsules) or passed > 10 * seconds)

    while not is_long_enough():  # a reader, without any lock
        store = Store(tmp_path / "store")
        store.refs()
        if checked % 7 == 0:
            assert upkeep.verify(store).problems == []
        for place in store.places():
            try:
                store.manifest(place)
                checked += 1
            except StoreError as error:
                assert "No such file" in str(error), error  # removed since it was listed
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "a writer ended by itself"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    store = Store(tmp_path / "store")
    assert upkeep.verify(store).problems == []
    assert set().union(*map(there, reports)) <= set(store.refs())
    lines = [line.split() for r in reports for line in r.read_text().splitlines()]
    saved = [words for words in lines if words[0] == "saved" and len(words) == 4]
    written, shared = (sum(int(words[i]) for words in saved) for i in (2, 3))
    print(f"{len(saved)} saves, {written} bytes written, {shared} shared, {checked} reads")
    assert len({words[1].split("-")[0] for words in saved}) == 4
    assert shared > written > 0 < checked
