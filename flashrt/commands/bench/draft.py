"""Drafting: what each replay of a step costs, and tokens per second by draft length.

IS: measurements from one boundary, side by side, and the command around them. IS NOT: the tables
(report), or what every bench says about a run (document).

The head of a random model agrees by chance only. So speed is measured with the agreement that the
model has, and again with true tokens written over the drafts, each with a given probability: the
drafts are still made, and a verify does all of its work. Every run must yield the tokens of
draft=0.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.commands import console
from flashrt.commands.bench.document import (
    BenchOptions,
    check_outputs,
    checkpoint_of,
    deliver,
    of_engine,
    opening,
)
from flashrt.commands.bench.report import show_draft
from flashrt.commands.checkpoints import open_engine
from flashrt.commands.timing import Tokens, prefill, synthetic_tokens
from flashrt.core.backend import Progress
from flashrt.ops.sample import SamplerParams
from flashrt.session.engine import SessionEngine
from flashrt.session.speculate import Draft

POSITIONS: Final = [128]
TOKENS: Final = {"tiny": 64, "mini": 128}  # of each run of generation
CHECKPOINT_TOKENS: Final = 32
LENGTHS: Final[tuple[Draft, ...]] = (0, 1, 2, 3, 4, 6, "auto")
FORCED: Final[tuple[float | None, ...]] = (None, 0.6, 0.8, 1.0)  # None: as the model agrees
VERIFIED: Final = range(2, 10)  # rows
COMMITTED: Final = 4  # rows
REPLAYS: Final = 5  # of each kind in each repeat


@dataclass(slots=True)
class Cost:
    """One kind of replay: the engine's verb, with what the host writes before and reads after."""

    what: str
    rows: int
    samples_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Speed:
    """Generation with one draft length, greedy, from one position."""

    draft: Draft
    forced: float | None  # probability that a true token was written over a draft; None: never
    samples_s: list[float] = field(default_factory=list)  # all tokens of a run
    verifies: int = 0  # of all runs, like the next two
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class AtPosition:
    """Everything measured after a prompt of so many tokens."""

    position: int
    tokens: int  # of each run
    costs: list[Cost]
    speeds: list[Speed]
    is_exact: bool = True  # whether each run yielded the tokens of draft=0


def bench_draft(options: BenchOptions, json_path: Path | None, tokens: int | None = None) -> int:
    """The command. Returns 1 if drafting changed a token. `tokens` of each run: None = by shape.

    Raises FlashrtError if the checkpoint has no draft head or the device does not draft.
    """
    check_outputs(json_path)
    facts = opening(options)
    path = checkpoint_of(options, has_draft_head=True)
    positions = sorted(options.lengths or POSITIONS)
    n_tokens = tokens or options.by_shape(TOKENS, CHECKPOINT_TOKENS)
    room = positions[-1] + n_tokens + max(VERIFIED)
    engine = open_engine(path, replace(options.engine, max_positions=room))
    with console.progress_bars() as progress:
        rows = measure(engine, positions, n_tokens, options.repeats, progress)
    document = {
        **facts,
        **of_engine(engine),
        "repeats": options.repeats,
        "replays": options.repeats * REPLAYS,
        "rows": [_row(row) for row in rows],
    }
    engine.close()
    deliver(document, json_path, show_draft)
    return 0 if all(row.is_exact for row in rows) else 1


def measure(
    engine: SessionEngine,
    positions: Sequence[int],
    n_tokens: int,
    repeats: int,
    progress: Progress,
) -> list[AtPosition]:
    """One entry per position; the engine has one lane, which is free, and room for 9 tokens more
    than it takes. `n_tokens` of each run: at least 8, so that a verify of 9 rows has true drafts.

    Raises FlashrtError if the engine does not draft.
    """
    if engine.max_draft == 0:
        raise FlashrtError(
            f"bench --draft: {engine.checkpoint.path} on {engine.device} does not draft; it takes "
            "a checkpoint with a draft head (mtp.*)"
        )
    random = np.random.default_rng(11)
    return [
        _measure_at(
            engine, synthetic_tokens(random, engine.vocab_size, n), n_tokens, repeats, progress
        )
        for n in positions
    ]


