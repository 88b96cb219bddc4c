"""An exception before any line of a call of a control loop: the call has happened, or it has not.

Red when the lane, the record and the history of a loop disagree afterwards, when a block or a lane
is lost, or when a capsule saved afterwards does not load. The quick suite strikes one line
in some, the slow one more of them, and with --stride 1 every line.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import EnvironmentFailed, PoolFull, SessionError
from flashrt.engine.actions import ActionEngine
from flashrt.robot.rollout import Rollout
from flashrt.weights.random_policy import write_random_policy
from tests.fuzz.injector import Injector, Struck

ROOMS = ("capsule", "engine", "robot", "core/graph.py")
SEEN = np.random.default_rng(11).normal(size=(64, 5)).astype(np.float32)
DONE = np.array([0.25, -0.5], np.float32)
OPTIONS: dict[str, Any] = {"overlap": 3, "keep_seconds": 0.2, "boundary_seconds": 0.1}


@dataclass
class Scene:
    """A loop in the middle of an episode: boundaries behind it, an interrupt, an action that was
    not executed, a chunk half made; a slack is due, and with it a boundary.
    """

    engine: ActionEngine
    folder: Path
    made: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.other = self.loop_of(seed=5)
        for seen in SEEN[40:46]:
            self.other.tick(seen)
        self.elsewhere = self.other.snapshot()
        self.loop = self.loop_of(seed=3)
        for i in range(14):
            if i == 7:
                self.loop.interrupt(2)
            self.loop.tick(SEEN[i])
            if i == 11:
                self.loop.executed(DONE)
            self.loop.slack()
        self.loop.tick(SEEN[14])

    def loop_of(self, seed: int) -> flashrt.ControlLoop:
        return flashrt.ControlLoop(self.engine, 50.0, seed=seed, **OPTIONS)

    def make_room(self) -> None:
        """For a capsule."""

    def close(self) -> None:
        for thing in (*self.made, self.loop, self.other):
            if isinstance(thing, flashrt.ControlLoop):
                thing.close()
        for capsule in list(self.engine.capsules.capsules):
            capsule.drop()


class Full(Scene):
    """The user's capsules take all the room that there is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        while True:
            try:
                self.made.append(self.loop.snapshot())
            except PoolFull:
                break

    def make_room(self) -> None:
        for thing in self.made[:2]:
            thing.drop()


class Restored(Scene):
    """A loop that was put where only the user's capsule leads to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.again = self.loop.snapshot()
        self.loop.restore(self.again)


class Adopted(Scene):
    """A loop that was put where no capsule leads to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loop.adopt(self.other)


CALLS: dict[str, Callable[[Scene], object]] = {
    "tick": lambda s: s.loop.tick(SEEN[15]),
    "two ticks": lambda s: (s.loop.tick(SEEN[15]), s.loop.tick(SEEN[16])),
    "late tick": lambda s: s.loop.tick_as_recorded(SEEN[15], DONE),
    "slack": lambda s: s.loop.slack(),
    "executed": lambda s: s.loop.executed(DONE),
    "digest": lambda s: s.loop.digest(),
    "rewind": lambda s: s.loop.rewind_ticks(5),
    "rewind far": lambda s: s.loop.rewind_ticks(10),
    "reset": lambda s: s.loop.reset(9),
    "set_seed": lambda s: s.loop.set_seed(9),
    "interrupt": lambda s: s.loop.interrupt(1),
    "snapshot": lambda s: s.made.append(s.loop.snapshot()),
    "restore": lambda s: s.loop.restore(s.elsewhere),
    "adopt": lambda s: s.loop.adopt(s.other),
    "fork": lambda s: s.made.extend(s.loop.fork(1, seeds=[2])),
    "loop": lambda s: s.made.append(s.loop_of(1)),
    "close": lambda s: s.loop.close(),
}
CASES: list[tuple[type[Scene], str]] = [
    *((Scene, name) for name in CALLS),
    *((Full, name) for name in ("two ticks", "slack", "rewind", "reset", "restore")),
    *((Restored, name) for name in ("tick", "restore", "set_seed")),
    *((Adopted, name) for name in ("tick", "restore", "reset")),
]
NAMES = [f"{kind.__name__}, {name}" for kind, name in CASES]


@dataclass(frozen=True)
class Outcome:
    """What a loop comes to: where it is, and what it goes on with, also after going back."""

    position: int
    seed: int
    digest: str
    actions: tuple[bytes, ...]
    rewound: tuple[bytes, ...] | None  # from before all this; None: it did not reach so far back

    def is_like(self, other: Outcome) -> bool:
        """The same, where both were looked at."""
        is_same = replace(self, rewound=None) == replace(other, rewound=None)
        return is_same and (None in (self.rewound, other.rewound) or self.rewound == other.rewound)


