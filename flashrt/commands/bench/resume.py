"""Resume after a restart: time to the first token from a store on disk, beside a cold prefill.

IS: measurements by prompt length, and what reading the same files into memory takes, in one run.
IS NOT: its tables (report), or what every bench says about a run (document).

"From disk" is a session on a lane that holds nothing: open the store, find the prefix, read, check
every checksum, restore, sample a token. "cached": the files are in the page cache; "evicted": the
kernel was asked to forget them first, which it may refuse on some filesystems.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from flashrt.base.flags import flags
from flashrt.commands import console
from flashrt.commands.bench.document import (
    BenchOptions,
    check_outputs,
    checkpoint_of,
    deliver,
    of_engine,
    opening,
)
from flashrt.commands.bench.report import show_resume
from flashrt.commands.checkpoints import open_engine
from flashrt.commands.timing import Tokens, prefill, synthetic_tokens
from flashrt.core.backend import Progress
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.store.opening import open_session
from flashrt.store.reuse import Action
from flashrt.store.store import Store
from flashrt.view.resume_plot import plot

LENGTHS = {"tiny": [256, 1024], "mini": [2048, 8192, 16384]}
CHECKPOINT_LENGTHS = [512, 2048]
REPEATS = 5
TURNS = 30  # restores, reads and refills, at least


@dataclass(frozen=True, slots=True)
class Resume:
    """One prompt length. Times in seconds: medians, except for the prefill, which ran once."""

    tokens: int
    nbytes: int  # of the capsule's objects
    cold_s: float  # prefill and first token
    save_s: float  # publish, with every fsync
    cached_s: float
    evicted_s: float
    restore_s: float  # from the page cache into the lane, checked; no search, no sampling
    read_s: float  # the same files, read into new memory, in turns with restore
    refill_s: float  # the same, into memory that was touched before, at pages' beginnings

    def row(self) -> dict[str, float]:
        """With ratios; `of_read` and `of_refill` are speeds beside reading the same files."""
        return {
            **asdict(self),
            "faster": self.cold_s / self.cached_s,
            "restore_bytes_per_s": self.nbytes / self.restore_s,
            "of_read": self.read_s / self.restore_s,
            "of_refill": self.refill_s / self.restore_s,
        }


def resume(options: BenchOptions, json_path: Path | None, plot_path: Path | None) -> int:
    """The command. Its store lies in the cache folder while it runs."""
    check_outputs(json_path, plot_path)
    facts = opening(options)
    path = checkpoint_of(options)
    lengths = options.lengths or options.by_shape(LENGTHS, CHECKPOINT_LENGTHS)
    engine = open_engine(path, replace(options.engine, max_positions=max(lengths) + 1))
    flags().cache_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-resume-", dir=flags().cache_dir))
    with console.progress_bars() as progress:
        rows = measure(engine, folder, sorted(lengths), progress, options.repeats)
    document = {
        **facts,
        **of_engine(engine),
        "folder": str(folder.parent),
        "repeats": options.repeats,
        "turns": max(TURNS, 4 * options.repeats),
        "rows": [row.row() for row in rows],
    }
    engine.close()
    deliver(document, json_path, show_resume, plot_path, plot)
    return 0


def measure(
    engine: SessionEngine,
    folder: Path,
    lengths: Sequence[int],
    progress: Progress,
    repeats: int = REPEATS,
) -> list[Resume]:
    """One row per length; the engine needs room for one token more than the longest.

    `folder` is made, and removed at the end. `repeats` of each median; TURNS restores and reads.
    """
    rng, rows = np.random.default_rng(7), []
    try:
        for length in lengths:
            tokens = synthetic_tokens(rng, engine.vocab_size, length)
            rows.append(_measure_one(engine, folder / str(length), tokens, progress, repeats))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _measure_one(
    engine: SessionEngine, folder: Path, tokens: Tokens, progress: Progress, repeats: int
) -> Resume:
    with engine.session() as session:
        cold_s = prefill(engine, session, tokens, progress, f"cold {len(tokens):,}")
        cold_s += _seconds(lambda: _first_token(session))
        expected = session.tokens[-1]
        session.rollback(len(tokens))
        capsule = session.snapshot()
    store = Store(folder)
    save_s = _seconds(lambda: store.save(capsule))
    capsule.drop()
    files = [p for p in folder.rglob("objects/*/*") if p.is_file()]

    def resume() -> None:
        with _empty_session(engine) as fresh:
            opened = open_session(Store(folder), engine, tokens, session=fresh)
            assert opened.decision.action is Action.RESTORE
            assert _first_token(fresh) == expected
        _drop_all(engine)

    def restore() -> float:
        capsule = Store(folder).load(engine, Store(folder).places()[0])
        with _empty_session(engine) as fresh:
            seconds = _seconds(lambda: fresh.restore(capsule))
        capsule.drop()
        return seconds

    buffers = [_touched(p.stat().st_size) for p in files]

    def refill() -> None:
        for path, buffer in zip(files, buffers, strict=True):
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)

    restores, reads, refills = [], [], []
    for _ in range(max(TURNS, 4 * repeats)):  # in turns: others may use the machine, too
        restores.append(restore())
        reads.append(_seconds(lambda: [path.read_bytes() for path in files]))
        refills.append(_seconds(refill))
    evicted = []
    for _ in range(repeats):
        _evict(files)
        evicted.append(_seconds(resume))
    return Resume(
        tokens=len(tokens),
        nbytes=sum(len(b) for b in buffers),
        cold_s=cold_s,
        save_s=save_s,
        cached_s=statistics.median(_seconds(resume) for _ in range(repeats)),
        evicted_s=statistics.median(evicted),
        restore_s=statistics.median(restores),
        read_s=statistics.median(reads),
        refill_s=statistics.median(refills),
    )


def _touched(nbytes: int) -> mmap.mmap:
    """Memory that begins with a page: some processors' block copies are slow elsewhere."""
    buffer = mmap.mmap(-1, nbytes)
    buffer[:] = b"\1" * nbytes
    return buffer


def _first_token(session: Session) -> int:
    return next(session.generate(1))


def _empty_session(engine: SessionEngine) -> Session:
    """On a lane that holds no rows, as after a restart."""
    session = engine.session()
    session.lane.hold(None, 0)
    return session


def _drop_all(engine: SessionEngine) -> None:
    for capsule in list(engine.capsules.capsules):
        capsule.drop()


def _evict(files: Sequence[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):  # Linux only; elsewhere "evicted" is "cached"
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started