def _measure_at(
    engine: SessionEngine, prompt: Tokens, n_tokens: int, repeats: int, progress: Progress
) -> AtPosition:
    with engine.session() as session:
        prefill(engine, session, prompt, progress, f"prefill to {len(prompt):,}")
        capsule = session.snapshot()
        known = list(session.generate(n_tokens + 1))  # a first token, and those that are timed
    at = AtPosition(
        len(prompt),
        n_tokens,
        [
            Cost("decode", 1),
            Cost("draft", 1),
            *(Cost("verify", rows) for rows in VERIFIED),
            Cost("commit", COMMITTED),
        ],
        [Speed(draft, forced) for forced in FORCED for draft in LENGTHS],
    )
    for repeat in range(repeats):  # in turns: others may use the machine, too
        for _ in range(REPLAYS):
            for cost in at.costs:
                cost.samples_s.append(_replay(engine, capsule, known, cost))
        for i, speed in enumerate(at.speeds):
            progress(f"generate, run {repeat + 1} of {repeats}", i + 1, len(at.speeds))
            at.is_exact &= _generate(engine, capsule, known, speed) == known
    capsule.drop()
    return at


def _replay(engine: SessionEngine, capsule: Capsule, known: list[int], cost: Cost) -> float:
    """Seconds of one verb, always from the boundary of the capsule, with its token just sampled."""
    with engine.session() as session:
        session.restore(capsule)
        (lane,) = engine.lanes
        token = engine.sample(lane, SamplerParams())
        if cost.what in ("verify", "commit"):
            engine.draft(lane, max(1, cost.rows - 1))
            _write_drafts(engine, lane, {i: known[i] for i in range(1, cost.rows)})
        if cost.what == "commit":
            engine.verify(lane, cost.rows)
        acts: dict[str, Callable[[], object]] = {
            "decode": lambda: engine.decode(lane, token),
            "draft": lambda: engine.draft(lane, 1),
            "verify": lambda: engine.verify(lane, cost.rows),
            "commit": lambda: engine.commit(lane, np.array(known[: cost.rows], np.int32)),
        }
        engine.backend.sync()
        started = time.perf_counter()
        acts[cost.what]()
        engine.backend.sync()
        return time.perf_counter() - started


def _generate(engine: SessionEngine, capsule: Capsule, known: list[int], speed: Speed) -> list[int]:
    """Tokens of one run, by a session that knows nothing yet of acceptance or times."""
    agreement: AbstractContextManager[None] = nullcontext()
    if speed.forced is not None:
        agreement = _forced(engine, capsule.position, known, speed.forced)
    with engine.session() as session, agreement:
        session.restore(capsule)
        stream = session.generate(len(known), draft=speed.draft)
        first = next(stream)
        before = engine.stats()
        started = time.perf_counter()
        tokens = [first, *stream]
        speed.samples_s.append(time.perf_counter() - started)
        after = engine.stats()
    speed.verifies += after["verifies"] - before["verifies"]
    speed.drafted += after["drafted"] - before["drafted"]
    speed.accepted += after["accepted"] - before["accepted"]
    return tokens


@contextmanager
def _forced(engine: SessionEngine, position: int, known: list[int], share: float) -> Iterator[None]:
    """While it lasts, each draft is overwritten with the true token with probability `share`.

    `known` are the tokens at `position` and after.
    """
    random, draft = np.random.default_rng(position), engine.draft

    def overwritten(lane: Lane, n_tokens: int) -> None:
        draft(lane, n_tokens)
        at = lane.position - position  # of the token that is fed; the drafts follow it
        true = {i: known[at + i] for i in range(1, n_tokens + 1) if at + i < len(known)}
        _write_drafts(engine, lane, {i: t for i, t in true.items() if random.random() < share})

    engine.draft = overwritten  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.draft


def _write_drafts(engine: SessionEngine, lane: Lane, tokens: dict[int, int]) -> None:
    """Over drafts on the device, by their depth: 1 is the first."""
    slot = engine.arena.lane(lane.index).io.slot("drafted")
    for depth, token in tokens.items():
        address = engine.arena.memory.address + slot.offset + 4 * depth
        engine.backend.write(address, np.array([token], np.int32).view(np.uint8))


def _row(at: AtPosition) -> dict[str, Any]:
    """Medians and ratios at one position, with all samples."""
    decode_s = statistics.median(at.costs[0].samples_s)
    costs = [
        {**asdict(c), "median_s": (median := statistics.median(c.samples_s)),
         "of_decode": median / decode_s}
        for c in at.costs
    ]  # fmt: skip
    speeds = [
        {
            **asdict(s),
            "tokens_per_s": at.tokens / statistics.median(s.samples_s),
            "acceptance": s.accepted / s.drafted if s.drafted else None,
            "mean_accepted": s.accepted / s.verifies if s.verifies else None,
        }
        for s in at.speeds
    ]
    return {**asdict(at), "costs": costs, "speeds": speeds}