def outcome(loop: flashrt.ControlLoop) -> Outcome:
    """Red when the history is not that of the state, as a rewind and the actions then show."""
    position, seed, digest = loop.position, loop.seed, loop.digest()
    assert (loop.position, loop.seed) == (position, seed)
    actions = [loop.tick(seen).tobytes() for seen in SEEN[20:26]]
    for back in (8, 6, 4, 2, 1):
        try:
            loop.rewind_ticks(back)
            break
        except SessionError:
            continue
    rewound = None
    if back > 6:
        rewound = tuple(loop.tick(seen).tobytes() for seen in SEEN[30:35])
    else:
        again = [loop.tick(seen).tobytes() for seen in SEEN[26 - back : 26]]
        assert again == actions[-back:]
    return Outcome(position, seed, digest, tuple(actions), rewound)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[type[Scene], ActionEngine]]:
    """One with room, and one without."""
    folder = write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)
    roomy = flashrt.load_policy(folder, device="cpu", lanes=4)
    room = 9 * roomy.capsules.fixed_nbytes
    narrow = flashrt.load_policy(folder, device="cpu", lanes=4, pool_bytes=room)
    yield {Scene: roomy, Full: narrow}
    roomy.close()
    narrow.close()


def check(scene: Scene, expected: list[Outcome]) -> bool:
    """Whether the loop knew its state. If not, it says so, and can be put elsewhere."""
    engine, loop, is_known = scene.engine, scene.loop, True
    if loop.is_closed:
        with pytest.raises(SessionError, match="is closed"):
            loop.tick(SEEN[0])
        loop.close()
        return True
    try:
        loop.digest()
    except SessionError as error:
        assert "its state is lost; reset it, or restore a capsule" in f"{error}"
        is_known = False
    else:
        found = outcome(loop)
        assert any(found.is_like(each) for each in expected), (found, expected)
    engine.capsules.check_integrity()
    scene.make_room()
    loop.restore(scene.elsewhere)
    assert loop.digest() == scene.elsewhere.digest == scene.other.digest()
    loop.tick(SEEN[0])
    capsule = loop.snapshot()
    capsule.save(scene.folder / "c")
    loaded = engine.load_capsule(scene.folder / "c")
    loop.reset()
    loop.restore(loaded)
    assert loop.digest() == capsule.digest
    engine.capsules.check_integrity()
    return is_known


def strike_all(
    engines: dict[type[Scene], ActionEngine], folder: Path, case: tuple[type[Scene], str], n: int
) -> None:
    """One line in `n`."""
    kind, name = case
    engine, call = engines.get(kind, engines[Scene]), CALLS[name]
    injector, expected, n_lines = Injector(ROOMS), list[Outcome](), 0

    def told(work: Callable[[Scene], object]) -> None:
        nonlocal n_lines
        scene = kind(engine, folder)
        n_lines = injector.count(lambda: work(scene))
        if not scene.loop.is_closed:
            expected.append(outcome(scene.loop))
        scene.close()

    told(lambda scene: None)
    if name == "two ticks":
        told(CALLS["tick"])
    told(call)
    n_struck, points = 0, range(sum(name.encode()) % n, n_lines, n)
    for at in points:
        scene = kind(engine, folder)
        n_struck += injector.strike(lambda: call(scene), at)  # noqa: B023
        try:
            is_known = check(scene, expected)
        except BaseException as error:
            raise AssertionError(f"{case}, struck before line {at}: {injector.where}") from error
        finally:
            scene.close()
        assert is_known or kind in (Restored, Adopted)
        engine.capsules.check_integrity()
        assert engine.capsules.pool.used_nbytes == 0
        assert len(engine.free_lanes) == 4, "no lane is lost"
    assert n_struck == len(points) > 20 // n


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_some_lines(
    engines: dict[type[Scene], ActionEngine], tmp_path: Path, case: tuple[type[Scene], str]
) -> None:
    strike_all(engines, tmp_path, case, 23)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_line(
    engines: dict[type[Scene], ActionEngine],
    tmp_path: Path,
    case: tuple[type[Scene], str],
    request: pytest.FixtureRequest,
) -> None:
    """--stride 1 strikes every line."""
    strike_all(engines, tmp_path, case, max(1, request.config.getoption("--stride") // 8))


# -- an environment beside it ---------------------------------------------------------------------


class Drift:
    """An environment that forgets nothing: each step depends on all before."""

    def __init__(self) -> None:
        self.x = np.zeros(5)

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.x = np.full(5, 0.1 * (seed or 0))
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.x = 0.9 * self.x + 0.2 * np.resize(action, 5) + 0.01
        return self.x.copy(), float(self.x.sum()), False, False, {}

    def close(self) -> None:
        pass


class Paired:
    """A rollout in the middle of an episode, and a moment of another."""

    def __init__(self, engine: ActionEngine) -> None:
        self.engine = engine
        self.rollout = Rollout(Drift, flashrt.ControlLoop(engine, 50.0, **OPTIONS))
        self.rollout.reset(4)
        for _ in range(3):
            self.rollout.step()
        self.moment = self.rollout.snapshot()
        self.rollout.reset(2)
        for _ in range(9):
            self.rollout.step()
        self.made: list[Any] = []

    def close(self) -> None:
        for thing in self.made:
            thing.close() if isinstance(thing, Rollout) else thing.drop()
        self.rollout.close()
        self.moment.drop()


PAIRED_CALLS: dict[str, Callable[[Paired], object]] = {
    "step": lambda s: s.rollout.step(),
    "reset": lambda s: s.rollout.reset(7),
    "snapshot": lambda s: s.made.append(s.rollout.snapshot()),
    "restore": lambda s: s.rollout.restore(s.moment),
    "fork": lambda s: s.made.extend(s.rollout.fork(1)),
    "close": lambda s: s.rollout.close(),
}


def future(rollout: Rollout) -> list[tuple[int, bytes, bytes]]:
    """Steps that differ as soon as environment and loop are not those of one instant."""
    steps = []
    for _ in range(6):
        step = rollout.step()
        steps.append((rollout.loop.position, step.following.tobytes(), step.action.tobytes()))
    return steps


def strike_pair(engine: ActionEngine, name: str, n: int) -> None:
    """One line in `n`."""
    call, injector = PAIRED_CALLS[name], Injector(ROOMS)
    pair = Paired(engine)
    pair.rollout.restore(pair.moment)
    at_moment = future(pair.rollout)
    pair.close()
    expected = []
    for told in (lambda pair: None, call):
        pair = Paired(engine)
        n_lines = injector.count(lambda: told(pair))  # noqa: B023
        if name != "close":
            expected.append(future(pair.rollout))
        else:
            expected = expected or [future(pair.rollout)]
        pair.close()
    n_apart, points = 0, range(sum(name.encode()) % n, n_lines, n)
    for at in points:
        pair = Paired(engine)
        injector.strike(lambda: call(pair), at)  # noqa: B023
        try:
            if pair.rollout.loop.is_closed or name == "close":
                pair.rollout.close()
                with pytest.raises(EnvironmentFailed, match="closed"):
                    pair.rollout.step()
                continue
            try:
                assert future(pair.rollout) in expected
            except EnvironmentFailed as error:
                assert "reset the rollout, or restore a moment" in f"{error}"
                n_apart += 1
            pair.rollout.restore(pair.moment)
            assert future(pair.rollout) == at_moment
            engine.capsules.check_integrity()
        except BaseException as error:
            raise AssertionError(f"{name}, struck before line {at}: {injector.where}") from error
        finally:
            pair.close()
        flashrt.ControlLoop(engine).close()  # boundaries of loops that nobody has go with this
        assert engine.capsules.pool.used_nbytes == 0
        assert len(engine.free_lanes) == 4, "no lane is lost"
    assert n_apart <= len(points) // 2 or name in ("reset", "restore")


@pytest.mark.parametrize("name", PAIRED_CALLS)
def test_some_lines_beside_an_environment(
    engines: dict[type[Scene], ActionEngine], name: str
) -> None:
    strike_pair(engines[Scene], name, 23)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRED_CALLS)
def test_every_line_beside_an_environment(
    engines: dict[type[Scene], ActionEngine], name: str
) -> None:
    strike_pair(engines[Scene], name, 1)


# -- signals --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_at_any_instant(engines: dict[type[Scene], ActionEngine], tmp_path: Path) -> None:
    """Real ones, which fall where the interpreter looks for them: after calls and in loops."""
    rng, engine = np.random.default_rng(5), engines[Scene]

    def strike(number: int, frame: object) -> None:
        raise Struck("a signal")

    before, n_struck = signal.signal(signal.SIGALRM, strike), 0
    try:
        for name in ("tick", "rewind", "restore", "reset", "adopt", "set_seed", "snapshot"):
            expected = []
            for told in (lambda s: None, CALLS[name]):
                scene = Scene(engine, tmp_path)
                told(scene)
                expected.append(outcome(scene.loop))
                scene.close()
            for _ in range(150):
                scene = Scene(engine, tmp_path)
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 300e-6))
                    CALLS[name](scene)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Struck:
                    n_struck += 1
                assert check(scene, expected)
                scene.close()
                assert engine.capsules.pool.used_nbytes == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert n_struck > 100
